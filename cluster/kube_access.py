"""What whalepod may do on a Kubernetes cluster: every permission its commands use, in one place.

`cluster/kube.py` names one of these at every call, the chart's Role and ClusterRole are made from
them (`python -m whalepod.cluster.kube_access > helm/whalepod/files/rbac.yaml`), and
`whalepod k8s preflight` asks for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Access:
    """One verb on one resource.

    Attributes:
        resource: plural, with its subresource: `pods`, `pods/log`.
        namespaced: whether a Role in the release's namespace grants it.
        names: the only objects it is about; empty for all.
        path: instead of a resource, a path of the server's own (`/version/`).
    """

    verb: str
    resource: str = ""
    group: str = ""
    namespaced: bool = True
    names: tuple[str, ...] = ()
    path: str = ""

    def __str__(self) -> str:
        """As `kubectl auth can-i` is asked."""
        what = self.path or self.resource + (f".{self.group}" if self.group else "")
        return f"{self.verb} {what}"


GET_NAMESPACE = Access("get", "namespaces")
LIST_PODS = Access("list", "pods")
WATCH_PODS = Access("watch", "pods")
GET_LOG = Access("get", "pods/log")
GET_PROXY = Access("get", "services/proxy")
LIST_CLAIMS = Access("list", "persistentvolumeclaims")
LIST_QUOTAS = Access("list", "resourcequotas")
LIST_LIMITS = Access("list", "limitranges")
LIST_SERVICES = Access("list", "rayservices", "ray.io")
LIST_CLUSTERS = Access("list", "rayclusters", "ray.io")

CRDS = ("rayclusters.ray.io", "rayservices.ray.io")
LIST_NODES = Access("list", "nodes", namespaced=False)
LIST_DEPLOYMENTS = Access("list", "deployments", "apps", namespaced=False)
LIST_CLASSES = Access("list", "storageclasses", "storage.k8s.io", namespaced=False)
GET_CRD = Access(
    "get", "customresourcedefinitions", "apiextensions.k8s.io", namespaced=False, names=CRDS
)
ASK_ACCESS = Access(
    "create", "selfsubjectaccessreviews", "authorization.k8s.io", namespaced=False
)  # every authenticated user has this and the next ones, unless an administrator took them away
GET_VERSION = Access("get", namespaced=False, path="/version/")
GET_CORE = Access("get", namespaced=False, path="/api/*")
GET_GROUPS = Access("get", namespaced=False, path="/apis/*")

COMMANDS: tuple[Access, ...] = (
    *(GET_NAMESPACE, LIST_PODS, WATCH_PODS, GET_LOG, GET_PROXY, LIST_CLAIMS, LIST_QUOTAS),
    *(LIST_LIMITS, LIST_SERVICES, LIST_CLUSTERS, LIST_NODES, LIST_DEPLOYMENTS, LIST_CLASSES),
    *(GET_CRD, ASK_ACCESS, GET_VERSION, GET_CORE, GET_GROUPS),
)

# What `helm install`, `upgrade`, `rollback` and `uninstall` do: to the release's records, and to
# every object of the chart.
RECORDS = tuple(Access(verb, "secrets") for verb in ("get", "list", "create", "update", "delete"))
HELM_VERBS = ("get", "create", "patch", "delete")
CHART: tuple[tuple[str, str, bool], ...] = (  # group, resource, namespaced; with its defaults
    ("", "configmaps", True),
    ("", "persistentvolumeclaims", True),
    ("", "pods", True),  # helm test
    ("", "services", True),
    ("", "serviceaccounts", True),
    ("batch", "jobs", True),
    ("networking.k8s.io", "networkpolicies", True),
    ("policy", "poddisruptionbudgets", True),
    ("ray.io", "rayservices", True),
    ("rbac.authorization.k8s.io", "roles", True),
)


def install(resources: Iterable[tuple[str, str, bool]] = CHART) -> tuple[Access, ...]:
    """What whoever installs needs, for objects of these (group, resource, namespaced)."""
    wanted = [
        Access(verb, resource, group, namespaced)
        for (group, resource, namespaced), verb in itertools.product(
            sorted(set(resources)), HELM_VERBS
        )
    ]
    return tuple(dict.fromkeys((*RECORDS, *wanted)))


def rules(accesses: Iterable[Access]) -> list[dict[str, Any]]:
    """RBAC rules that grant exactly these."""
    merged: dict[tuple[str, str, tuple[str, ...], str], list[str]] = {}
    for access in accesses:
        key = (access.group, access.resource, access.names, access.path)
        merged.setdefault(key, []).append(access.verb)
    found = []
    for (group, resource, names, path), verbs in merged.items():
        if path:
            found.append({"nonResourceURLs": [path], "verbs": verbs})
            continue
        rule: dict[str, Any] = {"apiGroups": [group], "resources": [resource], "verbs": verbs}
        if names:
            rule["resourceNames"] = list(names)
        found.append(rule)
    return found


def rbac() -> str:
    """The rules of the commands as YAML: `role` in the release's namespace, `clusterRole`."""
    head = (
        "# What `whalepod k8s preflight|status|logs` call, and nothing else. Written by\n"
        "# `python -m whalepod.cluster.kube_access`; a test keeps it equal to the code.\n"
    )
    told = {
        "role": rules(a for a in COMMANDS if a.namespaced),
        "clusterRole": rules(a for a in COMMANDS if not a.namespaced),
    }
    return head + yaml.safe_dump(told, sort_keys=False)


if __name__ == "__main__":
    print(rbac(), end="")
