"""What an object under a store's root is, told by its key alone: for those who look at a whole store.

`{stage}/{name}-{fingerprint12}/` is an artifact's folder; in it `manifest.json`, `attempts/NNNN/…`, `checkpoints/NNNN/…` and
`superseded/…` are ours. Anything else is somebody else's.
"""

import re
from collections.abc import Mapping

from rlhf_core.checkpoints import NAME
from rlhf_core.specs import STAGES

ID = re.compile(rf"((?:{'|'.join(STAGES)})/[a-z0-9][a-z0-9._-]*-[0-9a-f]{{12}})/(.+)")
ATTEMPT = re.compile(r"attempts/(\d{4,})/(.+)")
CHECKPOINTS = re.compile(r"checkpoints/(\d{4,})/(.+)")


def artifacts_of(keys: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Sizes by artifact id and path within its folder; what is in no artifact's folder is left out."""
    found: dict[str, dict[str, int]] = {}
    for key, size in keys.items():
        if match := ID.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = size
    return found


def is_marker(path: str) -> bool:
    """Whether a path within an artifact's folder is that of a checkpoint's marker."""
    match = CHECKPOINTS.fullmatch(path)
    return bool(match and NAME.fullmatch(match[2]))
