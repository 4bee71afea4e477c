"""KubeRay's own refusals (v1.7, `validation.go`) that its custom resource definitions do not carry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Doc = dict[str, Any]
_LABEL_KEY = re.compile(
    r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$"
)
_LABEL = re.compile(r"^([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?$")
_TAKEN = ("num-cpus", "num-gpus", "memory", "resources")
_GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")


def operator_errors(doc: Doc) -> list[str]:
    """What the operator would refuse; empty when it takes the object."""
    name, service = doc["metadata"]["name"], doc["kind"] == "RayService"
    spec = doc["spec"]["rayClusterConfig"] if service else doc["spec"]
    found = []
    if len(name) > (47 if service else 53):
        found.append(f"name {name} is too long")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"name {name} is no DNS-1035 label")
    if service:
        found += _service(doc["spec"], doc["metadata"].get("annotations", {}))
    else:
        found += _strategy(spec, ("Recreate", "None"))
    annotations = doc["metadata"].get("annotations", {})
    return [*found, *_groups(spec), *_scaling(spec), *_auth(spec), *_storage(spec, annotations)]


def _strategy(spec: Doc, valid: tuple[str, ...]) -> Iterator[str]:
    kind = spec.get("upgradeStrategy", {}).get("type", "None")
    if kind not in valid:
        yield f"upgradeStrategy.type {kind} is not one of {valid}"


def _service(spec: Doc, annotations: Doc) -> Iterator[str]:
    yield from _strategy(spec, ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"))
    cluster = spec["rayClusterConfig"]
    if "name" in cluster["headGroupSpec"].get("headService", {}).get("metadata", {}):
        yield "headService.metadata.name must be unset"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for a RayService"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy of a cluster that a RayService makes"
    timeout = annotations.get("ray.io/initializing-timeout", "1s")
    if not re.fullmatch(r"[1-9]\d*|(\d+(\.\d+)?(ms|s|m|h))+", timeout):
        yield f"initializing-timeout {timeout}"
    if spec.get("upgradeStrategy", {}).get("type") == "NewClusterWithIncrementalUpgrade":
        options = spec["upgradeStrategy"].get("clusterUpgradeOptions")
        if not cluster.get("enableInTreeAutoscaling") or not options:
            yield "incremental upgrade needs autoscaling and options"


def _groups(spec: Doc) -> Iterator[str]:
    head = {"groupName": "head", **spec["headGroupSpec"]}
    for group in (head, *spec["workerGroupSpecs"]):
        name, params = group["groupName"], group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            yield f"{name} has no container"
        if group.get("resources") and any(params.get(k) for k in _TAKEN):
            yield f"{name} has resources in rayStartParams and at the top"
        if "labels" in params:
            yield f"{name} has rayStartParams.labels"
        for key, value in group.get("labels", {}).items():
            if not _LABEL_KEY.match(key) or not _LABEL.match(value):
                yield f"{name} has an illegal label {key}={value}"
    for group in spec["workerGroupSpecs"]:
        yield from _bounds(group, spec)
    for key in _GATED:
        if key in spec:
            yield f"{key} needs a feature gate"


def _bounds(group: Doc, spec: Doc) -> Iterator[str]:
    name, scaled = group["groupName"], spec.get("enableInTreeAutoscaling", False)
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if not scaled and (low is None or high is None):
        yield f"{name} needs minReplicas and maxReplicas"
    if (low or 0) < 0 or (high or 0) < 0:
        yield f"{name} has negative bounds"
    if low is not None and high is not None and low > high:
        yield f"{name} has minReplicas above maxReplicas"
    version = spec.get("autoscalerOptions", {}).get("version", "v1") if scaled else ""
    if "idleTimeoutSeconds" in group and (group["idleTimeoutSeconds"] < 0 or version != "v2"):
        yield f"{name} has idleTimeoutSeconds without autoscaler v2"
    if group.get("priority") and version != "v2":
        yield f"{name} has a priority without autoscaler v2"
    if group.get("suspend") and scaled:
        yield f"{name} is suspended under the autoscaler"


def _head_env(spec: Doc) -> dict[str, Any]:
    containers = spec["headGroupSpec"]["template"]["spec"].get("containers") or [{}]
    return {e["name"]: e.get("value") for e in containers[0].get("env", [])}


def _scaling(spec: Doc) -> Iterator[str]:
    options, env = spec.get("autoscalerOptions", {}), _head_env(spec)
    scaled, switch = spec.get("enableInTreeAutoscaling", False), "RAY_enable_autoscaler_v2"
    if not scaled and env.get(switch) in ("1", "true"):
        yield f"{switch} without autoscaling"
    if scaled and "version" in options and switch in env:
        yield f"autoscalerOptions.version and {switch}"
    if scaled and options.get("version") == "v2":
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "restartPolicy under autoscaler v2"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(e["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for e in options.get("env", [])):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is KubeRay's"


def _auth(spec: Doc) -> Iterator[str]:
    options = spec.get("authOptions", {})
    if options.get("mode") == "token":
        parts = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", spec.get("rayVersion", ""))
        if not parts or (int(parts[1]), int(parts[2])) < (2, 52):
            yield "token authentication needs rayVersion 2.52"
    elif options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth without token mode"


def _storage(spec: Doc, annotations: Doc) -> Iterator[str]:
    env, params = _head_env(spec), spec["headGroupSpec"].get("rayStartParams", {})
    options = spec.get("gcsFaultToleranceOptions")
    if "redis-username" in params or "REDIS_USERNAME" in env:
        yield "redis username outside gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(key):
            yield f"annotation {key} with gcsFaultToleranceOptions"
    if "redis-password" in params or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & env.keys():
        yield "redis settings outside gcsFaultToleranceOptions"
    backend = options.get("backend", "redis")
    if backend == "redis" and "storage" in options:
        yield "storage is for rocksdb"
    if backend == "rocksdb":
        yield "rocksdb needs a feature gate"
