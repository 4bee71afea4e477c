"""Rendered objects against Kubernetes' schemas, KubeRay's definitions, and KubeRay's own rules."""

import copy

import pytest
from chart import crds
from chart.operator_rules import operator_errors
from chart.render import CASES, Doc, docs

pytestmark = pytest.mark.helm
VERSIONS = ("1.29", "1.33", "1.37")
CUSTOM = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/", "resource.nvidia.com/")


def ray(case: str) -> Doc:
    return next(d for d in docs(case) if d["kind"] in ("RayService", "RayCluster"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_core_objects_are_strictly_valid(case: str, version: str) -> None:
    import kubernetes_validate

    for doc in docs(case):
        if not doc["apiVersion"].startswith(CUSTOM):
            # An unknown kind raises, too.
            kubernetes_validate.validate(doc, version, strict=True)


def test_the_strict_validator_sees_a_misspelt_key() -> None:
    import kubernetes_validate

    doc = next(d for d in docs("laptop") if d["kind"] == "NetworkPolicy")
    doc["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.utils.ValidationError):
        kubernetes_validate.validate(doc, "1.37", strict=True)


@pytest.mark.parametrize("case", CASES)
def test_custom_resources_fit_their_definitions(case: str) -> None:
    custom = [d for d in docs(case) if d["apiVersion"].startswith(CUSTOM)]
    assert custom
    assert [e for d in custom for e in crds.errors(d)] == []


def test_the_definitions_see_typos_and_wrong_types() -> None:
    doc = ray("laptop")
    cluster = doc["spec"]["rayClusterConfig"]
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolicies"] = "Never"
    cluster["workerGroupSpecs"][0]["replica"] = 1
    cluster["workerGroupSpecs"][1]["replicas"] = "2"
    doc["spec"]["serveConfigV2"] = 1
    assert len(crds.errors(doc)) == 4


@pytest.mark.parametrize("case", CASES)
def test_the_operator_takes_it(case: str) -> None:
    assert operator_errors(ray(case)) == []


def _set(path: str, value: object):
    def change(doc: Doc) -> None:
        *keys, last = path.split(".")
        for key in keys:
            doc = doc[int(key)] if key.isdigit() else doc.setdefault(key, {})
        if isinstance(doc, list):
            doc.append(value)
        else:
            doc[last] = value

    return change


CLUSTER, GROUP = "spec.rayClusterConfig", "spec.rayClusterConfig.workerGroupSpecs.0"
HEAD = f"{CLUSTER}.headGroupSpec"
ENV = f"{HEAD}.template.spec.containers.0.env.-"
REDIS = {"redisAddress": "redis:6379"}
BROKEN = {
    "too long": [_set("metadata.name", "a" * 48)],
    "DNS-1035": [_set("metadata.name", "1st")],
    "upgradeStrategy.type": [_set("spec.upgradeStrategy.type", "Recreate")],
    "upgradeStrategy of a cluster": [_set(f"{CLUSTER}.upgradeStrategy", {"type": "None"})],
    "incremental": [_set("spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade")],
    "headService": [_set(f"{HEAD}.headService.metadata.name", "x")],
    "DeletionDelay": [_set("spec.rayClusterDeletionDelaySeconds", -1)],
    "initializing-timeout": [_set("metadata.annotations", {"ray.io/initializing-timeout": "soon"})],
    "not for a RayService": [_set(f"{CLUSTER}.authOptions.enableK8sTokenAuth", True)],
    "no container": [_set(f"{GROUP}.template.spec.containers", [])],
    "head has resources": [_set(f"{HEAD}.resources", {"CPU": "0"})],
    "ingress has resources": [_set(f"{GROUP}.rayStartParams.num-cpus", "1")],
    "rayStartParams.labels": [_set(f"{GROUP}.rayStartParams.labels", "a=b")],
    "illegal label": [_set(f"{GROUP}.labels", {"whalepod/role": "not legal!"})],
    "needs minReplicas": [_set(f"{GROUP}.minReplicas", None)],
    "negative bounds": [_set(f"{GROUP}.minReplicas", -1)],
    "above maxReplicas": [_set(f"{GROUP}.minReplicas", 9)],
    "idleTimeoutSeconds without": [_set(f"{GROUP}.idleTimeoutSeconds", 5)],
    "priority without": [_set(f"{GROUP}.priority", 1)],
    "suspended": [_set(f"{GROUP}.suspend", True), _set(f"{CLUSTER}.enableInTreeAutoscaling", True)],
    "feature gate": [_set(f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"})],
    "v2 without autoscaling": [_set(ENV, {"name": "RAY_enable_autoscaler_v2", "value": "1"})],
    "restartPolicy": [
        _set(f"{CLUSTER}.enableInTreeAutoscaling", True),
        _set(f"{CLUSTER}.autoscalerOptions", {"version": "v2"}),
        _set(f"{GROUP}.template.spec.restartPolicy", "Always"),
    ],
    "idleTimeoutSeconds is negative": [
        _set(f"{CLUSTER}.autoscalerOptions", {"idleTimeoutSeconds": -1})
    ],
    "is KubeRay's": [
        _set(f"{CLUSTER}.autoscalerOptions.env", [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}])
    ],
    "needs rayVersion": [_set(f"{CLUSTER}.rayVersion", "2.51.0")],
    "redis username": [_set(ENV, {"name": "REDIS_USERNAME", "value": "u"})],
    "RAY_REDIS_ADDRESS without": [_set(ENV, {"name": "RAY_REDIS_ADDRESS", "value": "r"})],
    "annotation ray.io/ft-enabled": [
        _set(f"{CLUSTER}.gcsFaultToleranceOptions", REDIS),
        _set("metadata.annotations", {"ray.io/ft-enabled": "true"}),
    ],
    "redis settings": [
        _set(f"{CLUSTER}.gcsFaultToleranceOptions", REDIS),
        _set(ENV, {"name": "REDIS_PASSWORD", "value": "p"}),
    ],
    "storage is for rocksdb": [
        _set(f"{CLUSTER}.gcsFaultToleranceOptions", {**REDIS, "storage": {}})
    ],
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_rule_of_the_operator_refuses(message: str) -> None:
    doc = copy.deepcopy(ray("laptop"))
    for change in BROKEN[message]:
        change(doc)
    assert any(message in error for error in operator_errors(doc)), operator_errors(doc)
