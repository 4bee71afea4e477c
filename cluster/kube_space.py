"""Storage and bounds of a namespace, against what a deployment wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from whalepod.cluster.kube_demand import GPU, Amounts, Demand
from whalepod.cluster.kube_findings import Finding, failure, ok
from whalepod.cluster.kube_objects import (
    Object,
    dig,
    labels_of,
    name_of,
    objects,
    quantity,
    strings,
)

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_SHARED = {"ReadWriteMany", "ReadOnlyMany"}


def storage_findings(
    classes: Sequence[Object], claims: Sequence[Object], demand: Demand | None
) -> Iterator[Finding]:
    """Storage classes, and the claims that a deployment makes or expects."""
    names = {name_of(c) for c in classes}
    default = [
        name_of(c)
        for c in classes
        if strings(c, "metadata", "annotations").get(_DEFAULT_CLASS) == "true"
    ]
    told = ", ".join(f"{n} (default)" if n in default else n for n in sorted(names))
    yield ok("storage", f"storage classes: {told or 'none'}")
    if demand is None:
        return
    there = {name_of(c): c for c in claims}
    for name, claim in demand.claims.items():
        wanted = dig(claim, "spec", "storageClassName", kind=str)
        if name in there or wanted == "":  # an empty class asks for a volume made by hand
            continue
        if wanted and wanted not in names:
            yield failure(
                "storage",
                f"claim {name} wants storage class {wanted}; there are {', '.join(sorted(names)) or 'none'}",
                "name one of them in the values (`kubectl get storageclass`)",
            )
        elif not wanted and not default:
            yield failure(
                "storage",
                f"claim {name} names no storage class and the cluster has no default one",
                "name a class in the values, or make one the default: kubectl annotate "
                f"storageclass NAME {_DEFAULT_CLASS}=true",
            )
    for name in sorted({n for p in demand.pods for n in p.claims}):
        yield from _claim_findings(name, there.get(name) or demand.claims.get(name), demand)


def _claim_findings(name: str, claim: Object | None, demand: Demand) -> Iterator[Finding]:
    if claim is None:
        yield failure(
            "storage",
            f"claim {name} is mounted and does not exist",
            "create it, or let the chart create one (`kubectl get pvc`)",
        )
        return
    users = sum(p.count for p in demand.pods if name in p.claims)
    modes = set(map(str, dig(claim, "spec", "accessModes", kind=list, default=[])))
    phase = dig(claim, "status", "phase", kind=str, default="")
    if phase == "Lost":
        yield failure(
            "storage", f"claim {name} has lost its volume", f"kubectl describe pvc {name}"
        )
    elif users > 1 and not modes & _SHARED:
        yield failure(
            "storage",
            f"claim {name} ({', '.join(sorted(modes)) or 'no access mode'}) is mounted by {users} "
            "pods, which may be on several nodes",
            "use a volume with ReadWriteMany or ReadOnlyMany (NFS, Lustre, a file store)",
        )
    else:
        yield ok("storage", f"claim {name}: {phase or 'to be made'}, {users} pods mount it")


def quota_findings(quotas: Sequence[Object], demand: Demand | None) -> Iterator[Finding]:
    """Whether the namespace's quotas leave room."""
    if not quotas:
        yield ok("quotas", "no quota in the namespace")
    for quota in quotas:
        hard, used = strings(quota, "status", "hard"), strings(quota, "status", "used")
        hard = hard or strings(quota, "spec", "hard")
        lacking = []
        for key, bound in hard.items():
            left = quantity(bound) - quantity(used.get(key, "0"))
            wanted = _wanted(key, demand)
            if wanted > left:
                lacking.append(f"{key}: {left:g} of {bound} left, {wanted:g} wanted")
        name = name_of(quota)
        if lacking:
            yield failure(
                "quotas",
                f"quota {name}: {'; '.join(lacking)}",
                f"have it raised (kubectl describe quota {name}), or ask for less",
            )
        else:
            yield ok("quotas", f"quota {name} leaves room")


def _wanted(key: str, demand: Demand | None) -> float:
    if demand is None:
        return 0.0
    if key == f"requests.{GPU}" and not demand.pods:
        return float(demand.gpus)
    if key in ("pods", "count/pods"):
        return float(sum(p.count for p in demand.pods))
    if key.startswith("limits."):
        resource = key.removeprefix("limits.")
        return sum(p.count * p.limits.get(resource, 0.0) for p in demand.pods)
    return demand.total(key.removeprefix("requests."))


def limit_findings(ranges: Sequence[Object], demand: Demand | None) -> Iterator[Finding]:
    """Whether the namespace's limit ranges allow pods and containers of the wanted size."""
    count = 0
    for found in ranges:
        for limit in objects(found, "spec", "limits"):
            highest = {key: quantity(value) for key, value in strings(limit, "max").items()}
            for group, what, amounts in _sizes(str(limit.get("type")), demand):
                for key, bound in highest.items():
                    if amounts.get(key, 0.0) > bound:
                        count += 1
                        yield failure(
                            "limits",
                            f"limit range {name_of(found)}: a {what} may have {bound:g} {key}, "
                            f"group {group} wants {amounts[key]:g}",
                            "have the limit range changed "
                            f"(kubectl describe limitrange {name_of(found)}), or ask for less",
                        )
    if not count:
        names = ", ".join(map(name_of, ranges))
        yield ok("limits", f"limit ranges allow it: {names}" if names else "no limit range")


def _sizes(kind: str, demand: Demand | None) -> Iterator[tuple[str, str, Amounts]]:
    for pods in demand.pods if demand else ():
        if kind == "Pod":
            yield pods.group, "pod", pods.needs
        elif kind == "Container":
            for container in pods.containers:
                yield pods.group, "container", container


# Capabilities that pods may add at each pod security level (kubernetes.io/docs/concepts/security).
_ALLOWED = {
    "restricted": {"NET_BIND_SERVICE"},
    "baseline": {
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "SETFCAP"),
        *("NET_BIND_SERVICE", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    },
}


def security_findings(namespace: Object, demand: Demand | None) -> Iterator[Finding]:
    """Whether the namespace's pod security level allows the wanted capabilities."""
    level = labels_of(namespace).get("pod-security.kubernetes.io/enforce", "")
    added = {c for p in demand.pods for c in p.capabilities} if demand else set()
    refused = sorted(added - _ALLOWED[level]) if level in _ALLOWED else []
    if refused:
        name = name_of(namespace)
        yield failure(
            "namespace",
            f"pods add {', '.join(refused)}, which pod security level {level} of namespace {name} "
            "refuses",
            f"kubectl label namespace {name} pod-security.kubernetes.io/enforce=privileged "
            "--overwrite, or switch RDMA off in the values",
        )
