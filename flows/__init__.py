"""Prefect flows: the pipeline (`flows.rlhf`), the single stages (`flows.single`), and the command line (`flows.cli`).

Read `flows/rlhf.py` first: the whole pipeline is on one screen. This module imports nothing, so that `rlhf plan` and
`rlhf --help` start without Prefect; and no module of this package imports torch, deepspeed or transformers.
"""
