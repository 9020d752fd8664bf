"""Text in, text out: the `LLM` class and its parts."""
