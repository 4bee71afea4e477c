"""What every render must hold: Serve's configuration, placement, probes, drains, ports, secrets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chart.render import CASES, Doc, docs, groups, one, ray_spec, serve_config

from whalepod.actors.dashboard import serve_config as of_code
from whalepod.config import Config

pytestmark = pytest.mark.helm
every = pytest.mark.parametrize("case", CASES)


def config(found: list[Doc]) -> Config:
    made = one(found, "ConfigMap", "-scripts")["data"]["whalepod.yaml"]
    return Config.from_dict(yaml.safe_load(made))


def pods(found: list[Doc]) -> dict[str, Doc]:
    """Pod specs by what they are for: roles and jobs."""
    made = {role: g["template"]["spec"] for role, g in groups(ray_spec(found)).items()}
    for doc in found:
        if doc["kind"] == "Job":
            template = doc["spec"]["template"]
            made[template["metadata"]["labels"]["whalepod/job"]] = template["spec"]
        if doc["kind"] == "Pod":
            made["smoke"] = doc["spec"]
    return made


def containers(found: list[Doc]) -> list[Doc]:
    specs = pods(found).values()
    return [c for p in specs for c in (*p["containers"], *p.get("initContainers", []))]


def environment(container: Doc) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in container["env"]}


@every
def test_serve_configuration_is_what_the_command_prints(case: str) -> None:
    found = docs(case)
    assert serve_config(found) == of_code(config(found))


def test_the_command_itself_prints_it(tmp_path: Path) -> None:
    found = docs("pro-afd")
    file = tmp_path / "whalepod.yaml"
    file.write_text(one(found, "ConfigMap", "-scripts")["data"]["whalepod.yaml"])
    command = [sys.executable, "-m", "whalepod", "serve-config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout) == serve_config(found)


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's own
def test_ray_serve_takes_it(case: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config(docs(case)))
    assert schema.applications[0].name == "whalepod"


@every
def test_members_fit_the_pods_and_nothing_fits_the_head(case: str) -> None:
    found = docs(case)
    made, asked = groups(ray_spec(found)), config(found)
    sizes = {
        "attention": asked.topology.attention * asked.topology.stages,
        "experts": asked.topology.experts,
        "router": asked.topology.routers,
        "ingress": asked.server.replicas,
    }
    assert made["head"]["rayStartParams"]["num-cpus"] == "0"
    assert asked.cluster.cpus_per_member == 1
    for role, group in made.items():
        assert group["labels"] == {"whalepod/role": role}
        if role == "head":
            continue
        assert asked.cluster.label_selector[role] == group["labels"]
        hosts = group["replicas"] * group["numOfHosts"]
        assert sizes[role] <= int(group["resources"]["CPU"]) * hosts
        if role != "ingress":
            gpus = int(group["resources"].get("GPU", 0))
            assert sizes[role] * asked.cluster.gpus_per_member <= gpus * hosts
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert int(limits.get("nvidia.com/gpu", 0)) == gpus
    assert asked.cluster.label_selector["controller"]["whalepod/role"] in made


@every
def test_every_group_writes_its_bounds_out(case: str) -> None:
    for group in ray_spec(docs(case))["workerGroupSpecs"]:
        low, high = group["minReplicas"], group["maxReplicas"]
        assert 1 <= low <= group["replicas"] <= high
        assert group["numOfHosts"] >= 1


@every
def test_readiness_is_service_or_membership_never_kuberays_own(case: str) -> None:
    for role, group in groups(ray_spec(docs(case))).items():
        ray = group["template"]["spec"]["containers"][0]
        names = [p["name"] for p in ray["ports"]]
        assert ("serve" in names and "serve-grpc" in names) == (role in ("head", "ingress"))
        if role == "head":
            continue
        assert ray["livenessProbe"]["httpGet"]["port"] == 52365
        ready = ray["readinessProbe"]
        if role == "ingress":
            assert ready["httpGet"] == {"path": "/ready", "port": "serve"}
        elif "exec" in ready:
            assert re.search(r"/status$", ready["exec"]["command"][-1])
            assert environment(ray).keys() >= {"POD_IP"}
        else:
            assert ready["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_members_ask_an_ingress_that_is_not_ready_yet() -> None:
    found = docs("laptop")
    probe = pods(found)["experts"]["containers"][0]["readinessProbe"]["exec"]["command"][-1]
    service = one(found, "Service", "-status")
    assert probe == f"http://{service['metadata']['name']}:8000/status"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"]["whalepod/role"] == "ingress"


@every
def test_a_node_may_drain_before_it_is_killed(case: str) -> None:
    found = docs(case)
    for group in groups(ray_spec(found)).values():
        spec = group["template"]["spec"]
        env = environment(spec["containers"][0])
        drain = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert spec["terminationGracePeriodSeconds"] >= drain + 30
        assert drain > config(found).cluster.drain_s


@every
def test_ray_knows_its_authentication_and_health_check_everywhere(case: str) -> None:
    spec = ray_spec(docs(case))
    mode = spec.get("authOptions", {}).get("mode", "disabled")
    for group in groups(spec).values():
        env = environment(group["template"]["spec"]["containers"][0])
        assert env["RAY_AUTH_MODE"] == mode
        assert env["RAY_health_check_period_ms"] == "1000"
        assert env["RAY_health_check_failure_threshold"] == "3"


@every
def test_pods_have_no_rights(case: str) -> None:
    found = docs(case)
    scaled = ray_spec(found).get("enableInTreeAutoscaling", False)
    for role, spec in pods(found).items():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is (role == "head" and scaled)
    for container in containers(found):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
        devices = container.get("resources", {}).get("limits", {})
        rdma = any(key.startswith("rdma/") for key in devices)
        assert context["capabilities"].get("add", []) == (["IPC_LOCK"] if rdma else [])


@every
def test_what_is_written_is_mounted(case: str) -> None:
    for spec in pods(docs(case)).values():
        volumes = {v["name"]: v for v in spec["volumes"]}
        for container in spec["containers"]:
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes.keys()
            if container["name"].startswith("ray-"):
                assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
                assert "emptyDir" in volumes[mounts["/tmp"]]


@every
def test_images_are_pinned_and_secrets_referenced(case: str) -> None:
    found = docs(case)
    for container in containers(found):
        assert re.search(r":[\w.-]+$|@sha256:[0-9a-f]{64}$", container["image"])
        assert not container["image"].endswith(":latest")
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|KEY", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]
    assert not [d for d in found if d["kind"] == "Secret"]


@every
def test_the_checkpoint_is_where_the_configuration_says(case: str) -> None:
    found = docs(case)
    path, specs = config(found).model.path, pods(found)
    reads = [role for role in groups(ray_spec(found)) if role != "head"]
    if not path.startswith("/mnt/models/"):
        assert all("model" not in [v["name"] for v in specs[role]["volumes"]] for role in reads)
        return
    for role in reads:
        mounts = {m["mountPath"]: m["name"] for m in specs[role]["containers"][0]["volumeMounts"]}
        assert mounts["/mnt/models"] == "model"
    job = specs["model"]["containers"][0]
    assert job["args"][-1] == path
    if "--hub" in job["args"]:
        waits = [specs[role]["initContainers"][0]["command"][-2:] for role in reads]
        assert waits == [["--wait", path]] * len(reads)


@every
def test_the_service_leads_to_the_ingress_only(case: str) -> None:
    found = docs(case)
    ray = next(d for d in found if d["kind"] in ("RayService", "RayCluster"))
    if ray["kind"] == "RayService":
        ports = ray["spec"]["serveService"]["spec"]["ports"]
        assert ray["spec"]["excludeHeadPodFromServeSvc"] is True
    else:
        service = one(found, "Service", "-serve-svc")["spec"]
        assert service["selector"]["whalepod/role"] == "ingress"
        ports = service["ports"]
    # By name: KubeRay selects all workers, and only the ingress (and the head, which it leaves out)
    # have ports of these names.
    assert [p["targetPort"] for p in ports] == ["serve", "serve-grpc"]
    assert ports[1]["appProtocol"] == "kubernetes.io/h2c"


@every
def test_names_leave_room_for_kuberays_endings(case: str) -> None:
    for doc in docs(case):
        if doc["kind"] in ("RayService", "RayCluster"):
            assert len(doc["metadata"]["name"]) <= 40
