"""Hugging Face folders: config.json and tensor files."""
