"""Files of LoRA adapters and tuned initial states, and merging them into a checkpoint."""
