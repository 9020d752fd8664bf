"""L6: what is true and how fast it is. Timing with spread, other programs beside ours in one run, and the self-check.

A figure comes with its command, its machine and its commit. Not here: printing (fledge.cli), and anything a model needs
in order to run.
"""
