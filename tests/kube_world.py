"""A healthy cluster with a release of whalepod on it, as Kubernetes objects."""

from __future__ import annotations

from typing import Any

from kube_api import NAMESPACE, Api

RELEASE = "deep"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
RAY = f"/apis/ray.io/v1/namespaces/{NAMESPACE}"
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PODS = f"{CORE}/pods"
DEPLOYMENTS = "/apis/apps/v1/deployments"
STATUS = f"{CORE}/services/http:deep-status:serve/proxy/status"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"


def node(name: str, gpus: int = 8, **changes: Any) -> dict[str, Any]:
    """A ready node; changes: labels, allocatable, and parts of spec."""
    labels = {
        "nvidia.com/gpu.count": str(gpus),
        "nvidia.com/gpu.product": "NVIDIA-H200",
        "nvidia.com/gpu.memory": "143771",
        "nvidia.com/gpu.clique": "c1.0",
        "nvidia.com/cuda.driver-version.full": "580.95.05",
        "nvidia.com/cuda.runtime-version.full": "13.0",
    }
    amounts = {"cpu": "96", "memory": "1000Gi", "pods": "110"}
    if gpus:
        amounts |= {"nvidia.com/gpu": str(gpus), "rdma/ib": "8"}
    labels = {**(labels if gpus else {}), **changes.pop("labels", {})}
    labels = {key: value for key, value in labels.items() if value is not None}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": changes,
        "status": {
            "allocatable": amounts,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def definition(kind: str, *, fields: bool = True, versions: tuple[str, ...] = ("v1",)) -> Any:
    """A KubeRay custom resource definition with the fields that are looked at."""
    cluster: dict[str, Any] = {
        "workerGroupSpecs": {
            "items": {"properties": {"resources": {}, "labels": {}, "numOfHosts": {}}}
        }
    }
    if fields:
        cluster |= {"authOptions": {}, "gcsFaultToleranceOptions": {}}
    spec = cluster if kind == "rayclusters" else {"rayClusterConfig": {"properties": cluster}}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": spec}}}}
    return {
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind}.ray.io"},
        "spec": {"versions": [{"name": v, "served": True, "schema": schema} for v in versions]},
        "status": {"conditions": [{"type": "Established", "status": "True"}]},
    }


def operator(image: str = "quay.io/kuberay/operator:v1.7.0", *args: str, up: int = 1) -> Any:
    """KubeRay's operator."""
    return {
        "metadata": {
            "name": "kuberay-operator",
            "namespace": "kuberay",
            "labels": {"app.kubernetes.io/name": "kuberay-operator"},
        },
        "spec": {"template": {"spec": {"containers": [{"image": image, "args": list(args)}]}}},
        "status": {"availableReplicas": up},
    }


def pod(name: str, group: str, ip: str, **changes: Any) -> dict[str, Any]:
    """A running pod of the release; changes: labels, status, spec, metadata."""
    kind = "head" if group == "headgroup" else "worker"
    labels = {
        "app.kubernetes.io/instance": RELEASE,
        "ray.io/cluster": "deep-abc",
        "ray.io/group": group,
        "ray.io/node-type": kind,
    }
    status = {
        "phase": "Running",
        "podIP": ip,
        "containerStatuses": [{"name": "ray", "ready": True, "restartCount": 0}],
        **changes.pop("status", {}),
    }
    spec = {"nodeName": "n0", "containers": [{"name": "ray"}], "initContainers": [{"name": "wait"}]}
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": "2026-01-31T12:00:00Z",
            "resourceVersion": "7",
            "labels": {**labels, **changes.pop("labels", {})},
            **changes.pop("metadata", {}),
        },
        "spec": {**spec, **changes},
        "status": status,
    }


def ray_service() -> dict[str, Any]:
    """The release's RayService, serving."""
    deployments = {"attention": {"status": "HEALTHY"}, "experts": {"status": "HEALTHY"}}
    return {
        "kind": "RayService",
        "metadata": {"name": "deep", "labels": {"app.kubernetes.io/instance": RELEASE}},
        "status": {
            "serviceStatus": "Running",
            "numServeEndpoints": 2,
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"},
            ],
            "activeServiceStatus": {
                "rayClusterName": "deep-abc",
                "applicationStatuses": {
                    "whalepod": {"status": "RUNNING", "serveDeploymentStatuses": deployments}
                },
            },
        },
    }


def ray_cluster() -> dict[str, Any]:
    """The RayCluster that the RayService owns."""
    return {
        "kind": "RayCluster",
        "metadata": {"name": "deep-abc", "labels": {"ray.io/originated-from-cr-name": "deep"}},
        "status": {"state": "ready", "readyWorkerReplicas": 2, "desiredWorkerReplicas": 2},
    }


def member(name: str, pool: str, host: str, rank: int | None = 0) -> dict[str, Any]:
    """A member as the cluster's report has it."""
    roles = {"attention": ["attention"], "experts": ["expert"], "router": ["router"]}[pool]
    state = "joining" if rank is None else "serving"
    return {
        **{"name": name, "pool": pool, "host": host, "state": state, "rank": rank},
        **{"roles": [] if rank is None else roles, "experts": 0},
    }


def report(*members: dict[str, Any]) -> dict[str, Any]:
    """The cluster's report."""
    return {"epoch": 4, "ready": True, "fabric": "nccl", "waiting_for": "", "members": [*members]}


def fill(api: Api) -> None:
    """Put everything on the server."""
    api.on("get /version/", {"gitVersion": "v1.33.4+k3s1"})
    api.on(f"get {CORE}", {"metadata": {"name": NAMESPACE}, "status": {"phase": "Active"}})
    for kind in ("rayservices", "rayclusters"):
        api.on(f"get {CRD}/{kind}.ray.io", definition(kind))
    api.add(DEPLOYMENTS, operator())
    api.add("/api/v1/nodes", node("n0"), node("n1"), node("c0", gpus=0))
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    api.add(CLASSES, {"metadata": {"name": "fast", "annotations": default}})
    for empty in ("persistentvolumeclaims", "resourcequotas", "limitranges"):
        api.add(f"{CORE}/{empty}")
    api.add(f"{RAY}/rayservices", ray_service())
    api.add(f"{RAY}/rayclusters", ray_cluster())
    api.add(
        PODS,
        pod("deep-head", "headgroup", "10.0.0.1"),
        pod("deep-att-0", "attention", "10.0.0.2"),
        pod("deep-exp-0", "experts", "10.0.0.3"),
    )
    kinds = {
        "/api/v1/": {"ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"},
        "/apis/ray.io/v1": {"RayService": "rayservices", "RayCluster": "rayclusters"},
        "/apis/batch/v1": {"Job": "jobs"},
        "/apis/rbac.authorization.k8s.io/v1": {"ClusterRole": "clusterroles"},
    }
    for path, served in kinds.items():
        listed = [
            {"kind": kind, "name": plural, "namespaced": kind != "ClusterRole"}
            for kind, plural in served.items()
        ]
        api.on(f"get {path}", {"resources": [*listed, {"kind": "Scale", "name": "x/scale"}]})
    api.on(
        f"get {STATUS}",
        report(
            member("a0", "attention", "10.0.0.2", 0),
            member("e0", "experts", "10.0.0.3", 1),
            member("e1", "experts", "10.0.0.3", 2),
        ),
    )
