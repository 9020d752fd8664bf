"""Quantization of a checkpoint: the format of each matrix and its effect on the predictions."""
