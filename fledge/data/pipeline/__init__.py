"""From raw documents to a token store: the stages of `fledge data build`. Start with build.py.

config.py, builtin_configs.py       the configuration, and those that ship with Fledge
sources/                            the input files and hub data sets, and the first stage that reads them
clean.py, language.py, shards.py    cleaning, language identification, documents on disk
dedup/, validation_split.py         exact and near duplicates; held-out documents
mixture/                            which documents the store contains, and how often
tokenize.py, store_assembly.py      text to ids, ids to the store
counts.py, report.py                statistics and the HTML report
workers.py, ray_workers.py          processes and Ray clusters
stage_outputs.py                    the files that stages leave, so that a build can resume
"""
