"""A table of digests with a small number each, for what must be remembered of every row and prompt of a data set.

Open addressing in one array of 64-bit words: 61 bits of digest and 3 of value, 11 to 21 bytes an entry (a dict of
`bytes` takes 150 and more). Two different texts are taken for one with a probability of n^2 / 2^62: for a hundred
million rows one in five hundred, once in the whole data set; the second row then counts as a duplicate of the first.
Left out: deletion.
"""

from array import array

VALUE_BITS = 3
_FIRST_SIZE = 1 << 10


class DigestTable:
    """Digests -> numbers from 1 to 7, kept in 8 bytes a slot."""

    def __init__(self) -> None:
        self._slots = array("Q", [0]) * _FIRST_SIZE
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, digest: bytes, value: int) -> None:
        """Remember `value`, 1 to 7, for a digest that is not there yet; its first 8 bytes are looked at."""
        assert 0 < value < 1 << VALUE_BITS
        key = int.from_bytes(digest[:8], "big") >> VALUE_BITS
        at = self._find(key)
        assert not self._slots[at]
        self._slots[at] = key << VALUE_BITS | value
        self._count += 1
        if self._count * 4 > len(self._slots) * 3:
            self._grow()

    def get(self, digest: bytes) -> int:
        """The value of `digest`, 0 if it is not there."""
        key = int.from_bytes(digest[:8], "big") >> VALUE_BITS
        return self._slots[self._find(key)] & ((1 << VALUE_BITS) - 1)

    def _find(self, key: int) -> int:
        """The slot of a key, or the free one where it belongs."""
        slots, last = self._slots, len(self._slots) - 1
        at = key & last
        while (word := slots[at]) and word >> VALUE_BITS != key:
            at = (at + 1) & last
        return at

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", [0]) * (2 * len(old))
        for word in old:
            if word:
                self._slots[self._find(word >> VALUE_BITS)] = word
