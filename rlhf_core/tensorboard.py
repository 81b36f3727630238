"""Curves for TensorBoard: the metrics.jsonl of artifacts as event files, one folder an artifact.

Our own record is metrics.jsonl and the report's pages; this is for people who watch everything in one place. Written from what
is in the store, so finished stages of any age can be shown and training needs no further package.
"""

import json
from pathlib import Path

from rlhf_core.artifacts import Manifest
from rlhf_core.errors import ConfigError
from rlhf_core.store import Store

METRICS = "metrics.jsonl"


def write_events(store: Store, manifests: list[Manifest], folder: Path) -> list[Path]:
    """Write `{folder}/{artifact id}` for every artifact that has metrics; the folders written.

    Scalars are named `{kind}/{metric}`, e.g. `train/loss`, at their step; wall time is seconds since the stage began.

    Raises:
        ConfigError: the package tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError("writing event files needs the package tensorboardX: pip install tensorboardX") from None
    written = []
    for manifest in manifests:
        if all(entry.path != METRICS for entry in manifest.files):
            continue
        place = folder / manifest.ref.id
        writer = SummaryWriter(str(place))
        for line in store.read(manifest.key(METRICS)).splitlines():
            row = json.loads(line)
            for name, value in row.items():
                if name not in ("kind", "step", "seconds") and isinstance(value, int | float):
                    writer.add_scalar(f"{row['kind']}/{name}", value, row["step"], walltime=row["seconds"])
        writer.close()
        written.append(place)
    return written
