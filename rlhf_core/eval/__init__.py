"""`rlhf eval`: what a trained model is worth, by numbers and side by side, outside of a pipeline run.

`request` is what is asked (no torch; the command line builds it), `__main__` the process that answers. Four modes: `reward`
(accuracy, calibration and length bias of a reward model), `language` (perplexity), `compare` (two models side by side) and
`frontier` (PPO's snapshots: reward and gold against KL). `pairs` and `peak` are the numbers alone, on plain lists;
`drawings` and `page` the PNGs and the HTML. This module imports nothing.
"""
