"""Topologies that cannot work are refused, with the value's name and the way out."""

import pytest
from chart.render import CHART, helm

pytestmark = pytest.mark.helm
FLASH, DEMO, CUSTOM = "model.preset=flash", "model.preset=demo", "model.preset=custom"
OWN = f"{CUSTOM},model.source=image,model.path=/m"

TEMPLATE = {  # refused by the templates: the message names value, fault and way out
    "no model": ("", "model.preset is empty; name the model"),
    "latest": (f"{FLASH},image.tag=latest", "image.tag is latest"),
    "long name": (f"{DEMO},fullnameOverride={'w' * 41}", "leave room for 40"),
    "bad name": (f"{DEMO},fullnameOverride=1whale", "begin it with a letter"),
    "old Ray": (f"{DEMO},rayVersion=2.59.0", "needs Ray 2.60"),
    "hub without repository": (f"{CUSTOM},model.source=huggingface", "model.repository is empty"),
    "claim not named": (f"{FLASH},model.source=pvc", "model.existingClaim is empty"),
    "folder not named": (f"{FLASH},model.source=pvc,model.existingClaim=c", "model.path is empty"),
    "relative image path": (f"{CUSTOM},model.source=image,model.path=m", 'model.path is "m"'),
    "image and claim": (f"{DEMO},model.existingClaim=c", "reads no claim"),
    "path leaves volume": (
        f"{FLASH},model.source=pvc,model.existingClaim=c,model.path=../x",
        "must not leave the volume",
    ),
    "claim too small": (f"{FLASH},model.volume.size=100Gi", "100Gi; the checkpoint has 159.6 GB"),
    "Pro's claim too small": ("model.preset=pro,model.volume.size=800Gi", "864.7 GB"),
    "size unknown": (
        f"{CUSTOM},model.source=huggingface,model.repository=a/b",
        "model.volume.size is not set",
    ),
    "single of two": (
        f"{DEMO},config.topology.layout=single,groups.attention.replicas=2",
        "has one member",
    ),
    "single with stages": (
        f"{DEMO},config.topology.layout=single,config.topology.stages=2",
        "set both to 1",
    ),
    "ep with stages": (f"{DEMO},config.topology.layout=ep,config.topology.stages=2", "no stages"),
    "drafts with stages": (
        f"{DEMO},config.engine.draft_tokens=1,config.topology.stages=2,groups.attention.replicas=2",
        "needs config.topology.stages=1",
    ),
    "Pro drafts on 32 H100": (
        "model.preset=pro,gpu.memoryMiB=81559,config.engine.draft_tokens=2,groups.experts.replicas=6",
        "groups.attention: each of 8 members must hold 102.9 GB",
    ),
    "stages do not divide": (
        f"{DEMO},groups.attention.replicas=3,config.topology.stages=2",
        "3 attention members cannot form replicas",
    ),
    "more stages than layers": (
        f"{OWN},model.layers=2,groups.attention.replicas=3,config.topology.stages=3",
        "the model has 2 layers",
    ),
    "more members than experts": (
        f"{OWN},model.experts=4,groups.experts.replicas=3",
        "6 members would share 4 experts",
    ),
    "Flash, ep, 8 H100": (
        f"{FLASH},config.topology.layout=ep,groups.attention.gpusPerHost=8",
        "must hold 83.9 GB of weights (dequantised to bf16, 32 of 256 experts a layer), "
        "but a GPU has 85.5 GB",
    ),
    "Flash on 4 H100": (f"{FLASH},groups.experts.gpusPerHost=3", "each of 3 members must hold"),
    "Flash in fp32": (f"{FLASH},config.model.dtype=fp32", "dequantised to fp32"),
    "Pro on 16 H200": ("model.preset=pro,groups.experts.replicas=1", "each of 8 members must hold"),
    "Pro, ep, 32 H200, bf16": (
        "model.preset=pro,config.topology.layout=ep,groups.attention.replicas=4",
        "must hold 147.9 GB",
    ),
    "Pro stored on 4 H100": (
        "model.preset=pro,gpu.weights=stored,gpu.memoryMiB=81559,config.topology.layout=ep,"
        "groups.attention.gpusPerHost=4",
        "as stored",
    ),
    "Flash on a CPU pod": (
        f"{FLASH},groups.attention.gpusPerHost=0,groups.experts.gpusPerHost=0",
        "raise groups.attention.resources.limits.memory",
    ),
    "more GPUs than a node": (f"{FLASH},groups.experts.gpusPerHost=9", "gpu.perNode=8"),
    "more members than slots": (f"{FLASH},groups.experts.members=8", "have room for 7"),
    "GPUs with gloo": (f"{FLASH},config.cluster.fabric=gloo", "computes on CPUs"),
    "nccl without GPUs": (f"{DEMO},config.cluster.fabric=nccl", "every member needs a GPU"),
    "half on GPUs": (f"{FLASH},groups.experts.gpusPerHost=0", "give all groups GPUs, or none"),
    "members beside GPUs": (f"{FLASH},groups.experts.membersPerHost=2", "is for CPU pods"),
    "shm above memory": (
        f"{DEMO},groups.experts.shmSize=4Gi",
        "shmSize 4Gi counts against the memory limit 3Gi",
    ),
    "grace below drain": (f"{DEMO},termination.graceSeconds=580", "drainSeconds + 30 = 600"),
    "drain below drain_s": (f"{DEMO},termination.drainSeconds=540", "config.cluster.drain_s=540"),
    "Recreate of a service": (f"{DEMO},upgradeStrategy=Recreate", "for kind=RayCluster only"),
    "NewCluster of a cluster": (
        f"{DEMO},kind=RayCluster,upgradeStrategy=NewCluster",
        "for kind=RayService only",
    ),
    "Redis not named": (f"{DEMO},gcsFaultTolerance.enabled=true", "redisAddress is empty"),
    "Redis user without Secret": (
        f"{DEMO},gcsFaultTolerance.enabled=true,gcsFaultTolerance.redisAddress=r:1,"
        "gcsFaultTolerance.redisUsername=u",
        "passwordSecretName",
    ),
    "open to all": (f"{DEMO},auth.ray.mode=disabled,networkPolicy.enabled=false", "run code for"),
    "bounds without scaler": (f"{DEMO},groups.experts.maxReplicas=3", "autoscaling.enabled=true"),
    "bounds upside down": (
        f"{DEMO},autoscaling.enabled=true,groups.experts.minReplicas=3,groups.experts.maxReplicas=2",
        "minReplicas 3 is above maxReplicas 2",
    ),
    "start out of bounds": (
        f"{DEMO},autoscaling.enabled=true,groups.experts.replicas=4,groups.experts.maxReplicas=2,"
        "groups.experts.minReplicas=1",
        "replicas 4 is not between",
    ),
    "RDMA without GPUs": (f"{DEMO},fabric.rdma.enabled=true", "RDMA serves nccl"),
    "NVLink without GPUs": (f"{DEMO},fabric.nvlinkDomain.mode=nodeAffinity", "no group has GPUs"),
    "NCCL without GPUs": (f"{DEMO},fabric.ncclEnv.NCCL_DEBUG=INFO", "gloo reads none of it"),
    "queue without scheduler": (f"{DEMO},gang.queue=q", "without gang.scheduler"),
    "root": (f"{DEMO},podSecurityContext.runAsNonRoot=false", "runAsNonRoot must be true"),
    "Ray's port": (f"{DEMO},config.server.http_port=8265", "which Ray uses itself"),
    "a worker's port": (f"{DEMO},config.server.grpc_port=12000", "which Ray uses itself"),
    "one port for two": (f"{DEMO},config.server.grpc_port=8000", "they need one each"),
    "route without Gateway": (f"{DEMO},gateway.httpRoute.enabled=true", "parentRefs is empty"),
    "gateway shut out": (
        f"{DEMO},gateway.grpcRoute.enabled=true,gateway.parentRefs[0].name=g",
        "networkPolicy.clients is empty",
    ),
    "Prometheus shut out": (
        f"{DEMO},monitoring.podMonitor.enabled=true,networkPolicy.monitoring=null",
        "networkPolicy.monitoring is empty",
    ),
    "Ingress without host": (
        f"{DEMO},ingress.enabled=true,networkPolicy.enabled=false",
        "ingress.host is empty",
    ),
    "gRPC without host": (
        f"{DEMO},ingress.grpc.enabled=true,networkPolicy.enabled=false",
        "ingress.grpc.host is empty",
    ),
    "gRPC without TLS": (
        f"{DEMO},ingress.grpc.enabled=true,ingress.grpc.host=h,networkPolicy.enabled=false",
        "ingress.tlsSecretName is empty",
    ),
}
SCHEMA = {  # refused by values.schema.json: helm names the path
    "unknown model": ("model.preset=v3", "preset"),
    "unknown key": (f"{DEMO},experts.replicas=2", "experts"),
    "misspelt key": (f"{DEMO},groups.experts.replica=2", "replica"),
    "no expert pods": (f"{DEMO},groups.experts.replicas=0", "replicas"),
    "text for a number": (f"{DEMO},groups.experts.replicas=two", "replicas"),
    "four micro-batches": (f"{DEMO},config.topology.micro_batches=4", "micro_batches"),
    "tiny cache": (f"{DEMO},config.engine.kv_tokens=64", "kv_tokens"),
    "unknown layout": (f"{DEMO},config.topology.layout=tp", "layout"),
    "broken digest": (f"{DEMO},image.digest=sha256:12", "digest"),
    "token in values": (f"{FLASH},model.download.token=hf_x", "token"),
    "port 80": (f"{DEMO},config.server.http_port=80", "http_port"),
    "foreign variable": (f"{FLASH},fabric.ncclEnv.LD_PRELOAD=x", "LD_PRELOAD"),
    "unknown kind": (f"{DEMO},kind=RayJob", "kind"),
    "incremental upgrade": (f"{DEMO},upgradeStrategy=NewClusterWithIncrementalUpgrade", "upgrade"),
}


@pytest.mark.parametrize("case", TEMPLATE)
def test_templates_refuse_with_a_sentence(case: str) -> None:
    values, message = TEMPLATE[case]
    done = helm("template", "whale", str(CHART), *(["--set", values] if values else []))
    assert done.returncode != 0, "this was rendered"
    assert message in done.stderr


@pytest.mark.parametrize("case", SCHEMA)
def test_the_schema_refuses_with_a_path(case: str) -> None:
    values, path = SCHEMA[case]
    done = helm("template", "whale", str(CHART), "--set", values)
    assert done.returncode != 0, "this was rendered"
    assert "don't meet the specifications of the schema" in done.stderr
    assert path in done.stderr
