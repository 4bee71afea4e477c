"""What a look at a cluster found: one line of `whalepod k8s preflight` each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from whalepod.cluster.kube_objects import KubeError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        check: what was looked at, such as `operator`.
        what: what there is, and what is missing.
        fix: what to do about it, where possible a command; empty when nothing is to be done.
    """

    check: str
    status: Status
    what: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """As plain values."""
        return asdict(self)


def ok(check: str, what: str) -> Finding:
    """Nothing is to be done."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, fix: str) -> Finding:
    """It can work, but not as it should, or it could not be looked at."""
    return Finding(check, "warning", what, fix)


def failure(check: str, what: str, fix: str) -> Finding:
    """A deployment cannot work."""
    return Finding(check, "failure", what, fix)


def looked(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of one look; where it may not or cannot look, that is the finding.

    Lost connections and credentials that do not work are raised: no other look would fare better.
    """
    try:
        yield from look()
    except KubeError as error:
        if error.fault in ("configuration", "unreachable", "unauthorized"):
            raise
        make = warning if error.fault == "forbidden" else failure
        yield make(check, f"could not look: {error.what}", error.fix)
