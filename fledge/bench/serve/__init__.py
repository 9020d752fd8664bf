"""`fledge bench serve`: the HTTP server under load, with llama-cpp-python as baseline."""
