"""`whalepod k8s status`: the release, its pods, and the members of the epoch in them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from kube_api import Api, refuse
from kube_world import PODS, RAY, RELEASE, STATUS, fill, member, pod, ray_cluster, report

from whalepod.cli import main
from whalepod.cluster.kube_objects import KubeError, age, dig, quantity, version_of
from whalepod.cluster.kube_status import Release, checked_report, join, pod_state, ray_state
from whalepod.cluster.report import Record
from whalepod.cluster.report import report as real_report
from whalepod.cluster.topology import MemberInfo
from whalepod.commands.k8s_show import members, spans


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    with found.serve():
        fill(found)
        yield found


class Run:
    def __init__(self, api: Api, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config, self.capsys = api.kubeconfig(folder), capsys

    def __call__(self, *arguments: str) -> str:
        main(["k8s", "status", *arguments, "--kubeconfig", self.config])
        return self.capsys.readouterr().out

    def json(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self(RELEASE, "--json", *arguments))

    def refused(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            self(*arguments)
        assert ended.value.code == 1
        said = self.capsys.readouterr().err
        assert said.startswith("whalepod: ")
        return said


@pytest.fixture
def run(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(api, tmp_path, capsys)


def test_table(api: Api, run: Run) -> None:
    lines = run(RELEASE).splitlines()
    assert lines[0] == "RayService deep: Running (cluster deep-abc, 2 serve endpoints)"
    assert lines[1] == "  Ready=True NonZeroServeEndpoints"
    assert lines[2] == "  application whalepod: RUNNING (attention HEALTHY, experts HEALTHY)"
    assert lines[3] == "RayCluster deep-abc: ready (2/2 workers ready)"
    assert lines[4] == "epoch 4: serving; fabric nccl"
    assert lines[5].split()[:3] == ["GROUP", "POD", "NODE"]
    assert [line.split()[:2] for line in lines[6:]] == [
        ["head", "deep-head"],
        ["attention", "deep-att-0"],
        ["experts", "deep-exp-0"],
    ]
    assert lines[7].endswith("rank 0 attention serving")
    assert lines[8].endswith("rank 1-2 expert serving")


def test_json(api: Api, run: Run) -> None:
    told = run.json()
    assert told["release"] == RELEASE
    assert told["namespace"] == "whale"
    assert told["report"]["epoch"] == 4
    assert told["report_error"] is None
    assert told["members_without_pod"] == []
    held = {p["name"]: [m["name"] for m in p["members"]] for p in told["pods"]}
    assert held == {"deep-head": [], "deep-att-0": ["a0"], "deep-exp-0": ["e0", "e1"]}
    assert told["ray"][0]["conditions"][0]["type"] == "Ready"


def test_trouble_is_shown(api: Api, run: Run) -> None:
    killed = {"reason": "OOMKilled", "exitCode": 137, "finishedAt": "2026-01-31T12:00:00Z"}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    status = {
        "name": "ray",
        "restartCount": 3,
        "state": waiting,
        "lastState": {"terminated": killed},
    }
    unplaced = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes fit"}],
        "containerStatuses": [],
    }
    api.add(
        PODS,
        pod("deep-exp-1", "experts", "10.0.0.4", status={"containerStatuses": [status]}),
        pod("deep-exp-2", "experts", "", status=unplaced),
    )
    api.on(f"get {STATUS}", {**report(member("e7", "experts", "10.9.9.9", None)), "ready": False})
    text = run(RELEASE)
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("experts ")}
    assert "CrashLoopBackOff  0/1    3" in rows["deep-exp-1"]
    assert "OOMKilled (137)" in rows["deep-exp-1"]
    assert "Unschedulable  " in rows["deep-exp-2"]
    assert "deep-exp-1: back-off 40s" in text
    assert "deep-exp-2: 0/3 nodes fit" in text
    assert "epoch 4: waiting for members" in text
    assert "member e7 on 10.9.9.9 (joining): no pod of the release has that address" in text


def test_an_upgrade_under_way(api: Api, run: Run) -> None:
    (service,) = api.store[f"{RAY}/rayservices"]
    status = service["status"]
    status["pendingServiceStatus"] = {"rayClusterName": "deep-def"}
    status["reason"] = "waiting"
    status["activeServiceStatus"]["applicationStatuses"]["whalepod"]["message"] = "a\nlast line\n"
    lines = run(RELEASE).splitlines()
    assert "cluster deep-def is being prepared" in lines[0]
    assert lines[1] == "  waiting"
    assert "    last line" in lines


def test_the_service_that_is_asked(api: Api, run: Run) -> None:
    path = f"get {STATUS}"
    api.on(path.replace("deep-status:serve", "front:80"), {**report(), "epoch": 9})
    assert run.json("--service", "front:80")["report"]["epoch"] == 9
    api.on(path.replace("deep-status", "front"), {**report(), "epoch": 10})
    assert run.json("--service", "front")["report"]["epoch"] == 10
    api.on(path, refuse(404))
    api.on(path.replace("deep-status", "deep-serve-svc"), {**report(), "epoch": 11})
    assert run.json()["report"]["epoch"] == 11


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refuse(403), "forbidden: needed: verb get on services/proxy"),
        (refuse(404), "404"),
        (refuse(503, "no endpoints available"), "no endpoints available"),
        ({"epoch": 1}, "no report of whalepod"),
        (b"<html>", "expected a JSON object"),
    ],
)
def test_pods_are_shown_without_a_report(api: Api, run: Run, answer: Any, said: str) -> None:
    api.on(f"get {STATUS}", answer)
    text = run(RELEASE)
    assert "epoch unknown: " in text
    assert said.removeprefix("forbidden: ") in text
    assert "deep-exp-0" in text
    told = run.json()
    assert told["report"] is None
    assert told["report_error"]


class TestAddress:
    @pytest.fixture
    def ingress(self) -> Iterator[HTTPServer]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b"no" if server.broken else json.dumps({**report(), "epoch": 77}).encode()
                self.send_response(200 if self.path == "/status" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.broken = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()

    def test_a_port_forward(self, api: Api, run: Run, ingress: HTTPServer) -> None:
        url = f"http://127.0.0.1:{ingress.server_port}/"
        assert run.json("--address", url)["report"]["epoch"] == 77
        assert not [r for r in api.requests if r.subresource]
        ingress.broken = True
        assert "does not answer with a report" in run.json("--address", url)["report_error"]

    def test_wrong_or_dead(self, api: Api, run: Run) -> None:
        assert "expected http://host:port" in run.refused(RELEASE, "--address", "here:80")
        assert "port-forward" in run.json("--address", "http://127.0.0.1:9")["report_error"]
        assert "port-forward" in run.json("--address", "http://[:9")["report_error"]


def test_no_such_release(api: Api, run: Run) -> None:
    said = run.refused("shallow")
    assert "no RayService and no RayCluster of a release shallow in namespace whale" in said
    assert "there are deep" in said
    for path in api.store:
        if path.startswith(RAY):
            api.store[path].clear()
    assert "there is no other" in run.refused("shallow")


@pytest.mark.parametrize(
    ("status", "said"), [(403, "bind the chart's Role"), (404, "KubeRay is not")]
)
def test_ray_objects_that_cannot_be_read(api: Api, run: Run, status: int, said: str) -> None:
    api.on(f"get {RAY}/rayservices", refuse(status))
    assert said in run.refused(RELEASE)


def test_pods_that_cannot_be_read(api: Api, run: Run) -> None:
    api.on(f"get {PODS}", refuse(403))
    assert "verb list on pods" in run.refused(RELEASE)
    api.on(f"get {PODS}", {"items": [{"metadata": {"name": "p"}, "status": {"phase": 3}}]})
    assert "object p: status.phase is 3, expected a text" in run.refused(RELEASE)


def test_a_ray_cluster_without_a_service_and_without_labels(api: Api, run: Run) -> None:
    api.store[f"{RAY}/rayservices"].clear()
    bare = ray_cluster()
    bare["metadata"] = {"name": "solo"}
    api.store[f"{RAY}/rayclusters"][:] = [bare]
    labels = {"ray.io/cluster": "solo", "app.kubernetes.io/instance": ""}
    api.store[PODS][:] = [pod("p", "experts", "10.0.0.3", labels=labels)]
    api.on(f"get {STATUS.replace('deep', 'solo')}", report(member("e", "experts", "10.0.0.3")))
    text = run("solo")
    assert "RayCluster solo: ready" in text
    assert "rank 0 expert serving" in text


def test_pods_of_both_clusters_of_an_upgrade() -> None:
    service = {
        "metadata": {"name": "s"},
        "status": {
            "activeServiceStatus": {"rayClusterName": "s-1"},
            "pendingServiceStatus": {"rayClusterName": "s-2"},
        },
    }
    found = Release("s", (service,), ())
    assert found.selectors() == ["app.kubernetes.io/instance=s", "ray.io/cluster in (s-1, s-2)"]
    told = ray_state(service)
    assert (told["active"], told["pending"]) == ("s-1", "s-2")


class TestPods:
    def state(self, **status: Any) -> tuple[str, str]:
        found = pod_state(pod("p", "experts", "1.1.1.1", status=status))
        return found.state, found.why

    def test_states(self) -> None:
        assert self.state() == ("Running", "")
        assert self.state(phase="Failed", reason="Evicted", message="disk") == ("Evicted", "disk")
        creating = {"state": {"waiting": {"reason": "ContainerCreating"}}}
        assert self.state(phase="Pending", containerStatuses=[creating]) == ("Pending", "")
        pulling = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such"}}}
        initial = {"initContainerStatuses": [pulling], "containerStatuses": [creating]}
        assert self.state(phase="Pending", **initial) == ("ImagePullBackOff", "no such")
        going = pod("p", "experts", "", metadata={"deletionTimestamp": "2026-01-31T12:00:00Z"})
        assert pod_state(going).state == "Terminating"

    def test_last_end(self) -> None:
        def ended(name: str, code: int, hour: int, when: str = "lastState") -> dict[str, Any]:
            end = {"exitCode": code, "finishedAt": f"2026-01-31T{hour}:00:00Z", "reason": "Error"}
            return {"name": name, when: {"terminated": end}}

        def last(*states: dict[str, Any]) -> Any:
            return pod_state(pod("p", "experts", "", status={"containerStatuses": [*states]})).last

        assert last() is None
        assert last(ended("a", 1, 10), ended("b", 2, 12))["container"] == "b"
        assert (
            last(ended("init", 0, 12, "state")) is None
        )  # an init container that has done its work
        assert last(ended("job", 3, 12, "state"))["exit_code"] == 3

    def test_a_reused_address_goes_to_the_running_pod(self) -> None:
        done = pod("a-job", "-", "10.0.0.9", status={"phase": "Succeeded"})
        live = pod("z-live", "experts", "10.0.0.9")
        for order in ([done, live], [live, done]):
            states, lost = join(order, report(member("e", "experts", "10.0.0.9")))
            assert {s.name: len(s.members) for s in states} == {"a-job": 0, "z-live": 1}
            assert lost == []


def test_members_are_shown_together() -> None:
    found = [member(f"m{r}", "experts", "h", r) for r in (5, 0, 1, 2)]
    found += [member("x", "attention", "h", None), member("y", "attention", "h", None)]
    assert members(found) == "rank 0-2,5 expert serving; 2 x attention joining"
    assert members([]) == "-"
    assert spans([]) == ""


@pytest.mark.parametrize(
    "wrong",
    [None, [], {}, {**report(), "epoch": True}, {**report(), "members": [3]},
     {**report(), "members": [{"name": "x"}]}, {**report(), "ready": 1}],
)  # fmt: skip
def test_reports_that_are_none(wrong: Any) -> None:
    with pytest.raises(KubeError, match="no report of whalepod"):
        checked_report(wrong, "here")


def test_a_real_report_is_taken() -> None:
    info = MemberInfo("m", "experts", host="10.0.0.3")
    told = checked_report(real_report(None, False, {"m": Record(info, None)}), "here")
    assert (told["epoch"], told["members"][0]["host"]) == (0, "10.0.0.3")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("500m", 0.5), ("64Gi", 64 * 2**30), ("1e3", 1000), ("2E", 2e18), ("1.5k", 1500)],
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "8Qi", "1.2.3", "--1", "8 Gi"])
def test_quantities_that_are_none(text: str) -> None:
    with pytest.raises(KubeError, match="is no quantity"):
        quantity(text)


def test_versions_and_ages() -> None:
    assert version_of("v1.33.4+k3s1") == (1, 33, 4)
    assert version_of("580.95.05") == (580, 95, 5)
    assert version_of("v1.30-eks") == (1, 30)
    assert version_of("nightly") is None
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    told = [age(t, now) for t in ("2026-01-31T11:58:30Z", "2026-01-31T11:30:00Z")]
    told += [age(t, now) for t in ("2026-01-31T06:00:00+00:00", "2026-01-01T12:00:00Z", None)]
    assert told == ["90s", "30m", "6h", "30d", "-"]
    with pytest.raises(KubeError, match="RFC 3339"):
        age("yesterday")


def test_digging_names_the_place() -> None:
    found = {"kind": "Pod", "metadata": {"name": "p"}, "spec": {"n": True}}
    assert dig(found, "spec", "x", kind=str, default="d") == "d"
    with pytest.raises(KubeError, match=r"Pod p: spec\.n is True, expected a whole number"):
        dig(found, "spec", "n", kind=int)
