"""Calls of the Kubernetes API: what they return, and how each failure is told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kmock
import pytest
import yaml
from kube_api import NAMESPACE, Api, kubeconfig, refuse
from kube_world import CORE, CRD, DEPLOYMENTS, PODS, RAY, fill

from whalepod.cluster import kube_access
from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_access import COMMANDS, Access, install, rules
from whalepod.cluster.kube_objects import KubeError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    with found.serve():
        fill(found)
        yield found


@pytest.fixture
def kube(api: Api, tmp_path: Path) -> Iterator[Kube]:
    with Kube.open(api.kubeconfig(tmp_path), timeout_s=10) as found:
        yield found


def fault(call: Callable[[], object], expected: str) -> str:
    with pytest.raises(KubeError) as raised:
        call()
    assert raised.value.fault == expected, raised.value
    assert raised.value.fix
    return str(raised.value)


def test_lists_are_read_page_by_page(api: Api, kube: Kube) -> None:
    api.add("/api/v1/nodes", *({"metadata": {"name": f"x{i}"}} for i in range(1100)))
    names = [n["metadata"]["name"] for n in kube.nodes()]
    assert len(names) == len(set(names)) == 1103


def test_a_list_that_changes_under_its_pages_is_read_anew(api: Api, kube: Kube) -> None:
    asked: list[str | None] = []

    def page(request: object) -> object:
        asked.append(request.params.get("continue"))
        if len(asked) == 2:
            raise refuse(410)
        more = {} if len(asked) > 3 else {"continue": "t"}
        return {"items": [{"metadata": {"name": f"n{len(asked)}"}}], "metadata": more}

    api.on("get /api/v1/nodes", page)
    assert [n["metadata"]["name"] for n in kube.nodes()] == ["n3", "n4"]
    assert asked == [None, "t", None, "t"]


def test_a_list_that_never_holds_still_is_given_up(api: Api, kube: Kube) -> None:
    first = {"items": [], "metadata": {"continue": "t"}}
    api.on("get /api/v1/nodes", lambda r: refuse(410) if "continue" in r.params else first)
    assert "410" in fault(kube.nodes, "gone")


@pytest.mark.parametrize(
    ("status", "expected", "said"),
    [
        (401, "unauthorized", "log in again"),
        (403, "forbidden", "verb list on nodes; ask an administrator to bind the chart's Cluster"),
        (404, "not found", "check --namespace"),
        (409, "conflict", "try again"),
        (410, "gone", "too old"),
        (422, "refused", "does not take this request"),
        (429, "refused", "too much to do"),
        (500, "server", "administrator"),
        (503, "server", "administrator"),
        (504, "timeout", "waited in vain"),
    ],
)
def test_refusals(api: Api, kube: Kube, status: int, expected: str, said: str) -> None:
    api.on("get /api/v1/nodes", refuse(status, "because of the tide"))
    told = fault(kube.nodes, expected)
    assert f"list nodes on {api.url}: {status} because of the tide" in told
    assert said in told


def test_a_refusal_without_a_status_object(api: Api, kube: Kube) -> None:
    api.on("get /api/v1/nodes", kmock.Response(status=502, payload=b"<html>bad gateway</html>"))
    assert "502 <html>bad gateway" in fault(kube.nodes, "server")


def test_forbidden_in_a_namespace_names_the_role(api: Api, kube: Kube) -> None:
    api.on(f"get {PODS}", refuse(403))
    assert "the chart's Role in whale" in fault(lambda: kube.pods("a=b"), "forbidden")


def test_time_out_before_and_within_an_answer(api: Api, kube: Kube) -> None:
    kube.timeout_s = 0.2
    begun = time.monotonic()
    api.on("get /api/v1/nodes", lambda: asyncio.sleep(3))
    assert "within 0.2 s" in fault(kube.nodes, "timeout")
    drip = tuple(x for _ in range(30) for x in (b" ", lambda: asyncio.sleep(0.1)))
    api.on("get /api/v1/nodes", drip)
    assert "--timeout" in fault(kube.nodes, "timeout")
    assert time.monotonic() - begun < 3


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    path = tmp_path / "config"
    path.write_text(json.dumps(kubeconfig(url)))
    kube = Kube.open(str(path), timeout_s=2)
    assert url in fault(kube.version, "unreachable")

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "not known" in fault(kube.version, "unreachable")


def test_a_server_without_tls_or_with_a_broken_connection(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(json.dumps(kubeconfig(api.url.replace("http:", "https:"))))
    assert "connection failed" in fault(Kube.open(str(path)).version, "unreachable")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path.write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{listener.getsockname()[1]}")))
        kube = Kube.open(str(path), timeout_s=2)
        listener.settimeout(5)

        def cut() -> None:
            peer, _ = listener.accept()
            peer.recv(10000)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            peer.close()

        thread = threading.Thread(target=cut)
        thread.start()
        fault(kube.version, "unreachable")
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>log in</html>", "log in"),
        (b"[1]", "a JSON object"),
        (b"{}", "a list named items"),
        ({"items": {"a": 1}}, "a list named items"),
        ({"items": [1]}, "a list of objects"),
        ({"items": [{"kind": "Node"}]}, "metadata.name is None"),
        ({"items": [], "metadata": []}, "expected an object"),
    ],
)
def test_malformed_lists(api: Api, kube: Kube, answer: object, said: str) -> None:
    api.on("get /api/v1/nodes", answer)
    assert said in fault(kube.nodes, "malformed")


def test_malformed_answers_of_other_calls(api: Api, kube: Kube) -> None:
    api.on("get /version/", {"gitVersion": 1})
    fault(kube.version, "malformed")
    api.on("get /version/", {})
    assert "gitVersion" in fault(kube.version, "malformed")
    api.on("post /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {"status": {}})
    assert "status.allowed" in fault(lambda: kube.allowed(COMMANDS[:1]), "malformed")
    for event in (b"{\n", b'{"type": "ADDED"}\n', b'{"type": 3, "object": {}}\n'):
        api.on(f"get {PODS}", (event,))
        fault(lambda: list(kube.watch_pods("a=b", "7")), "malformed")


def test_what_is_not_there(api: Api, kube: Kube) -> None:
    api.on(f"get {CRD}/rayservices.ray.io", refuse(404))
    api.on(f"get {CORE}", refuse(404))
    assert kube.crd("rayservices.ray.io") is None
    assert kube.namespace_object() is None
    assert kube.kinds("keda.sh/v1alpha1") is None
    api.on(f"get {RAY}/rayservices", refuse(404))
    assert "KubeRay is not there" in fault(lambda: kube.ray("rayservices"), "not found")
    for path, call in (
        (f"{CRD}/rayservices.ray.io", lambda: kube.crd("rayservices.ray.io")),
        (CORE, kube.namespace_object),
        ("/apis/ray.io/v1", lambda: kube.kinds("ray.io/v1")),
        (f"{RAY}/rayclusters", lambda: kube.ray("rayclusters")),
    ):
        api.on(f"get {path}", refuse(403))
        fault(call, "forbidden")


def test_a_watch_ends_with_what_the_server_says(api: Api, kube: Kube) -> None:
    pod = {"metadata": {"name": "p", "resourceVersion": "8"}}
    good = {"type": "ADDED", "object": pod}
    api.on(f"get {PODS}", (good, {"type": "ERROR", "object": {"code": 410, "message": "too old"}}))
    events = kube.watch_pods("a=b", "7")
    assert next(events) == good
    assert "410 too old" in fault(lambda: next(events), "gone")
    asked = api.requests[-1].params
    assert asked["resourceVersion"] == "7"
    assert asked["watch"].lower() == "true"  # older clients write True
    api.on(f"get {PODS}", ({"type": "ERROR", "object": {"message": "?"}},))
    fault(lambda: list(kube.watch_pods("a=b", "7")), "server")


class TestKubeconfig:
    @pytest.fixture(autouse=True)
    def outside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.delenv("KUBECONFIG", raising=False)

    def test_namespace_and_context(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "config"
        path.write_text(json.dumps(kubeconfig("http://127.0.0.1:1")))
        monkeypatch.setenv("KUBECONFIG", str(path))
        assert Kube.open().namespace == NAMESPACE
        assert Kube.open(context="there").namespace == "default"
        assert Kube.open(namespace="mine").namespace == "mine"
        assert "context nowhere" in fault(lambda: Kube.open(context="nowhere"), "configuration")

    def test_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        told = fault(Kube.open, "configuration")
        assert "~/.kube/config cannot be used" in told
        assert "--kubeconfig" in told
        assert "/none" in fault(lambda: Kube.open("/none"), "configuration")

    @pytest.mark.parametrize("text", ["{", "[]", "3", "contexts: 3", "a: b", "kind: Config\n"])
    def test_of_another_shape(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "config"
        path.write_text(text)
        assert str(path) in fault(lambda: Kube.open(str(path)), "configuration")

    def test_in_a_pod(self, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from kubernetes.config import incluster_config

        from whalepod.cluster import kube_transport

        (tmp_path / "namespace").write_text("pod-space\n")
        monkeypatch.setattr(kube_transport, "_NAMESPACE_FILE", tmp_path / "namespace")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        assert "service account" in fault(Kube.open, "configuration")
        for name in ("token", "ca.crt"):
            (tmp_path / name).write_text("x")
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
        try:
            found = Kube.open()
        except OSError:  # the certificate is none; that the client reads it is enough
            return
        assert found.namespace == "pod-space"
        assert found.server == "https://127.0.0.1:443"


def called(api: Api) -> set[Access]:
    """What the server was asked for, as permissions."""
    found = set()
    for request in api.requests:
        inside = request.namespace is not None
        plural = request.resource.plural if request.resource else None
        if plural is None and not inside:
            path = request.url.path
            whole = path if path == "/version/" else f"/{path.split('/')[1]}/*"
            found.add(Access("get", namespaced=False, path=whole))
            continue
        if plural is None:
            found.add(Access("get", "namespaces"))
            continue
        part = (request.subresource or "").split("/")[0]
        verb = {"FETCH": "get"}.get(request.action.name, request.action.name.lower())
        verb = "watch" if "watch" in request.params else verb
        names = kube_access.CRDS if plural == "customresourcedefinitions" else ()
        resource = f"{plural}/{part}" if part else plural
        found.add(Access(verb, resource, request.resource.group, inside, names))
    return found


def test_the_rules_are_what_the_commands_call(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No call without a rule, no rule without a call."""
    from whalepod.cli import main

    config = api.kubeconfig(tmp_path)
    api.on(f"get {PODS}/deep-att-0/log", b"2026-01-31T12:00:00Z hello\n")
    manifests = tmp_path / "all.yaml"
    manifests.write_text(
        yaml.safe_dump_all(
            [
                {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "d"}},
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "d"}},
            ]
        )
    )
    main(["k8s", "preflight", "--kubeconfig", config, "--manifests", str(manifests)])
    main(["k8s", "status", "deep", "--kubeconfig", config])
    main(["k8s", "logs", "deep", "--kubeconfig", config, "--pod", "deep-att-0"])
    pod = {"metadata": {"name": "deep-att-0", "uid": "uid-deep-att-0"}}
    api.events = [{"type": "DELETED", "object": pod}]
    main(["k8s", "logs", "deep", "--kubeconfig", config, "--pod", "deep-att-0", "--follow"])
    assert called(api) == set(COMMANDS)


def test_the_charts_file_is_written_from_the_code() -> None:
    path = ROOT / "helm" / "whalepod" / "files" / "rbac.yaml"
    assert path.read_text() == kube_access.rbac()
    told = yaml.safe_load(path.read_text())
    granted = set()
    for scope, namespaced in (("role", True), ("clusterRole", False)):
        for rule in told[scope]:
            for verb in rule["verbs"]:
                for place in rule.get("nonResourceURLs", []):
                    granted.add(Access(verb, namespaced=False, path=place))
                for resource in rule.get("resources", []):
                    (group,) = rule["apiGroups"]
                    names = tuple(rule.get("resourceNames", ()))
                    granted.add(Access(verb, resource, group, namespaced, names))
    assert granted == set(COMMANDS)
    assert not any("*" in v or "*" in r for a in COMMANDS for v, r in [(a.verb, a.resource)])


def test_installing_needs_helms_verbs_on_each_kind() -> None:
    asked = install([("ray.io", "rayservices", True), ("", "secrets", True)])
    told = rules(asked)
    by_resource = {r["resources"][0]: set(r["verbs"]) for r in told}
    assert by_resource["rayservices"] == {"get", "create", "patch", "delete"}
    assert by_resource["secrets"] == {"get", "list", "create", "update", "patch", "delete"}
    assert len(asked) == len(set(asked))


def test_access_is_asked_as_it_will_be_used(api: Api, kube: Kube) -> None:
    api.denied = {("get", "pods/log"), ("get", "/version/")}
    asked = [*COMMANDS]
    refused = [a for a, yes in zip(asked, kube.allowed(asked), strict=True) if not yes]
    assert [str(a) for a in refused] == ["get pods/log", "get /version/"]
    specs = [r.data["spec"] for r in api.requests]
    resources = [s["resourceAttributes"] for s in specs if "resourceAttributes" in s]
    nodes = next(r for r in resources if r["resource"] == "nodes")
    assert nodes == {"verb": "list", "group": "", "resource": "nodes"}
    log = next(r for r in resources if r.get("subresource") == "log")
    assert log["namespace"] == NAMESPACE
    definition = next(r for r in resources if r["resource"] == "customresourcedefinitions")
    assert definition["name"] in kube_access.CRDS


def test_a_last_line_may_lack_its_end(api: Api, kube: Kube) -> None:
    api.on(f"get {PODS}/p/log", (b"1 a\n2 ", b"b", b"\n\n3 c"))
    assert list(kube.log("p", "ray")) == ["1 a", "2 b", "3 c"]


def test_operators_are_looked_for_where_asked(api: Api, kube: Kube) -> None:
    api.add(DEPLOYMENTS.replace("deployments", "namespaces/kr/deployments"))
    assert kube.deployments("a=b", "kr") == []
    assert api.requests[-1].namespace == "kr"
