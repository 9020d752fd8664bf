"""The HTTP routes, grouped by topic."""
