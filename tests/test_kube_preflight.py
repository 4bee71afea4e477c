"""`whalepod k8s preflight`: each look, good and bad, against a fake API server."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_api import NAMESPACE, Api, refuse
from kube_world import CLASSES, CORE, CRD, DEPLOYMENTS, definition, fill, node, operator

from whalepod.cli import main
from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_demand import Demand, of_config, of_manifests
from whalepod.cluster.kube_findings import Finding
from whalepod.cluster.kube_preflight import preflight
from whalepod.config import Config
from whalepod.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    with found.serve():
        fill(found)
        yield found


@pytest.fixture
def kube(api: Api, tmp_path: Path) -> Iterator[Kube]:
    with Kube.open(api.kubeconfig(tmp_path), timeout_s=20) as found:
        yield found


def group(name: str, count: int, gpus: int = 8, **spec: Any) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": gpus, "cpu": "32", "memory": "480Gi"}
    container = {"name": "ray", "resources": {"limits": limits}, **spec.pop("container", {})}
    body = {"containers": [container], **spec}
    return {"groupName": name, "replicas": count, "template": {"spec": body}}


def manifests(*groups: dict[str, Any], **more: dict[str, Any]) -> str:
    head = {"template": {"spec": {"containers": [{"resources": {"requests": {"cpu": "4"}}}]}}}
    cluster = {"headGroupSpec": head, "workerGroupSpecs": list(groups)}
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "deep"},
        "spec": {"rayClusterConfig": cluster},
    }
    return yaml.safe_dump_all([service, *more.values()])


def claim(name: str, *modes: str, storage: str | None = None, phase: str = "Bound") -> Any:
    spec: dict[str, Any] = {"accessModes": list(modes)}
    if storage is not None:
        spec["storageClassName"] = storage
    return {
        **{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}},
        **{"spec": spec, "status": {"phase": phase}},
    }


def mounts(*claims: str) -> list[dict[str, Any]]:
    return [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims]


def demand(*groups: dict[str, Any], **more: dict[str, Any]) -> Demand:
    return of_manifests(manifests(*groups, **more), "m.yaml")


def bad(kube: Kube, wanted: Demand | None = None, **options: Any) -> list[Finding]:
    return [f for f in preflight(kube, wanted, **options).findings if f.status != "ok"]


def only(found: list[Finding], status: str, check: str, what: str, fix: str = "") -> None:
    assert [(f.status, f.check) for f in found] == [(status, check)], found
    assert what in found[0].what
    assert fix in found[0].fix
    assert found[0].fix


def test_a_good_cluster(api: Api, kube: Kube) -> None:
    told = preflight(kube, demand(group("attention", 1), group("experts", 1)))
    assert told.good
    assert all(f.status == "ok" for f in told.findings), told.findings
    said = "\n".join(f.what for f in told.findings)
    assert "2 x 8 NVIDIA-H200, driver 580.95.05 (CUDA 13.0), NVLink domain c1.0" in said
    assert "rdma/ib: 16 on 2 nodes" in said
    assert "16 GPUs, 16 wanted" in said
    assert "all 3 pods find a node" in said
    assert [n.name for n in told.nodes] == ["n0", "n1", "c0"]


def test_old_kubernetes(api: Api, kube: Kube) -> None:
    api.on("get /version/", {"gitVersion": "v1.24.17"})
    only(bad(kube), "failure", "kubernetes", "version v1.24.17; 1.29 or newer")
    api.on("get /version/", {"gitVersion": "tip"})
    only(bad(kube), "failure", "kubernetes", "version tip")


def test_namespace(api: Api, kube: Kube) -> None:
    api.on(f"get {CORE}", refuse(404))
    only(bad(kube), "failure", "namespace", "does not exist", f"create namespace {NAMESPACE}")
    api.on(f"get {CORE}", {"metadata": {"name": NAMESPACE}, "status": {"phase": "Terminating"}})
    only(bad(kube), "failure", "namespace", "being deleted")
    api.on(f"get {CORE}", refuse(403))
    only(bad(kube), "warning", "namespace", "could not look", "administrator")


@pytest.mark.parametrize(
    ("level", "capability", "refused"),
    [
        ("baseline", "IPC_LOCK", True),
        ("restricted", "IPC_LOCK", True),
        ("baseline", "CHOWN", False),
        ("privileged", "IPC_LOCK", False),
    ],
)
def test_pod_security(api: Api, kube: Kube, level: str, capability: str, refused: bool) -> None:
    label = {"pod-security.kubernetes.io/enforce": level}
    api.on(f"get {CORE}", {"metadata": {"name": NAMESPACE, "labels": label}})
    adds = {"securityContext": {"capabilities": {"add": [capability]}}}
    found = bad(kube, demand(group("experts", 1, container=adds)))
    if refused:
        only(found, "failure", "namespace", f"pods add {capability}", "enforce=privileged")
    else:
        assert found == []


def test_kuberay_is_missing_or_old(api: Api, kube: Kube) -> None:
    path = f"get {CRD}/rayservices.ray.io"
    api.on(path, refuse(404))
    only(bad(kube), "failure", "kuberay", "rayservices.ray.io is not installed", "helm repo add")
    api.on(path, definition("rayservices", versions=("v1alpha1",)))
    only(bad(kube), "failure", "kuberay", "serves v1alpha1, not v1", "helm show crds")
    api.on(path, definition("rayservices", fields=False))
    only(bad(kube), "failure", "kuberay", "knows no authOptions, gcsFaultTol", "helm show crds")
    unready = definition("rayservices") | {"status": {}}
    api.on(path, unready)
    only(bad(kube), "failure", "kuberay", "is not established")
    api.on(path, refuse(500))
    only(bad(kube), "failure", "kuberay", "could not look: get customresourcedefinitions")
    api.on(path, {"metadata": {"name": "x"}, "spec": {"versions": "v1"}})
    only(bad(kube), "failure", "kuberay", "expected a list")


def test_kuberay_without_permission_to_read_definitions(api: Api, kube: Kube) -> None:
    for kind in ("rayservices", "rayclusters"):
        api.on(f"get {CRD}/{kind}.ray.io", refuse(403))
    assert bad(kube) == []
    api.on("get /apis/ray.io/v1", {"resources": [{"kind": "RayCluster", "name": "rayclusters"}]})
    only(bad(kube), "failure", "kuberay", "RayService of ray.io/v1 is not served")
    api.on("get /apis/ray.io/v1", refuse(404))
    assert [f.status for f in bad(kube)] == ["failure"] * 2


@pytest.mark.parametrize(
    ("found", "status", "what"),
    [
        (operator("kuberay/operator:v1.5.2"), "failure", "is KubeRay 1.5.2; 1.6 or newer"),
        (operator("reg:5000/op@sha256:0123"), "warning", "version unknown"),
        (operator("kuberay/operator:nightly"), "warning", "version unknown"),
        (operator("reg:5000/kuberay/operator:v1.6.0", up=0), "failure", "no available replica"),
        (
            operator("kuberay/operator:v1.6.0", "--watch-namespace=a,b"),
            "failure",
            "watches only a, b, not whale",
        ),
    ],
)
def test_operator(api: Api, kube: Kube, found: Any, status: str, what: str) -> None:
    api.store[DEPLOYMENTS][:] = [found]
    only(bad(kube), status, "operator", what)


def test_operator_that_is_good_or_missing(api: Api, kube: Kube) -> None:
    api.store[DEPLOYMENTS][:] = [operator("kuberay/operator:v1.6.0", "--watch-namespace=a,whale")]
    assert bad(kube) == []
    api.store[DEPLOYMENTS].clear()
    only(bad(kube), "failure", "operator", "in any namespace", "helm upgrade --install")
    elsewhere = DEPLOYMENTS.replace("deployments", "namespaces/kr/deployments")
    api.add(elsewhere)
    found = bad(kube, operator_namespace="kr")
    only(found, "failure", "operator", "in namespace kr")
    api.add(elsewhere, operator())
    assert bad(kube, operator_namespace="kr") == []


class TestNodes:
    def nodes(self, api: Api, *nodes: dict[str, Any]) -> None:
        api.store["/api/v1/nodes"][:] = nodes

    def test_no_gpus(self, api: Api, kube: Kube) -> None:
        self.nodes(api, node("c0", gpus=0))
        only(bad(kube), "warning", "gpus", "no node has a GPU", "gpu-operator")
        found = bad(kube, Demand("cfg.yaml", 8))
        only(found, "failure", "gpus", "0 GPUs on ready nodes, cfg.yaml wants 8")

    def test_sick_gpu(self, api: Api, kube: Kube) -> None:
        sick = node("n0")
        sick["status"]["allocatable"]["nvidia.com/gpu"] = "7"
        self.nodes(api, sick)
        only(bad(kube), "warning", "gpus", "n0: 8 GPUs installed, 7", "describe node n0")

    def test_unready_and_cordoned_nodes_do_not_count(self, api: Api, kube: Kube) -> None:
        unready = node("n1")
        unready["status"]["conditions"][0]["status"] = "Unknown"
        self.nodes(api, node("n0"), unready, node("n2", unschedulable=True))
        only(bad(kube, Demand("c", 9)), "failure", "gpus", "8 GPUs on ready nodes, c wants 9")
        assert bad(kube, Demand("c", 8)) == []

    def test_drivers(self, api: Api, kube: Kube) -> None:
        key = "nvidia.com/cuda.driver-version.full"
        self.nodes(api, node("n0", labels={key: "470.1.1"}))
        only(bad(kube), "failure", "drivers", "driver 470.1.1 on n0: CUDA 12 needs 525.60.13")
        self.nodes(api, node("n0", labels={key: "550.90.07"}))
        only(bad(kube), "warning", "drivers", "not for CUDA 13")
        self.nodes(api, node("n0"), node("n1", labels={key: "590.10"}))
        only(bad(kube), "warning", "drivers", "nodes differ: 580.95.05, 590.10")
        self.nodes(api, *(node(f"n{i}", labels={key: None}) for i in range(5)))
        only(bad(kube), "warning", "drivers", "no driver label on n0, n1, n2 and 2 more")

    def test_driver_labels_of_older_discovery(self, api: Api, kube: Kube) -> None:
        old = {f"nvidia.com/cuda.driver.{k}": v for k, v in (("major", "580"), ("minor", "5"))}
        self.nodes(api, node("n0", labels={"nvidia.com/cuda.driver-version.full": None, **old}))
        told = preflight(kube)
        assert all(f.status == "ok" for f in told.findings)
        assert told.nodes[0].driver == "580.5"

    def test_rdma(self, api: Api, kube: Kube) -> None:
        bare = [node("n0"), node("n1")]
        for found in bare:
            del found["status"]["allocatable"]["rdma/ib"]
        self.nodes(api, *bare)
        only(bad(kube), "warning", "rdma", "NCCL will use TCP", "network-operator")
        self.nodes(api, bare[0])
        assert bad(kube) == []
        asks = group("experts", 1)
        limits = asks["template"]["spec"]["containers"][0]["resources"]["limits"]
        limits["rdma/hca_shared"] = 1
        found = bad(kube, demand(asks))
        assert [(f.check, f.status) for f in found] == [("rdma", "failure"), ("fit", "failure")]
        assert "asks for rdma/hca_shared; no node offers it" in found[0].what

    @pytest.mark.parametrize(
        ("wanted", "placed", "why"),
        [
            (group("experts", 3), "2 of 3", "2 x taken by the other pods of this release"),
            (group("experts", 1, gpus=16), "0 of 1", "3 x short of nvidia.com/gpu"),
            (group("experts", 1, nodeSelector={"zone": "b"}), "0 of 1", "without label zone=b"),
        ],
    )
    def test_fit(self, api: Api, kube: Kube, wanted: dict[str, Any], placed: str, why: str) -> None:
        found = [f for f in bad(kube, demand(wanted)) if f.check == "fit"]
        only(found, "failure", "fit", f"group experts: {placed} pods", "nodeSelector")
        assert why in found[0].what
        assert "480Gi memory" in found[0].what

    @pytest.mark.parametrize(
        ("toleration", "fits"),
        [
            (None, False),
            ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
            ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
            ({"operator": "Exists"}, True),
            ({"key": "nvidia.com/gpu", "value": "yes"}, True),
            ({"key": "nvidia.com/gpu", "value": "no"}, False),
            ({"key": "other", "operator": "Exists"}, False),
        ],
    )
    def test_taints(self, api: Api, kube: Kube, toleration: Any, fits: bool) -> None:
        taint = {"key": "nvidia.com/gpu", "value": "yes", "effect": "NoSchedule"}
        soft = {"key": "soft", "effect": "PreferNoSchedule"}
        self.nodes(api, node("c0", gpus=0), node("n0", taints=[taint, soft]))
        wanted = group("experts", 1, tolerations=[toleration] if toleration else [])
        found = bad(kube, demand(wanted))
        if fits:
            assert found == []
        else:
            only(found, "failure", "fit", "1 x with taint nvidia.com/gpu:NoSchedule")
        (told,) = (n for n in preflight(kube).nodes if n.name == "n0")
        assert told.as_dict()["taints"] == ["nvidia.com/gpu=yes:NoSchedule"]

    def test_smaller_pods_fill_the_gaps(self, api: Api, kube: Kube) -> None:
        self.nodes(api, node("n0"), node("n1"))
        assert bad(kube, demand(group("a", 2, gpus=3), group("b", 2, gpus=5))) == []

    def test_a_full_node_takes_no_more_pods(self, api: Api, kube: Kube) -> None:
        full = node("n0")
        full["status"]["allocatable"]["pods"] = "1"
        self.nodes(api, full)
        found = bad(kube, demand(group("a", 1, gpus=1)))
        only(found, "failure", "fit", "group head: 0 of 1")

    def test_malformed(self, api: Api, kube: Kube) -> None:
        wrong = node("n0")
        wrong["status"]["allocatable"]["cpu"] = "many"
        self.nodes(api, wrong)
        only(bad(kube), "failure", "nodes", "'many' is no quantity")
        wrong = node("n0")
        wrong["status"] = "fine"
        self.nodes(api, wrong)
        only(bad(kube), "failure", "nodes", "status is 'fine', expected an object")


class TestStorage:
    def test_no_class(self, api: Api, kube: Kube) -> None:
        api.store[CLASSES].clear()
        assert bad(kube) == []
        wanted = demand(pvc=claim("models", "ReadWriteMany"))
        only(bad(kube, wanted), "failure", "storage", "no storage class", "is-default-class=true")
        assert bad(kube, demand(pvc=claim("models", "ReadWriteMany", storage=""))) == []

    def test_unknown_class(self, api: Api, kube: Kube) -> None:
        wanted = demand(pvc=claim("models", "ReadWriteMany", storage="gold"))
        only(bad(kube, wanted), "failure", "storage", "wants storage class gold; there are fast")
        assert bad(kube, demand(pvc=claim("models", "ReadWriteMany", storage="fast"))) == []

    def test_mounted_claims(self, api: Api, kube: Kube) -> None:
        wanted = demand(group("experts", 2, volumes=mounts("models")))
        only(bad(kube, wanted), "failure", "storage", "models is mounted and does not exist")
        path = f"{CORE}/persistentvolumeclaims"
        api.add(path, claim("models", "ReadWriteOnce"))
        only(bad(kube, wanted), "failure", "storage", "(ReadWriteOnce) is mounted by 2 pods")
        assert bad(kube, demand(group("experts", 1, volumes=mounts("models")))) == []
        api.store[path][:] = [claim("models", "ReadOnlyMany", phase="Lost")]
        only(bad(kube, wanted), "failure", "storage", "has lost its volume")
        api.store[path][:] = [claim("models", "ReadOnlyMany")]
        assert bad(kube, wanted) == []

    def test_a_claim_that_the_chart_makes(self, api: Api, kube: Kube) -> None:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "get"}}
        job["spec"] = {"template": {"spec": {"volumes": mounts("models")}}}
        pvc = claim("models", "ReadWriteOnce")
        only(
            bad(kube, demand(group("experts", 1, volumes=mounts("models")), pvc=pvc, job=job)),
            "failure",
            "storage",
            "mounted by 2 pods",
        )
        pvc = claim("models", "ReadWriteMany", phase="")
        assert bad(kube, demand(group("experts", 2, volumes=mounts("models")), pvc=pvc)) == []


class TestBounds:
    def quota(self, api: Api, hard: dict[str, str], used: dict[str, str] | None = None) -> None:
        found = {"metadata": {"name": "q"}, "status": {"hard": hard, "used": used or {}}}
        api.store[f"{CORE}/resourcequotas"][:] = [found]

    @pytest.mark.parametrize(
        ("hard", "used", "said"),
        [
            ({"requests.nvidia.com/gpu": "16"}, {"requests.nvidia.com/gpu": "8"}, "16 wanted"),
            ({"requests.cpu": "65"}, {}, "65 left, 68 wanted"),
            ({"cpu": "65"}, {}, "68 wanted"),
            ({"limits.memory": "959Gi"}, {}, "limits.memory"),
            ({"pods": "2"}, {}, "2 of 2 left, 3 wanted"),
        ],
    )
    def test_quota(self, api: Api, kube: Kube, hard: Any, used: Any, said: str) -> None:
        self.quota(api, hard, used)
        wanted = demand(group("experts", 2))
        found = bad(kube, wanted)
        only(found, "failure", "quotas", "quota q: ", "describe quota q")
        assert said in found[0].what.replace(" of 65", "")
        assert bad(kube) == []

    def test_quota_with_room_and_before_it_is_counted(self, api: Api, kube: Kube) -> None:
        self.quota(api, {"requests.nvidia.com/gpu": "16", "limits.cpu": "64", "services": "9"})
        assert bad(kube, demand(group("experts", 2))) == []
        fresh = {"metadata": {"name": "q"}, "spec": {"hard": {"requests.nvidia.com/gpu": "4"}}}
        api.store[f"{CORE}/resourcequotas"][:] = [fresh]
        only(bad(kube, Demand("c", 5)), "failure", "quotas", "4 left, 5 wanted".replace("4 ", ""))

    def test_limit_range(self, api: Api, kube: Kube) -> None:
        limits = [
            {"type": "Container", "max": {"memory": "256Gi"}},
            {"type": "Pod", "max": {"cpu": "16"}},
            {"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}},
        ]
        found = {"metadata": {"name": "lr"}, "spec": {"limits": limits}}
        api.store[f"{CORE}/limitranges"][:] = [found]
        told = bad(kube, demand(group("experts", 1)))
        assert [f.check for f in told] == ["limits", "limits"]
        assert "a container may have" in told[0].what
        assert "a pod may have 16 cpu, group experts wants 32" in told[1].what
        assert bad(kube) == []


class TestAccess:
    def test_refused(self, api: Api, kube: Kube) -> None:
        api.denied = {("get", "pods/log"), ("list", "nodes"), ("create", "rayservices")}
        found = bad(kube)
        assert [(f.status, f.check) for f in found] == [
            ("failure", "access"),
            ("warning", "access"),
            ("failure", "access"),
        ]
        assert found[0].what == "the commands of whalepod k8s: may not get pods/log"
        assert "kubectl auth can-i get pods/log -n whale" in found[0].fix
        assert "kubectl auth can-i list nodes)" in found[1].fix
        assert found[2].what == "helm install: may not create rayservices.ray.io"

    def test_kinds_of_the_manifests(self, api: Api, kube: Kube) -> None:
        wide = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"}
        scaled = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject"}
        api.denied = {("patch", "clusterroles")}
        found = bad(kube, demand(a={**wide, "metadata": {"name": "a"}}, b=scaled))
        assert found[0].what.endswith(
            "hold a ScaledObject of keda.sh/v1alpha1, which is not served"
        )
        assert "may not patch clusterroles" in found[1].what
        assert len(found) == 2
        asked = [r.data["spec"].get("resourceAttributes", {}) for r in api.requests if r.data]
        (one,) = (a for a in asked if a.get("resource") == "clusterroles" and a["verb"] == "get")
        assert "namespace" not in one

    def test_reviews_that_fail(self, api: Api, kube: Kube) -> None:
        api.on("post /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", refuse(500))
        only(bad(kube), "failure", "access", "could not look: create selfsubjectaccessreviews")


def test_looks_that_may_not_be_taken_are_warnings(api: Api, kube: Kube) -> None:
    for path in ("/api/v1/nodes", DEPLOYMENTS, CLASSES, f"{CORE}/resourcequotas"):
        api.on(f"get {path}", refuse(403))
    found = bad(kube)
    assert [(f.status, f.check) for f in found] == [
        ("warning", check) for check in ("operator", "nodes", "storage", "quotas")
    ]
    assert all("could not look: list " in f.what for f in found)


@pytest.mark.parametrize("status", [404, 409, 500, 504])
def test_looks_that_fail_are_failures(api: Api, kube: Kube, status: int) -> None:
    api.on("get /api/v1/nodes", refuse(status))
    only(bad(kube), "failure", "nodes", f"could not look: list nodes on {api.url}: {status}")


class TestCommand:
    def run(self, api: Api, tmp_path: Path, *more: str) -> int:
        try:
            main(["k8s", "preflight", "--kubeconfig", api.kubeconfig(tmp_path), *more])
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    def test_text_and_json(
        self, api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(api, tmp_path) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[-1].endswith("ready for whalepod (0 failures, 0 warnings)")
        api.on(f"get {CORE}", refuse(404))
        assert self.run(api, tmp_path) == 1
        out = capsys.readouterr().out
        assert "-> kubectl create namespace whale" in out
        assert "not ready for whalepod (1 failure, 0 warnings)" in out
        assert self.run(api, tmp_path, "--json") == 1
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] is False
        assert told["namespace"] == "whale"
        (finding,) = (f for f in told["findings"] if f["status"] == "failure")
        assert set(finding) == {"check", "status", "what", "fix"}
        assert told["nodes"][0]["gpus"] == 8

    def test_configuration_and_manifests(
        self,
        api: Api,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = tmp_path / "c.yaml"
        config.write_text(
            "model: {path: /m}\ntopology: {layout: afd, attention: 9, experts: 8, router: attention}\n"
            "cluster: {gpus_per_member: 1}\n"
        )
        assert self.run(api, tmp_path, str(config)) == 1
        assert "c.yaml wants 17" in capsys.readouterr().out
        monkeypatch.setattr("sys.stdin", io.StringIO(manifests(group("experts", 2))))
        assert self.run(api, tmp_path, "--manifests", "-") == 0
        capsys.readouterr()
        assert self.run(api, tmp_path, str(config), "--manifests", "-") == 1
        assert "give one of them" in capsys.readouterr().err
        assert self.run(api, tmp_path, "--manifests", "/none") == 1
        assert "/none" in capsys.readouterr().err

    def test_nobody_answers(
        self, api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        api.on("get /version/", refuse(401, "Unauthorized"))
        assert self.run(api, tmp_path) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("whalepod: get /version/")
        assert "log in again" in said.err
        assert self.run(api, tmp_path, "--timeout", "0") == 1
        assert "--timeout 0: expected seconds" in capsys.readouterr().err


class TestDemand:
    def test_of_manifests(self) -> None:
        hosts = group("experts", 2) | {"numOfHosts": 4}
        asleep = group("router", 3) | {"suspend": True}
        scaled = group("attention", 0, gpus=1) | {"minReplicas": 2}
        found = demand(hosts, asleep, scaled)
        assert [(p.group, p.count) for p in found.pods] == [
            ("head", 1),
            ("experts", 8),
            ("attention", 2),
        ]
        assert found.gpus == 66
        assert found.total("cpu") == 4 + 10 * 32
        assert found.kinds == {("ray.io/v1", "RayService")}

    def test_ray_cluster(self) -> None:
        (service,) = yaml.safe_load_all(manifests(group("experts", 2)))
        cluster = copy.deepcopy(service) | {"kind": "RayCluster"}
        cluster["spec"] = cluster["spec"]["rayClusterConfig"]
        assert of_manifests(yaml.safe_dump(cluster), "m").gpus == 16

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "m is not YAML"),
            ("3", "m holds 3"),
            ("", "no RayService and no RayCluster"),
            ("kind: ConfigMap", "helm template"),
            ("{kind: RayService, spec: 3}", "spec is 3"),
            (manifests(group("a", 1)).replace("480Gi", "lots"), "'lots' is no quantity"),
        ],
    )
    def test_wrong_manifests(self, text: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            of_manifests(text, "m")

    def test_of_config(self) -> None:
        data = {"model": {"path": "/m"}, "cluster": {"gpus_per_member": 0.5}}
        assert of_config(Config.from_dict(data), "c").gpus == 2  # 4 members, half a GPU each


def test_other_commands_start_without_the_kubernetes_client() -> None:
    code = "import sys, whalepod.cli as c; c.parser(); print('kubernetes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
