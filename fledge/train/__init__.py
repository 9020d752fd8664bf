"""L4: training, in one readable loop with the official optimizer groups, schedule and loss.

From scratch: `recipe` is a whole run as a value, `run` brings it together with a token store, `loop` trains, `team` is
about several processes, `checkpoint` saves and resumes, `meter` writes what happens, `score` measures bits per byte.
`tuning` trains a checkpoint further, all of it or a LoRA or the initial state, with the same loop; `estimate` says
beforehand what that costs. Texts come in as token ids.
"""
