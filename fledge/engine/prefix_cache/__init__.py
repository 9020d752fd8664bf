"""Exact prefix caching: the states after prompt prefixes, in memory and on disk.

`cache` decides what to keep, `radix_tree` holds the prefixes in memory, `disk_cache` and `disk_store` keep snapshots in
files. Nothing here runs a model.
"""
