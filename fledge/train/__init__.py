"""L4: training. For now one readable loop on one device, with the official optimiser groups, schedule and loss.

`optim` groups the parameters, `schedule` gives the learning rate, `loss` is cross-entropy with L2Wrap, `checkpoint`
saves and resumes a run, `loop` ties them together, `score` measures bits per byte. Models come in built; texts come in
as token ids.
"""
