"""The network policies, evaluated: who may reach whom on which port."""

import pytest
from chart.render import CASES, Doc, docs, groups, one, ray_spec

pytestmark = pytest.mark.helm
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
RAY_PORTS = (6379, 6380, 6381, 6382, 8265, 52365, 10002, 19999, 32768, 60999)


def _matches(selector: Doc, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(e["key"] in labels for e in selector.get("matchExpressions", []))


def _peer(peers: list[Doc] | None, labels: dict[str, str], namespace: str) -> bool:
    """Whether a pod is one of the peers; none named means everyone."""
    if not peers:
        return True
    for peer in peers:
        here = namespace == "serving"
        if "namespaceSelector" in peer:
            name = {"kubernetes.io/metadata.name": namespace}
            here = _matches(peer["namespaceSelector"], name)
        if here and _matches(peer.get("podSelector", {}), labels):
            return True
    return False


def _port(ports: list[Doc] | None, number: int, protocol: str) -> bool:
    return not ports or any(
        p.get("protocol", "TCP") == protocol and p["port"] <= number <= p.get("endPort", p["port"])
        for p in ports
    )


def _side(policies: list[Doc], way: str, pod: Doc, peer: Doc, port: int, protocol: str) -> bool:
    chosen = [p["spec"] for p in policies if _matches(p["spec"]["podSelector"], pod["labels"])]
    chosen = [spec for spec in chosen if way in spec["policyTypes"]]
    key = "from" if way == "Ingress" else "to"
    return not chosen or any(
        _peer(rule.get(key), peer["labels"], peer["namespace"])
        and _port(rule.get("ports"), port, protocol)
        for spec in chosen
        for rule in spec.get(way.lower()) or []
    )


def allowed(case: str, source: Doc, target: Doc, port: int, protocol: str = "TCP") -> bool:
    """Whether the release's policies let a connection through at both of its ends."""
    policies = [d for d in docs(case) if d["kind"] == "NetworkPolicy"]
    assert policies
    ends = (("Egress", source, target), ("Ingress", target, source))
    return all(
        pod["namespace"] != "serving" or _side(policies, way, pod, peer, port, protocol)
        for way, pod, peer in ends
    )


def _rules(case: str, ending: str, way: str) -> list[Doc]:
    rules: list[Doc] = one(docs(case), "NetworkPolicy", ending)["spec"][way]
    return rules


def role(case: str, name: str) -> Doc:
    labels = groups(ray_spec(docs(case)))[name]["template"]["metadata"]["labels"]
    return {"labels": labels, "namespace": "serving"}


def job(name: str) -> Doc:
    labels = {"app.kubernetes.io/name": "whalepod", "app.kubernetes.io/instance": "whale"}
    return {"labels": {**labels, "whalepod/job": name}, "namespace": "serving"}


def stranger(namespace: str, **labels: str) -> Doc:
    return {"labels": labels, "namespace": namespace}


def dns() -> Doc:
    return {"labels": {"k8s-app": "kube-dns"}, "namespace": "kube-system"}


WITH = [c for c in CASES if c != "open"]
every = pytest.mark.parametrize("case", WITH)


@every
def test_rays_pods_reach_each_other_on_rays_ports_only(case: str) -> None:
    roles = list(groups(ray_spec(docs(case))))
    for a in roles:
        for b in roles:
            for port in RAY_PORTS:
                assert allowed(case, role(case, a), role(case, b), port), (a, b, port)
            assert allowed(case, role(case, a), role(case, b), 40000, "UDP")
            assert not allowed(case, role(case, a), role(case, b), 22)
            assert not allowed(case, role(case, a), role(case, b), 10001)


@every
def test_members_may_ask_the_ingress_for_their_epoch(case: str) -> None:
    assert allowed(case, role(case, "attention"), role(case, "ingress"), 8000)


@every
def test_the_operator_asks_the_dashboard_and_nobody_else_does(case: str) -> None:
    operator = {"labels": OPERATOR, "namespace": "somewhere"}
    assert allowed(case, operator, role(case, "head"), 8265)
    assert not allowed(case, operator, role(case, "head"), 6379)
    for other in (stranger("serving", app="x"), stranger("default"), stranger("monitoring")):
        assert not allowed(case, other, role(case, "head"), 8265)
        assert not allowed(case, other, role(case, "head"), 6379)


@every
def test_clients_reach_the_ingress_and_nothing_behind_it(case: str) -> None:
    client = stranger("serving", app="client")
    for port in (8000, 9000):
        assert allowed(case, client, role(case, "ingress"), port)
        assert not allowed(case, client, role(case, "attention"), port)
        assert not allowed(case, stranger("elsewhere"), role(case, "ingress"), port)


@every
def test_everyone_has_dns_and_nobody_the_world(case: str) -> None:
    pods = [role(case, r) for r in groups(ray_spec(docs(case)))]
    for pod in [*pods, job("model"), job("smoke"), job("deploy")]:
        assert allowed(case, pod, dns(), 53, "UDP")
        assert not allowed(case, pod, stranger("internet"), 80)
    for pod in pods[1:]:
        assert not allowed(case, pod, stranger("internet"), 443)


def test_gateway_prometheus_redis_hub_and_api_server_where_they_are_used() -> None:
    gateway = stranger("gateways")
    assert allowed("routed", gateway, role("routed", "ingress"), 9000)
    prometheus = stranger("monitoring")
    for port in (8000, 8080):
        assert allowed("monitored", prometheus, role("monitored", "ingress"), port)
        assert not allowed("laptop", prometheus, role("laptop", "ingress"), port)
    redis = stranger("redis")
    assert allowed("pro-afd", role("pro-afd", "head"), redis, 6379)
    assert allowed("autoscaled", role("autoscaled", "head"), redis, 6380)
    assert not allowed("laptop", role("laptop", "head"), redis, 6379)
    assert allowed("autoscaled", role("autoscaled", "head"), stranger("api"), 6443)
    assert not allowed("laptop", role("laptop", "head"), stranger("api"), 6443)
    assert allowed("minimal-flash", job("model"), stranger("internet"), 443)
    for port, way in ((443, True), (3128, True), (8080, False)):
        assert _port(_rules("nvlink-domain", "-model", "egress")[0]["ports"], port, "TCP") is way
    assert not allowed("air-gapped", job("model"), stranger("internet"), 443)


def test_jobs_reach_what_they_are_for() -> None:
    assert allowed("autoscaled", job("deploy"), role("autoscaled", "head"), 8265)
    assert not allowed("laptop", job("deploy"), role("laptop", "head"), 8265)
    for port in (8000, 9000):
        assert allowed("laptop", job("smoke"), role("laptop", "ingress"), port)
    assert not allowed("laptop", job("smoke"), role("laptop", "experts"), 8000)


def test_policies_can_be_left_out() -> None:
    assert not [d for d in docs("open") if d["kind"] == "NetworkPolicy"]
