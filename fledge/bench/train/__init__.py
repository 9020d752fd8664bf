"""`fledge bench train`: speed and memory of training by context length, with a transformer as baseline."""
