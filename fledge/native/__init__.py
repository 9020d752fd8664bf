"""L0: the native library: one handle on it, and the signatures of its functions."""
