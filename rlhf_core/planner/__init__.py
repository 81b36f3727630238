"""What a run will need and cost, from its configuration alone: memory per rank, work, time, and the smallest change that fits.

`shapes` has a model's sizes without weights, `hardware` what devices can do, `memory` bytes per rank, `work` operations and
seconds, `estimate` puts a pipeline together and `fit` looks for what makes it fit. No torch here: everything is arithmetic on
the fields of configurations, and tests hold it against transformers' models, measured memory and published tables.
"""
