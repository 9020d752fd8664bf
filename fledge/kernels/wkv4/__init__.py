"""WKV of RWKV-4: a weighted mean with one numerator and one denominator for each channel."""
