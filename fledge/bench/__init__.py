"""L6: benchmarks of speed, memory and quality, with baselines measured in the same run.

Every benchmark runs in the framework of `suite`. A metric is recorded with its command, machine and commit. Printing is
in fledge.cli, and nothing here is needed to run a model.
"""
