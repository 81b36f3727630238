"""Everything of the RLHF pipeline that is not Prefect.

Two halves. The contract half (`errors`, `canonical`, `specs`, `resources`, `config`, `artifacts`, `store`, `sources`, `job`,
`plan`, `launch`, `guard`) says what a stage is, where its result lives and how its job is started; it never imports torch.
The training half (`train` and what it imports) runs inside the job. This package never imports Prefect, and this module
imports nothing, so that the guard process starts in milliseconds.
"""

__version__ = "0.1.0"
