"""What the head of a job knows of one of its nodes: its place, what was last heard of it, and when.

Only what changes in a node's beat is a sign of life, by the head's own clock. Not here: reading beats (`members`), and what
follows from a node's silence or end (`head`).
"""

import time

from rlhf_core import hosts
from rlhf_core.ends import NodeEnd
from rlhf_core.members import NodeBeat, Seat


class Member:
    """What the head knows of one node."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.beat: NodeBeat | None = None
        self.first: str | None = None  # the incarnation that got its place
        self.heard = time.monotonic()
        self.reported = 0.0  # when its facts came, in seconds since the epoch
        self.shown = 0  # number of the last event or line that was printed

    @property
    def name(self) -> str:
        """For messages: the name it was given, or the one it gives itself."""
        facts = self.beat.facts if self.beat else None
        return facts.host if facts and hosts.is_unnamed(self.seat) else self.seat.host

    @property
    def end(self) -> NodeEnd | None:
        """How its ranks ended, once they have."""
        return self.beat.end if self.beat and self.beat.state == "ended" else None

    def hear(self, beat: NodeBeat | None) -> None:
        """Take what was read of it; only what changes is a sign of life."""
        if beat is None:
            return
        known = self.beat
        if known is None or (beat.incarnation, beat.beat) != (known.incarnation, known.beat):
            self.heard = time.monotonic()
            if known is not None and beat.incarnation != known.incarnation:
                self.shown = 0
            if beat.facts and not (known and known.facts):
                self.reported = time.time()
            self.beat = beat
