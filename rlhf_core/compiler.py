"""The C++ compiler of this machine, for our kernels on CPUs."""

import os
import shlex
import shutil


def compiler() -> list[str]:
    """Its command, CXX or one that is found; [] if there is none.

    GCC first: what it compiles shares torch's threads.
    """
    if own := shlex.split(os.environ.get("CXX", "")):
        return own
    return [name for name in map(shutil.which, ("g++", "c++", "clang++")) if name][:1]
