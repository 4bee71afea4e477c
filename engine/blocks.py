"""Free lists of the cache: slots of the rings and blocks of the pools."""

from __future__ import annotations

from whalepod.errors import OutOfBlocks


class BlockPool:
    """Numbers `0 .. size-1`, each free or taken. Not thread-safe: the engine loop owns it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` numbers, all or none. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(count, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, numbers: list[int]) -> None:
        """Free numbers that were taken; empties the list."""
        self._free += reversed(numbers)
        numbers.clear()
