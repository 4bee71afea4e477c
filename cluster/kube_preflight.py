"""Whether a cluster can run whalepod: every look of `whalepod k8s preflight`, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from whalepod.cluster import kube_nodes, kube_space
from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_access import CHART, COMMANDS, CRDS, Access, install
from whalepod.cluster.kube_demand import Demand
from whalepod.cluster.kube_findings import Finding, failure, looked, ok, warning
from whalepod.cluster.kube_objects import KubeError, Object, dig, name_of, objects, version_of

LEAST_KUBERNETES, LEAST_KUBERAY, KUBERAY = (1, 29), (1, 6), "1.7.0"
_OPERATOR = "app.kubernetes.io/name in (kuberay-operator, kuberay)"
_INSTALL = (
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm/ && helm upgrade --install "
    f"kuberay-operator kuberay/kuberay-operator --version {KUBERAY} -n kuberay --create-namespace"
)
_RENEW = (  # Helm never updates a chart's CRDs
    f"helm show crds kuberay/kuberay-operator --version {KUBERAY} | kubectl apply --server-side "
    "--force-conflicts -f -"
)
# What the chart sets in `spec` of a RayCluster (and below `rayClusterConfig` of a RayService); an
# older definition would drop it without a word.
_FIELDS = ("authOptions", "gcsFaultToleranceOptions")
_GROUP_FIELDS = ("resources", "labels", "numOfHosts")


@dataclass(frozen=True, slots=True)
class Preflight:
    """The outcome."""

    server: str
    namespace: str
    findings: tuple[Finding, ...]
    nodes: tuple[kube_nodes.Node, ...]

    @property
    def good(self) -> bool:
        """Whether nothing stands in the way of a deployment."""
        return all(f.status != "failure" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "ok": self.good,
            "server": self.server,
            "namespace": self.namespace,
            "findings": [f.as_dict() for f in self.findings],
            "nodes": [n.as_dict() for n in self.nodes],
        }


def preflight(
    kube: Kube, demand: Demand | None = None, operator_namespace: str | None = None
) -> Preflight:
    """Look at everything. Raises KubeError when the API server cannot be asked at all.

    Args:
        demand: what the deployment wants; None looks at what there is.
        operator_namespace: where to look for KubeRay's operator; None looks everywhere.
    """
    nodes: list[kube_nodes.Node] = []
    looks = {
        "kubernetes": lambda: _server(kube),
        "namespace": lambda: _namespace(kube, demand),
        "kuberay": lambda: (f for name in CRDS for f in _definition(kube, name)),
        "operator": lambda: _operator(kube, operator_namespace),
        "nodes": lambda: _nodes(kube, demand, nodes),
        "storage": lambda: kube_space.storage_findings(
            kube.storage_classes(), kube.claims(), demand
        ),
        "quotas": lambda: kube_space.quota_findings(kube.quotas(), demand),
        "limits": lambda: kube_space.limit_findings(kube.limit_ranges(), demand),
        "access": lambda: _access(kube, demand),
    }
    findings = [f for check, look in looks.items() for f in looked(check, look)]
    return Preflight(kube.server, kube.namespace, tuple(findings), tuple(nodes))


def _server(kube: Kube) -> Iterator[Finding]:
    told = kube.version()
    version = version_of(told)
    least = ".".join(map(str, LEAST_KUBERNETES))
    if version is None or version < LEAST_KUBERNETES:
        yield failure(
            "kubernetes", f"version {told}; {least} or newer is needed", "upgrade the cluster"
        )
    else:
        yield ok("kubernetes", f"version {told} at {kube.server}")


def _namespace(kube: Kube, demand: Demand | None) -> Iterator[Finding]:
    found = kube.namespace_object()
    if found is None:
        yield failure(
            "namespace",
            f"namespace {kube.namespace} does not exist",
            f"kubectl create namespace {kube.namespace}, or name another one with --namespace",
        )
        return
    if dig(found, "status", "phase", kind=str) == "Terminating":
        yield failure(
            "namespace",
            f"namespace {kube.namespace} is being deleted",
            "wait until it is gone and create it anew, or name another one with --namespace",
        )
        return
    yield ok("namespace", kube.namespace)
    yield from kube_space.security_findings(found, demand)


def _definition(kube: Kube, name: str) -> Iterator[Finding]:
    kind = {"rayclusters.ray.io": "RayCluster", "rayservices.ray.io": "RayService"}[name]
    try:
        found = kube.crd(name)
    except KubeError as error:
        if error.fault != "forbidden":
            raise
        if kind in (kube.kinds("ray.io/v1") or {}):  # every user may ask what is served
            yield ok("kuberay", f"{name} is served as v1 (its fields could not be looked at)")
        else:
            yield failure("kuberay", f"{kind} of ray.io/v1 is not served", _INSTALL)
        return
    if found is None:
        yield failure("kuberay", f"{name} is not installed", _INSTALL)
        return
    versions = objects(found, "spec", "versions")
    served = [name_ for v in versions if v.get("served") and (name_ := dig(v, "name", kind=str))]
    states = {c.get("type"): c.get("status") for c in objects(found, "status", "conditions")}
    schema = next((v for v in versions if v.get("name") == "v1" and v.get("served")), None)
    if schema is None or states.get("Established") != "True":
        why = "is not established" if schema else f"serves {', '.join(served) or 'nothing'}, not v1"
        yield failure("kuberay", f"{name} {why}", _RENEW)
        return
    lacking = _lacking(schema, kind)
    if lacking:
        yield failure(
            "kuberay", f"{name} knows no {', '.join(lacking)}: it is older than KubeRay 1.6", _RENEW
        )
    else:
        yield ok("kuberay", f"{name} serves {', '.join(served)}")


def _lacking(version: Object, kind: str) -> list[str]:
    path = ["schema", "openAPIV3Schema", "properties", "spec", "properties"]
    if kind == "RayService":
        path += ["rayClusterConfig", "properties"]
    known = dig(version, *path, kind=dict, default={})
    group = ("workerGroupSpecs", "items", "properties")
    in_group = dig(known, *group, kind=dict, default={})
    return [f for f in _FIELDS if f not in known] + [
        f"workerGroupSpecs.{f}" for f in _GROUP_FIELDS if f not in in_group
    ]


def _operator(kube: Kube, namespace: str | None) -> Iterator[Finding]:
    found = kube.deployments(_OPERATOR, namespace)
    if not found:
        place = f"namespace {namespace}" if namespace else "any namespace"
        yield failure("operator", f"no deployment of KubeRay's operator in {place}", _INSTALL)
    for deployment in found:
        yield from _one_operator(kube, deployment)


def _one_operator(kube: Kube, deployment: Object) -> Iterator[Finding]:
    space = dig(deployment, "metadata", "namespace", kind=str, default="?")
    shown = f"{name_of(deployment)} in {space}"
    containers = objects(deployment, "spec", "template", "spec", "containers")
    images = [dig(c, "image", kind=str, default="") for c in containers]
    tags = [i.rpartition(":")[2] for i in images if "@" not in i]
    version = next((v for t in tags if (v := version_of(t))), None)
    if version is None:
        yield warning(
            "operator",
            f"{shown}: version unknown (image {', '.join(images) or 'none'})",
            f"make sure that it is KubeRay {'.'.join(map(str, LEAST_KUBERAY))} or newer",
        )
    elif version < LEAST_KUBERAY:
        told = ".".join(map(str, version))
        yield failure("operator", f"{shown} is KubeRay {told}; 1.6 or newer is needed", _INSTALL)
    else:
        yield ok("operator", f"{shown}: KubeRay {'.'.join(map(str, version))}")
    if dig(deployment, "status", "availableReplicas", kind=int, default=0) < 1:
        yield failure(
            "operator",
            f"{shown} has no available replica",
            f"kubectl -n {space} describe deployment {name_of(deployment)}",
        )
    watched = _watched(containers)
    if watched and kube.namespace not in watched:
        yield failure(
            "operator",
            f"{shown} watches only {', '.join(watched)}, not {kube.namespace}",
            "add the namespace to the operator chart's value watchNamespace, or install there",
        )


def _watched(containers: Sequence[Object]) -> list[str]:
    words = [
        str(word)
        for container in containers
        for key in ("command", "args")
        for word in dig(container, key, kind=list, default=[])
    ]
    found = re.search(r"--?watch-namespace[= ](\S+)", " ".join(words))
    return [n for n in found[1].strip("\"'").split(",") if n] if found else []


def _nodes(kube: Kube, demand: Demand | None, into: list[kube_nodes.Node]) -> Iterator[Finding]:
    into.extend(map(kube_nodes.node_of, kube.nodes()))
    yield from kube_nodes.gpu_findings(into, demand)
    yield from kube_nodes.rdma_findings(into, demand)
    if demand is not None and demand.pods:
        yield from kube_nodes.fit_findings(into, demand)


def _access(kube: Kube, demand: Demand | None) -> Iterator[Finding]:
    made: set[tuple[str, str, bool]] = set()
    kinds = sorted(demand.kinds) if demand else []
    served = {version: kube.kinds(version) or {} for version in sorted({v for v, _ in kinds})}
    for version, kind in kinds:
        if kind in served[version]:
            made.add((version.rpartition("/")[0], *served[version][kind]))
            continue
        yield failure(
            "apis",
            f"the manifests hold a {kind} of {version}, which is not served",
            "install what defines it, or switch it off in the values",
        )
    yield from _granted(kube, "the commands of whalepod k8s", COMMANDS)
    yield from _granted(kube, "helm install", install(made or CHART))


def _granted(kube: Kube, purpose: str, wanted: Sequence[Access]) -> Iterator[Finding]:
    refused = [a for a, yes in zip(wanted, kube.allowed(wanted), strict=True) if not yes]
    if not refused:
        yield ok("access", f"{purpose}: all {len(wanted)} permissions granted")
    for access in refused:
        place = f" -n {kube.namespace}" if access.namespaced else ""
        # Cluster-wide looks are worth having; status and logs work without.
        make = warning if access in COMMANDS and not access.namespaced else failure
        yield make(
            "access",
            f"{purpose}: may not {access}",
            f"ask an administrator for it (kubectl auth can-i {access}{place})",
        )
