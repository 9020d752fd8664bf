"""Exact prefix caching: states after token prefixes, in memory and on disk."""
