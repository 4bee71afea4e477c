"""The rules by which pods are made from a RayService, against lines that KubeRay 1.7 writes."""

from __future__ import annotations

from typing import Any

import kuberay
import pytest


def service(**spec: Any) -> dict[str, Any]:
    container: dict[str, Any] = {"name": "ray", "image": "whalepod:1"}
    group = {
        "groupName": "experts",
        "replicas": 2,
        "numOfHosts": 2,
        "rayStartParams": {},
        "template": {"spec": {"containers": [container]}},
    }
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [dict(container)]}}}
    cluster = {"headGroupSpec": head, "workerGroupSpecs": [group], **spec}
    return {
        "kind": "RayService",
        "metadata": {"name": "w"},
        "spec": {"rayClusterConfig": cluster},
    }


def environment(pod: kuberay.Pod) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in pod.ray["env"]}


def test_lines_of_a_bare_cluster() -> None:
    head, *workers = kuberay.pods(service())
    common = "--block --dashboard-agent-listen-port=52365"
    assert head.start == (
        f"ray start --head {common} --dashboard-host=0.0.0.0 --metrics-export-port=8080"
    )
    assert head.ray["command"] == ["/bin/bash", "-c", "--"]
    assert head.ray["args"] == ["ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; " + head.start]
    address = "w-abcde-head-svc.default.svc.cluster.local:6379"
    assert [w.start for w in workers] == [
        f"ray start --address={address} {common} --metrics-export-port=8080"
    ] * 4
    assert environment(workers[0])["RAY_ADDRESS"] == address
    assert environment(head)["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert [c["name"] for c in workers[0].spec["initContainers"]] == ["wait-gcs-ready"]
    assert "initContainers" not in head.spec


@pytest.mark.parametrize(
    ("group", "flags"),
    [
        ({"resources": {"CPU": "0", "exp": "8"}}, ["--num-cpus=0", "--resources='{\"exp\":8}'"]),
        (
            {"resources": {"nvidia.com/gpu": "4", "memory": "2Gi"}},
            ["--memory=2147483648", "--num-gpus=4"],
        ),
        ({"labels": {"b": "2", "a/x": "1"}}, ["--labels=a/x=1,b=2"]),
        ({"rayStartParams": {"no-monitor": "true", "log-style": "false"}}, ["--no-monitor"]),
        ({"rayStartParams": {"include-dashboard": "false"}}, ["--include-dashboard=false"]),
    ],
)
def test_what_a_group_says_becomes_flags(group: dict[str, Any], flags: list[str]) -> None:
    template = {"spec": {"containers": [{}]}}
    bare = kuberay.start_parameters({"template": template}, head=True, address="")
    told = kuberay.start_parameters({"template": template, **group}, head=True, address="")
    extra = set(kuberay.start_line(told, head=True).split())
    assert extra - set(kuberay.start_line(bare, head=True).split()) == set(flags)


def test_limits_become_resources_unless_told_otherwise() -> None:
    limits = {"cpu": "1500m", "memory": "1G", "nvidia.com/gpu": 8}
    template = {"spec": {"containers": [{"resources": {"limits": limits}}]}}
    found = kuberay.start_parameters({"template": template}, head=False, address="a:1")
    assert (found["num-cpus"], found["memory"], found["num-gpus"]) == ("2", "1000000000", "8")
    group = {"template": template, "rayStartParams": {"num-cpus": "0"}}
    assert kuberay.start_parameters(group, head=True, address="")["num-cpus"] == "0"


def test_a_command_of_ones_own_comes_first_and_ray_start_stays() -> None:
    document = service()
    cluster = document["spec"]["rayClusterConfig"]
    container = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["args"] = ["test -f /models/x"]
    line = kuberay.pods(document)[1].ray["args"][0]
    assert line.startswith("test -f /models/x && ulimit -n ")
    container["args"] = ["ray start --head"]
    assert kuberay.pods(document)[1].ray["args"] == ["ray start --head"]


def test_tokens_and_probes() -> None:
    head, worker, *_ = kuberay.pods(service(authOptions={"mode": "token", "secretName": "s"}))
    for pod in (head, worker):
        assert environment(pod)["RAY_AUTH_MODE"] == "token"
        secret = environment(pod)["RAY_AUTH_TOKEN"]["secretKeyRef"]
        assert secret == {"name": "s", "key": "auth_token"}
    # A worker without a probe of its own is ready only where Serve's proxy answers.
    assert "8000/-/healthz" in worker.ray["readinessProbe"]["exec"]["command"][2]
    assert head.ray["readinessProbe"]["httpGet"]["port"] == 52365


def test_numbers_of_kubernetes() -> None:
    assert [kuberay.whole(q) for q in ("1500m", "2", 3, "1Gi", "1e3")] == [
        "2",
        "2",
        "3",
        "1073741824",
        "1000",
    ]
    with pytest.raises(ValueError, match="no Kubernetes quantity"):
        kuberay.quantity("many")
