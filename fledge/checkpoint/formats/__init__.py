"""One module or folder for each file format: reading and writing tensors and metadata."""
