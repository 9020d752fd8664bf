"""Quantization of checkpoints: the format of each matrix and its effect on the predictions."""
