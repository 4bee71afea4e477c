"""The objects of a release, its pods, and which members of the epoch live in which pod."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_objects import KubeError, Object, dig, labels_of, name_of, objects

INSTANCE, CLUSTER = "app.kubernetes.io/instance", "ray.io/cluster"
GROUP, NODE_TYPE = "ray.io/group", "ray.io/node-type"
_OWNER = "ray.io/originated-from-cr-name"


@dataclass(frozen=True, slots=True)
class Release:
    """A release's RayServices and RayClusters, as objects."""

    name: str
    services: tuple[Object, ...]
    clusters: tuple[Object, ...]

    @property
    def serve_name(self) -> str:
        """Of which object KubeRay names the service in front of the ingress."""
        return name_of((self.services or self.clusters)[0])

    def selectors(self) -> list[str]:
        """What its pods can be selected by: the chart's label, else KubeRay's own."""
        names = {name_of(c) for c in self.clusters}
        for service in self.services:
            for state in ("activeServiceStatus", "pendingServiceStatus"):
                name = dig(service, "status", state, "rayClusterName", kind=str)
                names |= {name} if name else set()
        mine = [f"{INSTANCE}={self.name}"]
        return mine + ([f"{CLUSTER} in ({', '.join(sorted(names))})"] if names else [])


def find_release(kube: Kube, name: str) -> Release:
    """The release of this name: by the chart's label, or by the name of a Ray object.

    Raises KubeError; `not found` names the releases there are.
    """
    services, clusters = kube.ray("rayservices"), kube.ray("rayclusters")
    mine = [s for s in services if name in _names(s)]
    owners = {name_of(s) for s in mine}
    own = [c for c in clusters if name in _names(c) or labels_of(c).get(_OWNER) in owners]
    if not mine and not own:
        others = sorted({labels_of(o).get(INSTANCE, name_of(o)) for o in (*services, *clusters)})
        raise KubeError(
            "not found",
            f"no RayService and no RayCluster of a release {name} in namespace {kube.namespace}",
            f"there {'are ' + ', '.join(others) if others else 'is no other'}; --namespace looks "
            "elsewhere (`helm list --all-namespaces`)",
        )
    return Release(name, tuple(mine), tuple(own))


def _names(found: Object) -> set[str]:
    return {name_of(found), labels_of(found).get(INSTANCE, "")}


def find_pods(kube: Kube, release: Release) -> tuple[list[Object], str, str]:
    """The release's pods, the resource version to watch from, and their selector."""
    pods: list[Object] = []
    version = selector = ""
    for selector in release.selectors():
        pods, version = kube.pods(selector)
        if any(CLUSTER in labels_of(p) for p in pods):
            break
    return pods, version, selector


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod, and the members in it.

    Attributes:
        group: KubeRay's group, `head`, or `-` for a pod outside Ray.
        state: phase, or what kubectl shows instead of it (`CrashLoopBackOff`, `Terminating`).
        why: what it waits for, where it waits.
        last: how its last ended container ended; None where none has.
    """

    name: str
    group: str
    cluster: str
    node: str
    ip: str
    state: str
    why: str
    ready: str
    restarts: int
    started: str
    last: dict[str, Any] | None
    members: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def group_of(pod: Object) -> str:
    """The group of a pod, `head` for the head's, `-` for none."""
    labels = labels_of(pod)
    return "head" if labels.get(NODE_TYPE) == "head" else labels.get(GROUP, "-")


def pod_state(pod: Object) -> PodState:
    """Read a pod. Raises KubeError (malformed)."""
    states = objects(pod, "status", "initContainerStatuses") + objects(
        pod, "status", "containerStatuses"
    )
    running = objects(pod, "status", "containerStatuses")
    wanted = len(objects(pod, "spec", "containers")) or len(running)
    state, why = _state(pod, states)
    return PodState(
        name_of(pod),
        group_of(pod),
        labels_of(pod).get(CLUSTER, "-"),
        dig(pod, "spec", "nodeName", kind=str, default="-"),
        dig(pod, "status", "podIP", kind=str, default="-"),
        state,
        why,
        f"{sum(bool(dig(s, 'ready', kind=bool)) for s in running)}/{wanted}",
        sum(dig(s, "restartCount", kind=int, default=0) for s in states),
        dig(pod, "metadata", "creationTimestamp", kind=str, default=""),
        _last_end(states),
    )


def _state(pod: Object, states: Sequence[Object]) -> tuple[str, str]:
    phase = dig(pod, "status", "phase", kind=str, default="Unknown")
    if dig(pod, "metadata", "deletionTimestamp", kind=str):
        return "Terminating", ""
    for status in states:
        reason = dig(status, "state", "waiting", "reason", kind=str)
        if reason and reason not in ("ContainerCreating", "PodInitializing"):
            return reason, dig(status, "state", "waiting", "message", kind=str, default="")
    if reason := dig(pod, "status", "reason", kind=str):  # Evicted, NodeLost
        return reason, dig(pod, "status", "message", kind=str, default="")
    for condition in objects(pod, "status", "conditions"):
        unplaced = condition.get("type") == "PodScheduled" and condition.get("status") == "False"
        if phase == "Pending" and unplaced:
            return "Unschedulable", dig(condition, "message", kind=str, default="")
    return phase, ""


def _last_end(states: Iterable[Object]) -> dict[str, Any] | None:
    ends = []
    for status in states:
        for when in ("state", "lastState"):
            end = dig(status, when, "terminated", kind=dict)
            if end and (end.get("exitCode") or when == "lastState"):
                ends.append((status.get("name"), end))
    if not ends:
        return None
    container, end = max(ends, key=lambda e: str(e[1].get("finishedAt") or ""))
    return {
        "container": container,
        "reason": dig(end, "reason", kind=str, default="Error"),
        "exit_code": dig(end, "exitCode", kind=int, default=0),
        "finished": dig(end, "finishedAt", kind=str),
        "message": dig(end, "message", kind=str, default=""),
    }


_MEMBER = {"name": str, "pool": str, "host": str, "state": str, "roles": list, "experts": int}


def checked_report(found: Any, source: str) -> dict[str, Any]:
    """The cluster's own report (`GET /status`), if it is one. Raises KubeError (malformed)."""
    members = found.get("members") if isinstance(found, Mapping) else None
    whole = (
        isinstance(members, list)
        and type(found.get("epoch")) is int
        and type(found.get("ready")) is bool
        and all(isinstance(m, Mapping) for m in members)
        and all(isinstance(m.get(key), kind) for m in members for key, kind in _MEMBER.items())
    )
    if not whole:
        raise KubeError(
            "malformed",
            f"{source} answers {str(found)[:120]!r}, which is no report of whalepod",
            "name the ingress with --address or --service",
        )
    return dict(found)


def join(
    pods: Iterable[Object], report: Mapping[str, Any] | None
) -> tuple[list[PodState], list[dict[str, Any]]]:
    """Pods with the members whose address is theirs, and the members that no pod holds."""
    states = sorted(
        map(pod_state, pods), key=lambda s: (s.cluster, s.group != "head", s.group, s.name)
    )
    # An ended pod keeps its address in its status while a new one may already have it.
    by_address = {s.ip: s for s in sorted(states, key=lambda s: s.state == "Running") if s.ip}
    lost: list[dict[str, Any]] = []
    for member in report["members"] if report else ():
        home = by_address.get(member["host"])
        (home.members if home else lost).append(dict(member))
    return states, lost


def ray_state(found: Object) -> dict[str, Any]:
    """What KubeRay says of a RayService or RayCluster, as plain values."""
    status = dig(found, "status", kind=dict, default={})
    active = dig(status, "activeServiceStatus", kind=dict, default={})
    pending = dig(status, "pendingServiceStatus", kind=dict, default={})
    applications = dig(active, "applicationStatuses", kind=dict, default={}) or dig(
        pending, "applicationStatuses", kind=dict, default={}
    )
    told = {
        "kind": dig(found, "kind", kind=str, default="-"),
        "name": name_of(found),
        "state": dig(status, "serviceStatus", kind=str) or dig(status, "state", kind=str) or "-",
        "reason": dig(status, "reason", kind=str, default=""),
        "active": dig(active, "rayClusterName", kind=str),
        "pending": dig(pending, "rayClusterName", kind=str),
        "endpoints": dig(status, "numServeEndpoints", kind=int),
        "workers_ready": dig(status, "readyWorkerReplicas", kind=int),
        "workers_wanted": dig(status, "desiredWorkerReplicas", kind=int),
        "conditions": [
            {k: str(c.get(k) or "") for k in ("type", "status", "reason", "message")}
            for c in objects(status, "conditions")
        ],
        "applications": {name: _application(applications, name) for name in applications},
    }
    return {key: value for key, value in told.items() if value not in (None, {}, "")}


def _application(applications: Object, name: str) -> dict[str, Any]:
    deployments = dig(applications, name, "serveDeploymentStatuses", kind=dict, default={})
    return {
        "status": dig(applications, name, "status", kind=str, default="-"),
        "message": dig(applications, name, "message", kind=str, default=""),
        "deployments": {
            d: {
                "status": dig(deployments, d, "status", kind=str, default="-"),
                "message": dig(deployments, d, "message", kind=str, default=""),
            }
            for d in deployments
        },
    }
