"""`fledge bench cpu`: Fledge, llama.cpp and `rwkv` on one CPU, compared with the limits of the machine."""
