"""What the chart makes around the cluster: presets, alerts, dashboard, routes, NVLink domains."""

import json
import re

import pytest
import yaml
from chart.render import CHART, ROOT, Doc, docs, groups, one, ray_spec

from whalepod.cluster import kube_access
from whalepod.ingress.grpc import NAME
from whalepod.metrics import Metrics
from whalepod.model.inspection import inspect_config

pytestmark = pytest.mark.helm


def test_presets_know_the_models() -> None:
    presets = yaml.safe_load((CHART / "files" / "presets.yaml").read_text())
    for name in ("flash", "pro"):
        preset = presets[name]
        file = ROOT / "configs" / "models" / f"deepseek-v4-{name}.json"
        told, sizes = inspect_config(file), {"attention": [0, 0], "experts": [0, 0], "mtp": [0, 0]}
        for line in told.splitlines():
            row = re.match(r"(\w[\w ]*?)\s{2,}\w+\s+[\d,]+\s+([\d,]+)\s+([\d,]+)$", line)
            if row and row[1] != "all":
                kind = {"mtp": "mtp", "routed": "experts"}.get(row[1].split()[0], "attention")
                side = sizes[kind]
                for i in (0, 1):
                    side[i] += int(row[i + 2].replace(",", ""))
        shape = json.loads(file.read_text())
        assert f"total_bytes {preset['bytes']} " in told
        assert preset["stored"] == {k: v[0] for k, v in sizes.items()}
        assert preset["parameters"] == {k: v[1] for k, v in sizes.items()}
        assert (preset["experts"], preset["layers"]) == _shape(shape)
    shipped = json.loads((ROOT / "models" / "demo" / "config.json").read_text())
    assert (presets["demo"]["experts"], presets["demo"]["layers"]) == _shape(shipped)


def _shape(config: Doc) -> tuple[int, int]:
    return config["n_routed_experts"], config["num_hidden_layers"]


def exported() -> set[str]:
    metrics = Metrics("m")
    metrics.finished("stop")
    metrics.rejected("overloaded")
    return set(re.findall(r"^(vllm:\w+)", metrics.render().decode(), re.M))


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    found = docs("monitored")
    rules = one(found, "PrometheusRule")["spec"]["groups"][0]["rules"]
    board = json.loads(one(found, "ConfigMap", "-dashboard")["data"]["whale-whalepod.json"])
    asked = [r["expr"] for r in rules] + [t["expr"] for p in board["panels"] for t in p["targets"]]
    for expression in asked:
        used = set(re.findall(r"vllm:\w+", expression))
        assert used <= exported(), expression
        assert used or expression.startswith("absent(up{")
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
    service = one(found, "Service", "-status")["metadata"]
    assert f'service="{service["name"]}"' in rules[0]["expr"]
    selector = one(found, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["labels"].items()


def test_routes_name_the_service_of_clients() -> None:
    found = docs("routed")
    method = one(found, "GRPCRoute")["spec"]["rules"][0]["matches"][0]["method"]
    assert method["service"] == NAME
    backends = [
        one(found, kind)["spec"]["rules"][0]["backendRefs"][0]
        for kind in ("HTTPRoute", "GRPCRoute")
    ]
    assert backends == [
        {"name": "whale-whalepod-serve-svc", "port": 8000},
        {"name": "whale-whalepod-serve-svc", "port": 9000},
    ]
    for ending in ("-http", "-grpc"):
        assert one(found, "Ingress", ending)["spec"]["tls"][0]["secretName"] == "whale-tls"


def test_a_compute_domain_spans_the_gpu_pods_which_claim_it() -> None:
    found = docs("nvlink-domain")
    domain = one(found, "ComputeDomain")["spec"]
    claim = domain["channel"]["resourceClaimTemplate"]["name"]
    made = groups(ray_spec(found))
    gpu = [g for r, g in made.items() if r in ("attention", "experts")]
    assert domain["numNodes"] == sum(g["replicas"] * g["numOfHosts"] for g in gpu)
    for group in gpu:
        spec = group["template"]["spec"]
        assert spec["resourceClaims"][0]["resourceClaimTemplateName"] == claim
        assert spec["containers"][0]["resources"]["claims"] == [{"name": "nvlink-domain"}]
    assert "resourceClaims" not in made["ingress"]["template"]["spec"]


def test_the_commands_role_is_what_the_commands_call() -> None:
    found = docs("overrides")
    for kind, namespaced in (("Role", True), ("ClusterRole", False)):
        wanted = kube_access.rules(a for a in kube_access.COMMANDS if a.namespaced == namespaced)
        assert one(found, kind)["rules"] == wanted
