"""Kubernetes objects as the API server sends them: checked reading, quantities, faults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast, overload

from whalepod.errors import WhalepodError

Fault = Literal[
    "configuration",  # no kubeconfig, or one that cannot be used
    "unreachable",  # no connection, or it broke off
    "timeout",
    "unauthorized",
    "forbidden",
    "not found",
    "conflict",
    "gone",  # what was read is too old (410)
    "refused",  # any other 4xx
    "server",  # 5xx
    "malformed",  # an answer that is not what the Kubernetes API documents
]
Object = dict[str, Any]
T = TypeVar("T")
_NAMES: dict[type, str] = {
    **{str: "a text", int: "a whole number", bool: "true or false", list: "a list"},
    dict: "an object",
}


class KubeError(WhalepodError):
    """A call of the Kubernetes API failed, or its answer is no such answer.

    Attributes:
        fault: how.
        what: which call or object, what was found and expected.
        fix: the way out.
    """

    def __init__(self, fault: Fault, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}")
        self.fault, self.what, self.fix = fault, what, fix


@overload
def dig(value: Mapping[str, Any], *path: str, kind: type[T]) -> T | None: ...
@overload
def dig(value: Mapping[str, Any], *path: str, kind: type[T], default: T) -> T: ...
def dig(value: Mapping[str, Any], *path: str, kind: type[T], default: T | None = None) -> T | None:
    """The value at a path, `default` where it or something above it is absent or null.

    Raises KubeError (malformed) where something on the path is of another type.
    """
    place: Any = value
    for depth, key in enumerate(path):
        if not isinstance(place, Mapping):
            raise _malformed(value, path[:depth], "an object", place)
        place = place.get(key)
        if place is None:
            return default
    if not isinstance(place, kind) or (kind is int and isinstance(place, bool)):
        raise _malformed(value, path, _NAMES.get(kind, kind.__name__), place)
    return place


def objects(value: Mapping[str, Any], *path: str) -> list[Object]:
    """The list of objects at a path, empty where it is absent. Raises KubeError (malformed)."""
    found = dig(value, *path, kind=list, default=[])
    for item in found:
        if not isinstance(item, dict):
            raise _malformed(value, path, "a list of objects", item)
    return cast("list[Object]", found)


def strings(value: Mapping[str, Any], *path: str) -> dict[str, str]:
    """The map at a path (labels, quantities) with its values as text, empty where absent."""
    found = dig(value, *path, kind=dict, default={})
    return {str(key): str(item) for key, item in found.items()}


def name_of(value: Mapping[str, Any]) -> str:
    """`metadata.name`. Raises KubeError (malformed) where there is none."""
    name = dig(value, "metadata", "name", kind=str)
    if not name:
        raise _malformed(value, ("metadata", "name"), "a name", name)
    return name


def labels_of(value: Mapping[str, Any]) -> dict[str, str]:
    """`metadata.labels`."""
    return strings(value, "metadata", "labels")


def _malformed(value: Mapping[str, Any], path: tuple[str, ...], expected: str, found: Any) -> Any:
    metadata = value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return KubeError(
        "malformed",
        f"{value.get('kind') or 'object'} {name or '(unnamed)'}: {'.'.join(path)} is "
        f"{found!r:.60}, expected {expected}",
        "is the server really a Kubernetes API server of a supported version? (`kubectl version`)",
    )


_SUFFIX = {
    **{"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3},
    **{letter: 1e3 ** (power + 2) for power, letter in enumerate("MGTPE")},
    **{f"{letter}i": 1024.0 ** (power + 1) for power, letter in enumerate("KMGTPE")},
}
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(?:[eE]([+-]?[0-9]+)|([A-Za-z]{0,2}))")


def quantity(text: str) -> float:
    """A Kubernetes quantity (`500m`, `64Gi`, `1e3`) as a number. Raises KubeError (malformed)."""
    match = _QUANTITY.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError(text)
        number, exponent, suffix = match.groups()
        return float(number) * (10.0 ** int(exponent) if exponent else _SUFFIX[suffix or ""])
    except (ValueError, KeyError, OverflowError):
        raise KubeError(
            "malformed", f"{text!r} is no quantity", "expected a number such as 8, 500m or 64Gi"
        ) from None


def version_of(text: str) -> tuple[int, ...] | None:
    """The numbers of a version such as `v1.33.4+k3s1`, None where there are none."""
    match = re.search(r"(?<![0-9.])v?([0-9]+(?:\.[0-9]+){1,2})(?![0-9])", text)
    return tuple(map(int, match[1].split("."))) if match else None


def age(stamp: str | None, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 stamp was, as `90s`, `12m`, `5h` or `3d`; `-` for none."""
    if not stamp:
        return "-"
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        raise KubeError(
            "malformed", f"{stamp!r} is no RFC 3339 time", "expected such as 2026-01-31T12:00:00Z"
        ) from None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    seconds = max(0, int(((now or datetime.now(UTC)) - then).total_seconds()))
    for unit, size, below in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172800)):
        if seconds < below:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86400}d"
