"""What KubeRay 1.7 makes of a RayService: the pods, and the `ray start` line of each.

Only what decides how a pod runs is here: parameters that the operator adds or derives, environment,
init container, probes. Services, ownership and reconciliation are not. Used by the tests that run a
rendered chart's pods as they would run on a cluster.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from typing import Any

GCS, DASHBOARD, AGENT, METRICS, SERVE = 6379, 8265, 52365, 8080, 8000
_SWITCHES_WITH_VALUE = ("log-color", "include-dashboard", "include-log-monitor")
_SUFFIX = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)
}
_WAIT_GCS = (
    "while ! ray health-check --address {address} > /dev/null 2>&1; do "
    "echo waiting for GCS; sleep 1; done"
)


@dataclass(frozen=True)
class Pod:
    """A pod as the operator would create it.

    `containers` are the template's, the Ray container first and completed; `init` likewise.
    """

    name: str
    group: str
    spec: dict[str, Any]
    labels: dict[str, str]
    namespace: str
    start: str = field(repr=False)

    @property
    def ray(self) -> dict[str, Any]:
        """The container that runs `ray start`."""
        container: dict[str, Any] = self.spec["containers"][0]
        return container

    @property
    def head(self) -> bool:
        """Whether this is the head node."""
        return self.labels["ray.io/node-type"] == "head"


def quantity(text: object) -> Decimal:
    """A Kubernetes quantity as a number: `1500m` is 1.5, `1Gi` is 1073741824."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in _SUFFIX:
        raise ValueError(f"{text!r} is no Kubernetes quantity")
    return Decimal(found[1]) * _SUFFIX[found[2]]


def whole(text: object) -> str:
    """A quantity rounded up to a whole number, as the operator passes it to Ray."""
    return str(int(quantity(text).to_integral_value(ROUND_CEILING)))


def pods(document: dict[str, Any], namespace: str = "default") -> list[Pod]:
    """The pods of a RayService or RayCluster, head first, each group's `replicas x numOfHosts`."""
    service = document["kind"] == "RayService"
    spec = document["spec"]["rayClusterConfig"] if service else document["spec"]
    name = document["metadata"]["name"] + ("-abcde" if service else "")
    cluster = _Cluster(name, namespace, spec, service)
    made = [cluster.pod(spec["headGroupSpec"], "headgroup", f"{name}-head")]
    for group in spec.get("workerGroupSpecs", []):
        count = int(group.get("replicas", 0)) * int(group.get("numOfHosts", 1))
        for index in range(count):
            pod_name = f"{name}-{group['groupName']}-worker-{index}"
            made.append(cluster.pod(group, group["groupName"], pod_name))
    return made


class _Cluster:
    def __init__(self, name: str, namespace: str, spec: dict[str, Any], service: bool) -> None:
        self.name, self.namespace, self.spec, self.service = name, namespace, spec, service
        self.head_host = head_host(name, namespace)
        self.port = spec["headGroupSpec"].get("rayStartParams", {}).get("port", str(GCS))

    def pod(self, group: dict[str, Any], group_name: str, name: str) -> Pod:
        head = group_name == "headgroup"
        template = copy.deepcopy(group["template"])
        spec = template["spec"]
        labels = {
            **template.get("metadata", {}).get("labels", {}),
            **group.get("labels", {}),
            "ray.io/cluster": self.name,
            "ray.io/group": group_name,
            "ray.io/node-type": "head" if head else "worker",
        }
        ray = spec["containers"][0]
        address = f"{self.head_host}:{self.port}"
        parameters = start_parameters(group, head=head, address=address)
        start = start_line(parameters, head=head)
        if not head:
            spec.setdefault("initContainers", []).append(_wait_gcs(ray, address))
        given = " ".join([*ray.get("command", []), *ray.get("args", [])])
        if "ray start" not in given:
            line = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
            ray["command"] = ["/bin/bash", "-c", "--"]
            ray["args"] = [f"{given} && {line}" if given else line]
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            self._token(container)
        self._environment(ray, head, start)
        _probes(ray, parameters, serve=self.service and not head)
        return Pod(name, group_name, spec, labels, self.namespace, start)

    def _token(self, container: dict[str, Any]) -> None:
        auth = self.spec.get("authOptions", {})
        if auth.get("mode") != "token":
            return
        secret = {"name": auth.get("secretName") or self.name, "key": "auth_token"}
        _add(container, "RAY_AUTH_MODE", "token")
        _add(container, "RAY_AUTH_TOKEN", {"secretKeyRef": secret})

    def _environment(self, ray: dict[str, Any], head: bool, start: str) -> None:
        if not head:
            _add(ray, "FQ_RAY_IP", self.head_host)
            _add(ray, "RAY_IP", self.head_host.split(".")[0])
        _add(
            ray,
            "RAY_CLUSTER_NAME",
            {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}},
        )
        _add(ray, "RAY_CLUSTER_NAMESPACE", {"fieldRef": {"fieldPath": "metadata.namespace"}})
        _add(ray, "RAY_CLOUD_INSTANCE_ID", {"fieldRef": {"fieldPath": "metadata.name"}})
        _add(
            ray,
            "RAY_NODE_TYPE_NAME",
            {"fieldRef": {"fieldPath": "metadata.labels['ray.io/group']"}},
        )
        _add(ray, "KUBERAY_GEN_RAY_START_CMD", start)
        _add(ray, "RAY_PORT", self.port)
        if self.service:
            _add(ray, "RAY_timeout_ms_task_wait_for_death_info", "0")
            _add(ray, "RAY_gcs_server_request_timeout_seconds", "5")
            _add(ray, "RAY_SERVE_KV_TIMEOUT_S", "5")
        host = "127.0.0.1" if head else self.head_host
        _add(ray, "RAY_ADDRESS", f"{host}:{self.port}")
        _add(ray, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
        _add(ray, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")


def head_host(cluster: str, namespace: str) -> str:
    """The name under which workers reach the head."""
    return f"{cluster}-head-svc.{namespace}.svc.cluster.local"


def start_parameters(group: Mapping[str, Any], *, head: bool, address: str) -> dict[str, str]:
    """`rayStartParams` as the operator completes them."""
    found = {k: str(v) for k, v in group.get("rayStartParams", {}).items()}
    _from_resources(found, group.get("resources", {}))
    if group.get("labels"):
        found["labels"] = ",".join(f"{k}={v}" for k, v in sorted(group["labels"].items()))
    if head:
        found.setdefault("dashboard-host", "0.0.0.0")
    else:
        found.setdefault("address", address)
    found.setdefault("metrics-export-port", str(METRICS))
    found["block"] = "true"
    found.setdefault("dashboard-agent-listen-port", str(AGENT))
    _from_limits(found, group["template"]["spec"]["containers"][0].get("resources", {}))
    return found


def _from_resources(found: dict[str, str], resources: Mapping[str, str]) -> None:
    custom = {}
    for name, value in resources.items():
        if name.lower() == "cpu":
            found["num-cpus"] = whole(value)
        elif name.lower() == "memory":
            found["memory"] = whole(value)
        elif _gpu(name.lower()):
            found["num-gpus"] = whole(value)
        else:
            number = float(quantity(value))
            custom[name] = int(number) if number.is_integer() else number
    if custom:
        found["resources"] = f"'{json.dumps(custom, separators=(',', ':'))}'"


def _from_limits(found: dict[str, str], resources: Mapping[str, Any]) -> None:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for cpu in (limits.get("cpu"), requests.get("cpu")):
        if cpu is not None and quantity(cpu):
            found.setdefault("num-cpus", whole(cpu))
    if "memory" in limits:
        found.setdefault("memory", whole(limits["memory"]))
    for name in sorted(limits):
        if _gpu(name) and quantity(limits[name]):
            found.setdefault("num-gpus", whole(limits[name]))


def _gpu(name: str) -> bool:
    return name.endswith("gpu") or name.startswith("nvidia.com/mig-")


def start_line(parameters: Mapping[str, str], *, head: bool) -> str:
    """The `ray start` command: switches bare, false ones dropped, names in order."""
    words = ["ray start", "--head"] if head else ["ray start"]
    for name, value in sorted(parameters.items()):
        if value.lower() in ("true", "false") and name not in _SWITCHES_WITH_VALUE:
            words += [f"--{name}"] if value.lower() == "true" else []
        else:
            words.append(f"--{name}={value}")
    return " ".join(words)


def _add(container: dict[str, Any], name: str, value: str | dict[str, Any]) -> None:
    environment = container.setdefault("env", [])
    if all(entry["name"] != name for entry in environment):
        key = "value" if isinstance(value, str) else "valueFrom"
        environment.append({"name": name, key: value})


def _wait_gcs(ray: dict[str, Any], address: str) -> dict[str, Any]:
    kept = ("image", "env", "envFrom", "volumeMounts", "securityContext")
    return {
        "name": "wait-gcs-ready",
        "command": ["/bin/bash", "-c", "--"],
        "args": [_WAIT_GCS.format(address=address)],
        **{k: copy.deepcopy(ray[k]) for k in kept if k in ray},
    }


def _probes(ray: dict[str, Any], parameters: Mapping[str, str], *, serve: bool) -> None:
    agent = int(parameters["dashboard-agent-listen-port"])
    health = {"httpGet": {"path": "/api/healthz", "port": agent}}
    ray.setdefault("livenessProbe", {**health, "initialDelaySeconds": 30, "failureThreshold": 120})
    if "readinessProbe" in ray or not serve:
        ray.setdefault("readinessProbe", {**health, "periodSeconds": 5, "failureThreshold": 10})
        return
    ports = {p.get("name"): p["containerPort"] for p in ray.get("ports", [])}
    checks = (
        f"wget --tries 1 -T {limit} -q -O- http://localhost:{port}/{path} | grep success"
        for limit, port, path in (
            (2, agent, "api/local_raylet_healthz"),
            (10, ports.get("serve", SERVE), "-/healthz"),
        )
    )
    command = ["bash", "-c", " && ".join(checks)]
    ray["readinessProbe"] = {
        "exec": {"command": command},
        "periodSeconds": 5,
        "failureThreshold": 1,
    }
