"""The stages of `fledge data build`, which builds a token store from raw documents. Start with build.py.

config.py, builtin_configs.py       the configuration, and the built-in configs
sources/                            input files and hub data sets, and the stage that reads them
clean.py, language.py, shards.py    cleaning, language identification, documents on disk
dedup/, validation_split.py         exact and near duplicates; held-out documents
mixture/                            which documents the store contains, and how often
tokenize.py, store_assembly.py      text to ids, ids to the store
counts.py, report.py                statistics and the HTML report
workers.py, ray_workers.py          processes and Ray clusters
stage_outputs.py                    the output files of the stages, from which a build resumes
"""
