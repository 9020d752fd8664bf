"""Which documents the store contains, and how often."""
