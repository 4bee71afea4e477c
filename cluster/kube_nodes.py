"""A cluster's nodes: GPUs, drivers, RDMA, and whether the wanted pods fit on them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from whalepod.cluster.kube_demand import GPU, Demand, Pods
from whalepod.cluster.kube_findings import Finding, failure, ok, warning
from whalepod.cluster.kube_objects import (
    Object,
    dig,
    labels_of,
    name_of,
    objects,
    quantity,
    strings,
    version_of,
)

_RDMA = re.compile(r"rdma|roce|infiniband|(^|[/_-])(ib|hca|efa)([_-]|$)")
_LEAST_DRIVER, _CUDA_13_DRIVER = (525, 60), (580,)
_GFD = (
    "install NVIDIA's GPU operator, which labels nodes: helm upgrade --install gpu-operator "
    "nvidia/gpu-operator -n gpu-operator --create-namespace"
)


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the scheduler sees it.

    Attributes:
        allocatable: what pods may request on it, by resource; other pods may hold some of it.
        usable: ready and not cordoned.
        domain: NVLink domain (`nvidia.com/gpu.clique`).
    """

    name: str
    usable: bool
    gpus: int
    installed: int
    product: str
    driver: str
    cuda: str
    memory_mib: int
    domain: str
    rdma: dict[str, int]
    allocatable: dict[str, float]
    labels: dict[str, str]
    taints: tuple[tuple[str, str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """What is of interest, as plain values."""
        found = asdict(self)
        del found["allocatable"], found["labels"]
        found["taints"] = [f"{k}{f'={v}' if v else ''}:{effect}" for k, v, effect in self.taints]
        return found


def node_of(found: Object) -> Node:
    """Read a node. Raises KubeError (malformed)."""
    labels = labels_of(found)
    amounts = {
        key: quantity(value) for key, value in strings(found, "status", "allocatable").items()
    }
    conditions = {c.get("type"): c.get("status") for c in objects(found, "status", "conditions")}
    cordoned = dig(found, "spec", "unschedulable", kind=bool, default=False)
    parts = [labels.get(f"nvidia.com/cuda.driver.{part}", "") for part in ("major", "minor", "rev")]
    taints = tuple(
        (str(t.get("key", "")), str(t.get("value") or ""), str(t.get("effect", "")))
        for t in objects(found, "spec", "taints")
        if t.get("effect") in ("NoSchedule", "NoExecute")
    )
    legacy = [labels.get(f"nvidia.com/cuda.runtime.{part}", "") for part in ("major", "minor")]
    return Node(
        name_of(found),
        conditions.get("Ready") == "True" and not cordoned,
        int(amounts.get(GPU, 0)),
        _whole(labels.get("nvidia.com/gpu.count")),
        labels.get("nvidia.com/gpu.product", ""),
        labels.get("nvidia.com/cuda.driver-version.full") or ".".join(p for p in parts if p),
        labels.get("nvidia.com/cuda.runtime-version.full") or ".".join(p for p in legacy if p),
        _whole(labels.get("nvidia.com/gpu.memory")),
        labels.get("nvidia.com/gpu.clique", ""),
        {key: int(n) for key, n in amounts.items() if _RDMA.search(key) and n >= 1},
        amounts,
        labels,
        taints,
    )


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def gpu_findings(nodes: Sequence[Node], demand: Demand | None) -> Iterator[Finding]:
    """GPUs and drivers, by kind of node, against what is wanted."""
    holders = [n for n in nodes if n.gpus or n.installed]
    groups = Counter((n.gpus, n.product, n.driver, n.cuda, n.domain, n.usable) for n in holders)
    for (gpus, product, driver, cuda, domain, usable), count in sorted(groups.items()):
        shown = f"{count} x {gpus} {product or 'GPU of unknown product'}"
        shown += f", driver {driver or 'unknown'}" + (f" (CUDA {cuda})" if cuda else "")
        shown += f", NVLink domain {domain}" if domain else ""
        yield ok("gpus", shown + ("" if usable else "; not ready or cordoned"))
    total = sum(n.gpus for n in holders if n.usable)
    wanted = demand.gpus if demand else 0
    if total < wanted:
        assert demand is not None
        yield failure(
            "gpus",
            f"{total} GPUs on ready nodes, {demand.source} wants {wanted}",
            "add GPU nodes, or ask for a smaller topology; kubectl get nodes -o "
            "custom-columns=NAME:.metadata.name,GPUS:.status.allocatable.nvidia\\\\.com/gpu",
        )
    elif wanted:
        yield ok("gpus", f"{total} GPUs, {wanted} wanted (what other pods hold is not counted)")
    elif not holders:
        yield warning("gpus", "no node has a GPU: only small models on CPU will run", _GFD)
    for node in holders:
        if node.installed > node.gpus:
            yield warning(
                "gpus",
                f"{node.name}: {node.installed} GPUs installed, {node.gpus} allocatable",
                f"a GPU is sick or the device plugin is down: kubectl describe node {node.name}",
            )
    yield from _driver_findings(holders)


def _driver_findings(holders: Sequence[Node]) -> Iterator[Finding]:
    unknown = [n.name for n in holders if not n.driver]
    if unknown:
        yield warning("drivers", f"no driver label on {_some(unknown)}", _GFD)
    known = defaultdict(list)
    for node in holders:
        if node.driver:
            known[node.driver].append(node.name)
    for driver, names in sorted(known.items()):
        version = version_of(driver) or tuple(map(int, re.findall(r"\d+", driver)[:1]))
        if version < _LEAST_DRIVER:
            yield failure(
                "drivers",
                f"driver {driver} on {_some(names)}: CUDA 12 needs 525.60.13 or newer",
                "update the driver, e.g. kubectl edit clusterpolicies.nvidia.com (driver.version)",
            )
        elif version < _CUDA_13_DRIVER:
            yield warning(
                "drivers",
                f"driver {driver} on {_some(names)} runs images for CUDA 12, not for CUDA 13",
                "use an image built for CUDA 12, or update the driver to 580 or newer",
            )
    if len(known) > 1:
        yield warning(
            "drivers",
            f"nodes differ: {', '.join(sorted(known))}",
            "bring all GPU nodes to one driver; NCCL is tested between equal ones",
        )


def rdma_findings(nodes: Sequence[Node], demand: Demand | None) -> Iterator[Finding]:
    """RDMA devices, against what is wanted and what several GPU nodes should have."""
    have: Counter[str] = Counter()
    for node in nodes:
        have.update(node.rdma)
    for resource, count in sorted(have.items()):
        on = sum(resource in n.rdma for n in nodes)
        yield ok("rdma", f"{resource}: {count} on {on} node{'s' * (on != 1)}")
    asked = {key for p in demand.pods for key in p.needs if _RDMA.search(key)} if demand else set()
    for resource in sorted(asked - set(have)):
        yield failure(
            "rdma",
            f"{demand.source if demand else ''} asks for {resource}; no node offers it",
            "install the RDMA device plugin (NVIDIA network operator), or correct the resource's "
            "name in the values",
        )
    several = sum(n.gpus > 0 for n in nodes) > 1
    if several and not have:
        yield warning(
            "rdma",
            "several GPU nodes and no RDMA resource: NCCL will use TCP between them",
            "install the RDMA device plugin: helm upgrade --install network-operator "
            "nvidia/network-operator -n network-operator --create-namespace",
        )


def fit_findings(nodes: Sequence[Node], demand: Demand) -> Iterator[Finding]:
    """Whether every wanted pod finds a node, one after the other, largest first."""
    free = {n.name: dict(n.allocatable) for n in nodes}
    for node in nodes:
        free[node.name].setdefault("pods", 110.0)
    order = sorted(demand.pods, key=lambda p: -p.needs.get(GPU, 0.0))
    lost = False
    for pods in order:
        placed = sum(_place(pods, nodes, free) for _ in range(pods.count))
        if placed < pods.count:
            lost = True
            reasons = Counter(_obstacle(pods, n, n.allocatable) for n in nodes)
            told = ", ".join(
                f"{count} x {reason or 'taken by the other pods of this release'}"
                for reason, count in reasons.most_common(4)
            )
            yield failure(
                "fit",
                f"group {pods.group}: {placed} of {pods.count} pods find a node; each needs "
                f"{_shown(pods)}; nodes: {told or 'none'}",
                "add such nodes, or change resources, nodeSelector or tolerations of the group",
            )
    if not lost:
        count = sum(p.count for p in demand.pods)
        yield ok("fit", f"all {count} pods find a node (what other pods hold is not counted)")


def _place(pods: Pods, nodes: Sequence[Node], free: dict[str, dict[str, float]]) -> bool:
    fitting = [n for n in nodes if not _obstacle(pods, n, free[n.name])]
    if not fitting:
        return False
    best = min(fitting, key=lambda n: free[n.name].get(GPU, 0.0))
    room = free[best.name]
    for key, amount in {**pods.needs, "pods": 1.0}.items():
        room[key] = room.get(key, 0.0) - amount
    return True


def _obstacle(pods: Pods, node: Node, room: dict[str, float]) -> str:
    if not node.usable:
        return "not ready or cordoned"
    for key, value in pods.selector.items():
        if node.labels.get(key) != value:
            return f"without label {key}={value}"
    for taint in node.taints:
        if not any(_tolerates(t, taint) for t in pods.tolerations):
            return f"with taint {taint[0]}:{taint[2]}"
    for key, amount in pods.needs.items():
        if room.get(key, 0.0) < amount:
            return f"short of {key}"
    return "" if room.get("pods", 1.0) >= 1 else "full"


def _tolerates(toleration: Object, taint: tuple[str, str, str]) -> bool:
    key, value, effect = taint
    if toleration.get("effect") not in (None, "", effect):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", key)
    return toleration.get("key") == key and (toleration.get("value") or "") == value


def _shown(pods: Pods) -> str:
    names = {"memory": 2**30, "ephemeral-storage": 2**30}
    parts = [
        f"{amount / names[key]:.0f}Gi {key}" if key in names else f"{amount:g} {key}"
        for key, amount in pods.needs.items()
    ]
    return ", ".join(parts) or "nothing"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
