"""Errors and the exit codes by which a job tells the control plane what to do.

Every error a user can cause is one class with one exit code; its message names the field, the value, the rule and the
remedy. Entry points print the message alone (no traceback) for `RlhfError` and exit with `exit_code`.
"""

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_core.ends import Failure


class ExitCode(IntEnum):
    """Process exit codes of a stage job (DESIGN: rule 11)."""

    DONE = 0
    CONFIG = 2
    DATA = 3
    NON_FINITE = 4
    OUT_OF_MEMORY = 5
    GATE = 6
    PREEMPTED = 75

    @property
    def retry(self) -> bool:
        """Whether starting the same job again can help."""
        return self is ExitCode.PREEMPTED


def is_transient(code: int) -> bool:
    """Whether a job that ended with `code` is worth another attempt: preempted, or any code that is not ours."""
    try:
        return ExitCode(code).retry
    except ValueError:
        return True


class RlhfError(Exception):
    """Base of every error with a meaning for the user."""

    exit_code: int = 1


class ConfigError(RlhfError, ValueError):
    """The configuration is wrong; running again cannot help."""

    exit_code = ExitCode.CONFIG


class DataError(RlhfError, ValueError):
    """The data is wrong or too little; running again cannot help."""

    exit_code = ExitCode.DATA


class NonFiniteError(RlhfError, ArithmeticError):
    """A loss or gradient is not finite; raised before the optimizer changes a weight."""

    exit_code = ExitCode.NON_FINITE


class Preempted(RlhfError):
    """The job was told to end and has saved its state; running again goes on from there."""

    exit_code = ExitCode.PREEMPTED


class StoreError(RlhfError):
    """Object storage refused or could not be reached. Never means "absent"."""


class IntegrityError(RlhfError):
    """What is stored is not what its manifest says."""

    exit_code = ExitCode.DATA


class AlreadyExists(RlhfError):
    """A create-only write found the object already there."""


class JobFailed(RlhfError):
    """A stage job ended without its result.

    Attributes:
        code: the exit code of the job (negative: ended by that signal).
        reason: one phrase: the kind of its failure, or "busy", "leftovers", "preempted in vain".
        failure: what was concluded from how its processes ended; None: no process of it had been started.
    """

    def __init__(self, message: str, code: int, reason: str, failure: "Failure | None" = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.failure = failure
        self.exit_code = code if 0 < code < 256 else 1
