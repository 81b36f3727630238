"""The command line run in this process, for tests."""

import sys

from flows import cli


def rlhf(capfd, *words: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    before, sys.argv = sys.argv, ["rlhf", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    said = capfd.readouterr()
    return code, said.out, said.err
