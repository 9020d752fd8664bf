"""Fine-tuning: full, LoRA and initial-state tuning of a checkpoint."""
