"""GGUF files of RWKV-6 Finch, as llama.cpp reads and writes them."""
