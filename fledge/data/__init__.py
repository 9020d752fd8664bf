"""L2: training data: token stores, rows of tokens, tuning examples, and the pipeline that builds stores.

    store.py, binidx.py      token stores and their file format
    windows.py, batches.py   rows of tokens for training
    examples.py              texts and conversations for fine-tuning
    texts.py, documents.py   documents of text files and JSON lines
    compression.py           compressed files
    pipeline/                `fledge data build`: from raw documents to a token store

Models and the training loop are in other packages.
"""
