"""L4: training, in one loop with the official optimizer groups, schedule and loss.

Training from scratch: `recipe` contains the settings of a run, `run` combines a recipe with a token store, `loop`
trains, `distributed` connects several processes, `run_checkpoint` saves and resumes, `metrics` writes the measurements,
and `evaluate` computes bits per byte. `tuning` trains an existing checkpoint with the same loop: all weights, a LoRA or
the initial state. The package reads token ids; it does not tokenize.
"""
