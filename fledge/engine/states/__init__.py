"""Saved states: state files, stores of states by owner, long documents that are read once, and state inspection.

Nothing here knows text or the `LLM` class. The identity of a model's weights is an argument.
"""
