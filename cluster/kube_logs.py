"""Logs of a release's pods: merged by time, or followed through restarts and replacements."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from queue import SimpleQueue

from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_objects import KubeError, Object, dig, name_of, objects
from whalepod.cluster.kube_status import group_of

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
_MARGIN_S = 5
_PATIENCE = 5
_FINAL = ("configuration", "unreachable", "unauthorized", "forbidden")  # other pods fare no better
_PASSING = ("unreachable", "timeout", "server")
Moment = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a pod's log; `stamp` is empty for a remark of ours about the pod."""

    pod: str
    stamp: str
    text: str
    moment: Moment = (0, 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which pods and which part of their logs.

    Attributes:
        group: a role or group, None for all.
        pod: one pod by name, None for all.
        container: by name; None is the first one, where KubeRay runs Ray.
        tail: at most so many of the last lines of each pod; None for all.
    """

    group: str | None = None
    pod: str | None = None
    container: str | None = None
    since_s: int | None = None
    tail: int | None = None
    previous: bool = False

    def wants(self, pod: Object) -> bool:
        """Whether this pod was chosen."""
        return self.pod in (None, name_of(pod)) and self.group in (None, group_of(pod))

    def of(self, pods: Sequence[Object]) -> list[Object]:
        """The chosen ones. Raises KubeError (not found), which names what could be chosen."""
        chosen = [p for p in pods if self.wants(p)]
        if not chosen:
            groups, names = sorted({group_of(p) for p in pods}), sorted(map(name_of, pods))
            asked = f"pod {self.pod}" if self.pod else f"pod of role {self.group or 'any'}"
            raise KubeError(
                "not found",
                f"the release has no {asked}",
                f"it has roles {', '.join(groups) or 'none'}; pods {', '.join(names[:12]) or 'none'}",
            )
        return chosen

    def container_of(self, pod: Object) -> str:
        """The container to read. Raises KubeError when the pod has none of this name."""
        names = [
            dig(c, "name", kind=str, default="")
            for part in ("containers", "initContainers", "ephemeralContainers")
            for c in objects(pod, "spec", part)
        ]
        if not names or (self.container and self.container not in names):
            raise KubeError(
                "not found",
                f"pod {name_of(pod)} has no container {self.container or ''}".rstrip(),
                f"it has {', '.join(names) or 'none'}",
            )
        return self.container or names[0]


def split(pod: str, line: str, before: Moment = (0, 0)) -> Line:
    """Cut `TIME TEXT`; a line without a time counts as of the moment before."""
    stamp, _, text = line.partition(" ")
    match = _STAMP.fullmatch(stamp)
    if match is None:
        return Line(pod, "-", line, before)
    second, fraction, zone = match.groups()
    whole = int(datetime.fromisoformat(second + zone).timestamp())
    return Line(pod, stamp, text, (whole, int((fraction or "").ljust(9, "0"))))


def read(kube: Kube, pods: Iterable[Object], choice: Choice) -> Iterator[Line]:
    """What the pods have logged, merged by time; first a remark for each that has no log.

    Raises KubeError when none of them has one.
    """
    found: list[Line] = []
    errors: list[tuple[str, KubeError]] = []
    pods = list(pods)
    for pod in pods:
        name, moment = name_of(pod), (0, 0)
        container = choice.container_of(pod)
        try:
            for line in kube.log(
                name,
                container,
                previous=choice.previous,
                since_s=choice.since_s,
                tail=choice.tail,
            ):
                found.append(split(name, line, moment))
                moment = found[-1].moment
        except KubeError as error:
            if error.fault in _FINAL:
                raise
            errors.append((name, error))
    if errors and len(errors) == len(pods):
        raise errors[0][1]
    yield from (Line(name, "", error.what) for name, error in errors)
    yield from sorted(found, key=lambda line: line.moment)


class Tail:
    """Follows the logs of chosen pods, and of those that come to replace them.

    Args:
        selector, version: of the pods' list, as `kube_status.find_pods` gives them.
        idle_s: a silent stream is opened anew after so long, in case its peer is gone.
        pause_s: between attempts.
    """

    def __init__(
        self,
        kube: Kube,
        choice: Choice,
        selector: str,
        version: str,
        *,
        idle_s: float = 60.0,
        pause_s: float = 1.0,
        window_s: int = 240,
    ) -> None:
        self._kube, self._choice, self._selector = kube, choice, selector
        self._version, self._idle_s, self._pause_s = version, idle_s, pause_s
        self._window_s = window_s
        self._queue: SimpleQueue[Line | KubeError | None] = SimpleQueue()
        self._stop = threading.Event()
        self._known: set[str] = set()
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    def lines(self, pods: Iterable[Object]) -> Iterator[Line]:
        """Lines as they come, without end unless one pod was chosen by name and has ended.

        Raises KubeError when the API server refuses, or does not answer for a while.
        """
        for pod in pods:
            self._choice.container_of(pod)
            self._see(pod)
        self._start(self._watch)
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, KubeError):
                    raise item
                yield item
        finally:
            self._stop.set()

    def _start(self, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except KubeError as error:
                self._queue.put(error)

        threading.Thread(target=guarded, name="logs", daemon=True).start()

    def _see(self, pod: Object, kind: str = "ADDED") -> None:
        if not self._choice.wants(pod):
            return
        uid = dig(pod, "metadata", "uid", kind=str) or name_of(pod)
        phase = dig(pod, "status", "phase", kind=str)
        with self._lock:
            if kind == "DELETED" or phase in ("Succeeded", "Failed"):
                self._ended.add(uid)
            if kind == "DELETED" or uid in self._known:
                return
            self._known.add(uid)
        self._start(lambda: self._pump(pod, uid))

    def _watch(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                events = self._kube.watch_pods(self._selector, self._version, self._window_s)
                for event in events:
                    failures = 0
                    found = event["object"]
                    self._version = dig(
                        found, "metadata", "resourceVersion", kind=str, default=self._version
                    )
                    if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                        self._see(found, event["type"])
            except KubeError as error:
                failures += 1
                if error.fault == "gone" and failures <= 2:
                    pods, self._version = self._kube.pods(self._selector)
                    for pod in pods:
                        self._see(pod)
                elif error.fault not in _PASSING or failures > _PATIENCE:
                    raise
            self._stop.wait(self._pause_s)  # also where a proxy ends every watch at once

    def _pump(self, pod: Object, uid: str) -> None:
        name, container = name_of(pod), self._choice.container_of(pod)
        seen, told, arrived = _Seen(), False, None
        while not self._stop.is_set():
            since, tail = self._choice.since_s, self._choice.tail
            if arrived is not None:
                # Counted from here, so that the clocks of the two sides do not matter.
                since, tail = int(time.monotonic() - arrived) + _MARGIN_S, None
            seen.reopen()
            try:
                for text in self._kube.log(
                    name, container, follow=True, since_s=since, tail=tail, idle_s=self._idle_s
                ):
                    line = split(name, text, seen.last)
                    if seen.is_new(line.moment):
                        arrived = time.monotonic()
                        self._queue.put(line)
            except KubeError as error:
                if error.fault == "not found":
                    self._ended.add(uid)
                elif error.fault in ("unauthorized", "forbidden"):
                    raise
                elif error.fault != "timeout" and not told:  # it has not started, its node is lost
                    self._queue.put(Line(name, "", error.what))
                    told = True
            if uid in self._ended:
                break
            self._stop.wait(self._pause_s)
        if self._choice.pod and uid in self._ended:
            self._queue.put(None)


class _Seen:
    """Which lines of a stream were told before it was opened anew."""

    def __init__(self) -> None:
        self.last: Moment = (0, 0)
        self._count = 0  # lines told of the last moment
        self.reopen()

    def reopen(self) -> None:
        self._edge, self._told, self._again = self.last, self._count, 0

    def is_new(self, moment: Moment) -> bool:
        if moment < self._edge:
            return False
        if moment == self._edge:
            self._again += 1
            if self._again <= self._told:
                return False
        if moment >= self.last:
            self._count = self._count + 1 if moment == self.last else 1
            self.last = moment
        return True
