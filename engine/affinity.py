"""Which attention member a request should go to: where most of its prompt is known.

An ingress replica remembers, by the digest of every block of a prompt and all before it, where
prompts went. It guesses at the members' caches; a wrong guess costs the computing it hoped to save.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from whalepod.engine.request import Request


def chain(request: Request, block_tokens: int) -> list[bytes]:
    """Digests of a prompt's first block, its first two blocks, and so on.

    Requests with another `cache_salt` have other digests: they share nothing.
    """
    running = hashlib.blake2b(request.cache_salt.encode(), digest_size=16)
    ids = array("q", (*request.prompt_ids, *request.emitted))
    found = []
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        running.update(ids[end - block_tokens : end].tobytes())
        found.append(running.digest())
    return found


class Affinity:
    """Remembers where blocks went; the oldest are forgotten first.

    Args:
        capacity: blocks remembered.
        busy: a member with so many requests is passed over when another has fewer.
    """

    def __init__(self, capacity: int, busy: int) -> None:
        self.capacity, self.busy = capacity, busy
        self._where: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, digests: Sequence[bytes], loads: Mapping[str, int]) -> str | None:
        """The member that knows most of the prompt, or None where load should decide.

        Args:
            digests: of the prompt, by `chain`.
            loads: requests by member, of those that may take this one.
        """
        for digest in reversed(digests):
            member = self._where.get(digest)
            if member is not None and member in loads:
                if loads[member] >= self.busy and min(loads.values()) < loads[member]:
                    return None
                return member
        return None

    def record(self, digests: Sequence[bytes], member: str) -> None:
        """A prompt went to `member`."""
        # The beginning is refreshed last: it is what most prompts share.
        for digest in reversed(digests[-self.capacity :]):
            self._where[digest] = member
            self._where.move_to_end(digest)
        while len(self._where) > self.capacity:
            self._where.popitem(last=False)
