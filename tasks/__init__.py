"""Prefect tasks: run one stage as a job and publish its artifact (`tasks.stage`), show how it goes (`tasks.progress`).

`tasks.report` writes the table at the end of a run and `tasks.headline` says which numbers of a stage are shown. This
module imports nothing.
"""
