"""Text in, text out: the `LLM` class, chats, streams and scoring.

Serving is in `fledge.server`, checkpoint files are in `fledge.checkpoint`, and the model code is in `fledge.models`.
"""
