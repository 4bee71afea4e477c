"""What a deployment wants of a cluster: from a configuration, or from the chart as rendered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from whalepod.cluster.kube_objects import (
    KubeError,
    Object,
    dig,
    name_of,
    objects,
    quantity,
    strings,
)
from whalepod.cluster.topology import wanted
from whalepod.config import Config
from whalepod.errors import ConfigError

GPU = "nvidia.com/gpu"
Amounts = dict[str, float]


@dataclass(frozen=True, slots=True)
class Pods:
    """Equal pods of one group.

    Attributes:
        needs: requests of one pod, by resource.
        limits: limits of one pod, by resource.
        containers: the most that each container may use (limits, else requests), by resource.
        claims: persistent volume claims that every one of them mounts.
        capabilities: what the containers add to their Linux capabilities.
    """

    group: str
    count: int
    needs: Amounts = field(default_factory=dict)
    limits: Amounts = field(default_factory=dict)
    containers: tuple[Amounts, ...] = ()
    selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[Object, ...] = ()
    claims: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """Everything a deployment wants.

    Attributes:
        source: where this was read, for messages.
        gpus: all together.
        kinds: (apiVersion, kind) of the objects that will be made.
        claims: claims that will be made, by name, each as its object.
    """

    source: str
    gpus: int
    pods: tuple[Pods, ...] = ()
    kinds: frozenset[tuple[str, str]] = frozenset()
    claims: dict[str, Object] = field(default_factory=dict)

    def total(self, resource: str) -> float:
        """How much of a resource all pods request."""
        return sum(p.count * p.needs.get(resource, 0.0) for p in self.pods)


def of_config(config: Config, source: str) -> Demand:
    """What the members of a configuration reserve; it does not say how they share pods."""
    members = wanted(config.topology)
    return Demand(source, math.ceil(len(members) * config.cluster.gpus_per_member))


def of_manifests(text: str, source: str) -> Demand:
    """What rendered manifests (`helm template`) want.

    Raises ConfigError when the text is no YAML, or holds no RayService and no RayCluster.
    """
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from None
    wrong = next((d for d in documents if not isinstance(d, dict)), None)
    if wrong is not None:
        raise ConfigError(f"{source} holds {wrong!r:.60}; expected manifests as `helm template`")
    try:
        pods = tuple(p for d in documents for p in _pods(d))
        claims = {name_of(d): d for d in documents if d.get("kind") == "PersistentVolumeClaim"}
    except KubeError as error:
        raise ConfigError(f"{source}: {error.what}") from None
    kinds = frozenset((str(d.get("apiVersion", "")), str(d.get("kind", ""))) for d in documents)
    if not any(kind in ("RayService", "RayCluster") for _, kind in kinds):
        raise ConfigError(
            f"{source} holds no RayService and no RayCluster; expected the output of "
            "`helm template RELEASE helm/whalepod --values FILE`"
        )
    found = Demand(source, 0, pods, kinds, claims)
    return Demand(source, round(found.total(GPU)), pods, kinds, claims)


def _pods(document: Object) -> Iterator[Pods]:
    kind = document.get("kind")
    if kind == "Job":
        spec = dig(document, "spec", kind=dict, default={})
        yield _group(f"job {name_of(document)}", spec, dig(spec, "parallelism", kind=int) or 1)
        return
    path = {"RayService": ("spec", "rayClusterConfig"), "RayCluster": ("spec",)}.get(str(kind))
    if path is None:
        return
    cluster = dig(document, *path, kind=dict, default={})
    yield _group("head", dig(cluster, "headGroupSpec", kind=dict, default={}), 1)
    for group in objects(cluster, "workerGroupSpecs"):
        if dig(group, "suspend", kind=bool):
            continue
        replicas = max(dig(group, n, kind=int, default=0) for n in ("replicas", "minReplicas"))
        hosts = dig(group, "numOfHosts", kind=int, default=1)
        yield _group(dig(group, "groupName", kind=str) or "?", group, replicas * hosts)


def _group(name: str, holder: Object, count: int) -> Pods:
    spec = dig(holder, "template", "spec", kind=dict, default={})
    needs, bounds = Counter[str](), Counter[str]()
    containers: list[Amounts] = []
    capabilities: set[str] = set()
    for container in objects(spec, "containers"):
        limits = _amounts(strings(container, "resources", "limits"))
        requests = {**limits, **_amounts(strings(container, "resources", "requests"))}
        needs.update(requests)
        bounds.update(limits)
        containers.append({**requests, **limits})
        added = dig(container, "securityContext", "capabilities", "add", kind=list, default=[])
        capabilities.update(map(str, added))
    claims = (
        dig(v, "persistentVolumeClaim", "claimName", kind=str) for v in objects(spec, "volumes")
    )
    return Pods(
        name,
        count,
        dict(needs),
        dict(bounds),
        tuple(containers),
        strings(spec, "nodeSelector"),
        tuple(objects(spec, "tolerations")),
        tuple(c for c in claims if c),
        tuple(sorted(capabilities)),
    )


def _amounts(told: dict[str, str]) -> Amounts:
    return {key: quantity(value) for key, value in told.items()}
