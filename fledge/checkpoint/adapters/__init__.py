"""LoRA adapters and tuned initial states in files, and their merge into a checkpoint."""
