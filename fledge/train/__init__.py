"""L4: training. For now one readable loop on one device, with the official optimiser groups, schedule and loss.

`optim` groups the parameters, `schedule` gives the learning rate, `loss` is cross-entropy with L2Wrap, `checkpoint`
saves and resumes a run, `loop` ties them together, `score` measures bits per byte. `tuning` trains a checkpoint
further, all of it or a LoRA or the initial state; `estimate` says beforehand what that costs. Texts come in as token
ids.
"""
