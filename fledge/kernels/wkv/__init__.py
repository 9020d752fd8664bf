"""WKV of RWKV-5 Eagle and RWKV-6 Finch: a matrix-valued state for each head, decayed per key channel."""
