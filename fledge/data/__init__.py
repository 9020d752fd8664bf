"""L2: documents in, token stores out. Knows nothing of models.

    build.py        `fledge data build`: all stages, one after the other; start here
    config.py       what it is told
    sources.py      which files there are, in slices; hub.py for data sets that are streamed
    reading.py      a slice becomes shards: documents.py, texts.py, clean.py, language.py, signature.py, shards.py;
                    compression.py: files that may be packed
    dedup.py        copies and near copies; split.py: what is kept aside
    plan.py         how much of what
    tokenise.py     text to ids; assembly.py, report.py: the store and what is known of it
    workers.py      who runs the stages; rays.py for many machines; pieces.py: what they leave behind
    store.py        the store as training reads it; binidx.py: its file format

Training takes its rows from batches.py and windows.py, tuning from examples.py.
"""
