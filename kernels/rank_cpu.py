"""The best of many scores, for compiled CPU twins: one pass finds the bound, another what is above it."""

from __future__ import annotations

from whalepod.kernels.compiled import compiled
from whalepod.kernels.simd import LANES, get, get_int, largest, load, put, put_int

CANDIDATES = 4  # room for candidates, in multiples of how many scores are kept


@compiled
def _nth(values, count, rank):
    """The value of a rank (0 is the largest); puts larger ones before it. A NaN equals anything."""
    low, high = 0, count
    while True:
        pivot = get(values + (low + high) // 2 * 4)
        above, at, below = low, low, high
        while at < below:
            value = get(values + at * 4)
            if value > pivot:
                put(values + at * 4, get(values + above * 4))
                put(values + above * 4, value)
                above += 1
                at += 1
            elif value < pivot:
                below -= 1
                put(values + at * 4, get(values + below * 4))
                put(values + below * 4, value)
            else:
                at += 1
        if rank < above:
            high = above
        elif rank >= below:
            low = below
        else:
            return pivot


@compiled
def _bound(scores, count, keep, room):
    """The score of rank `keep`; the best `keep` scores are the first in `room`.

    A score that does not exceed the bound so far cannot change it, so most vectors need one look.
    """
    for e in range(keep):
        put(room + e * 4, get(scores + e * 4))
    least, held = _nth(room, keep, keep - 1), keep
    e = keep
    while e < count:
        if e + LANES <= count and not largest(load(scores + e * 4)) > least:
            e += LANES
            continue
        for i in range(e, min(e + LANES, count)):
            score = get(scores + i * 4)
            if score > least:
                put(room + held * 4, score)
                held += 1
                if held == CANDIDATES * keep:
                    least, held = _nth(room, held, keep - 1), keep
        e += LANES
    return _nth(room, held, keep - 1)


@compiled
def best(scores, count, keep, room, listed, to):
    """Write the entries with the `keep` best of more scores, in order; among equal ones the first.

    Args:
        scores, listed: addresses of `count` scores and of as many entries (64-bit).
        room: address of room for `CANDIDATES * keep` numbers.
        to: address of what is written.

    Returns:
        how many were written.
    """
    least = _bound(scores, count, keep, room)
    wanted, found = keep, 0
    for e in range(keep):
        wanted -= get(room + e * 4) > least
    e = 0
    while e < count and found < keep:
        if e + LANES <= count and largest(load(scores + e * 4)) < least:
            e += LANES
            continue
        for i in range(e, min(e + LANES, count)):
            score = get(scores + i * 4)
            if found < keep and (score > least or (score == least and wanted > 0)):
                wanted -= score == least
                put_int(to + found * 8, get_int(listed + i * 8))
                found += 1
        e += LANES
    return found
