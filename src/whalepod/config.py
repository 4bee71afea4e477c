"""The configuration file, checked once, frozen after."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whalepod.errors import ConfigError


class Section(BaseModel):
    """A part of the file. Unknown keys are errors; values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """Which weights, and in which arithmetic."""

    path: str = Field(description="checkpoint folder in the released DeepSeek-V4 format")
    name: str | None = Field(
        default=None, description="name that clients use; default: the folder's name"
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="compute type")
    fidelity: Literal["plain", "released"] = Field(
        default="plain",
        description="released: round activations and cache as the released weights were trained for",
    )

    @property
    def served_name(self) -> str:
        """The model id that clients send."""
        return self.name or Path(self.path).name


class Topology(Section):
    """How many members of each kind, and where the router sits."""

    layout: Literal["single", "ep", "afd"] = Field(
        default="afd",
        description="single: one member; ep: every member has all roles; afd: attention and "
        "experts apart",
    )
    attention: int = Field(default=1, ge=1, description="attention members; each has its own KV")
    experts: int = Field(default=2, ge=1, description="expert shards (afd)")
    router: Literal["own", "attention"] = Field(
        default="own",
        description="own: router members, 3 legs a layer; attention: in-process, 2 legs",
    )
    routers: int = Field(default=1, ge=1, description="router members when router is own")
    stages: int = Field(default=1, ge=1, description="pipeline stages of one attention replica")
    micro_batches: int = Field(default=2, ge=1, le=3, description="batches in flight in afd and ep")
    micro_batch_rows: int | None = Field(
        default=None,
        ge=1,
        description="a step is split only into batches of at least this many rows; "
        "unset: 16 on CPUs, 1024 on GPUs",
    )

    @model_validator(mode="after")
    def _layout_fits(self) -> Topology:
        if self.layout == "single" and (self.attention != 1 or self.stages != 1):
            raise ValueError(
                f"layout single has one member, not attention={self.attention} "
                f"stages={self.stages}; set both to 1, or layout to ep or afd"
            )
        if self.layout == "ep" and self.stages != 1:
            raise ValueError(f"layout ep has no stages (stages={self.stages}); use layout afd")
        return self


class Engine(Section):
    """Sizes of an attention member's batch and cache."""

    max_batch: int = Field(default=32, ge=1, description="requests that run at once per member")
    max_queue: int = Field(default=1024, ge=1, description="requests that may wait per member")
    max_queue_tokens: int = Field(
        default=1 << 20, ge=1, description="prompt tokens that may wait to be computed per member"
    )
    max_step_tokens: int = Field(default=512, ge=1, description="tokens in one forward pass")
    max_context: int | None = Field(
        default=None,
        ge=2,
        description="prompt + output tokens; default: the model's, at most 65536",
    )
    draft_tokens: int = Field(
        default=0,
        ge=0,
        le=3,
        description="tokens the MTP block drafts ahead, where that pays; 0: none",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="run decode steps of layout single, or of members over NCCL, as CUDA graphs; "
        "false: kernel by kernel",
    )
    deterministic: bool = Field(
        default=True,
        description="a request's bits depend on no other request, nor on chunks, layout or recovery; "
        "there is no other mode",
    )
    prefix_snapshots: int = Field(
        default=32,
        ge=0,
        description="states kept to go on from after a known prefix; 0: prefixes are not reused",
    )
    kv_tokens: int = Field(
        default=131072, ge=128, description="tokens of compressed KV over all requests of a member"
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="memory of an attention member for weights, KV and activations; sets kv_tokens",
    )
    kv_format: Literal["auto", "plain", "released"] = Field(
        default="auto",
        description="how entries are stored: in model.dtype, or FP8 with FP4 index keys as released",
    )

    @model_validator(mode="after")
    def _bits_are_kept(self) -> Engine:
        if not self.deterministic:
            raise ValueError(
                "deterministic=false is no mode: the kernels that keep bits are all there are, and no "
                "slower for it (bench/results/invariance.md); leave the key out, or true"
            )
        return self


Place = Literal["controller", "ingress", "attention", "experts", "router"]


class Cluster(Section):
    """How members find each other and notice each other's loss."""

    fabric: Literal["gloo", "nccl"] = Field(default="gloo", description="transport of the legs")
    step_deadline_s: float = Field(
        default=20.0, gt=0, description="a leg that takes longer counts its peer as dead"
    )
    ready_timeout_s: float = Field(
        default=120.0, gt=0, description="longest wait of a request for a serving epoch"
    )
    drain_s: float = Field(
        default=30.0, gt=0, description="how long a leaving member may finish its requests"
    )
    cpus_per_member: float = Field(default=0.1, ge=0, description="Ray CPUs a member reserves")
    gpus_per_member: float = Field(default=0.0, ge=0, description="Ray GPUs a member reserves")
    label_selector: dict[Place, dict[str, str]] = Field(
        default_factory=dict,
        description="Ray node labels that nodes must have to hold a pool's members, by pool",
    )


class Server(Section):
    """Where clients connect. Everything listens on loopback unless told otherwise."""

    host: str = Field(default="127.0.0.1", description="address of the HTTP and gRPC listeners")
    http: Literal["direct", "proxy"] = Field(
        default="direct",
        description="direct: ingress replicas listen themselves; proxy: Ray Serve's HTTP proxy does",
    )
    http_port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int = Field(default=9000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1, description="ingress replicas")
    default_thinking: bool = Field(
        default=True, description="whether chat thinks when a request does not say"
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="largest request body")


class Config(Section):
    """The whole file."""

    model: Model
    topology: Topology = Field(default_factory=Topology)
    engine: Engine = Field(default_factory=Engine)
    cluster: Cluster = Field(default_factory=Cluster)
    server: Server = Field(default_factory=Server)

    @model_validator(mode="after")
    def _drafts_fit(self) -> Config:
        if self.engine.draft_tokens and self.topology.stages > 1:
            raise ValueError(
                f"engine.draft_tokens={self.engine.draft_tokens} needs topology.stages=1 "
                f"(found {self.topology.stages}): drafts are made where both ends of the model are"
            )
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> Config:
        if self.engine.kv_format == "released" and self.model.fidelity != "released":
            raise ValueError(
                "engine.kv_format=released needs model.fidelity=released (found "
                f"{self.model.fidelity}): only then are entries rounded to what it stores; use "
                "plain or auto"
            )
        return self

    @property
    def digest(self) -> str:
        """Hash of all that members must agree on (not pools' sizes and places); part of epochs."""
        shared = self.model_dump_json(
            exclude={
                "server": True,
                "topology": {"attention", "experts", "routers"},
                "cluster": {"label_selector"},
            }
        )
        return hashlib.sha256(shared.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "configuration") -> Config:
        """Check parsed YAML. Raises ConfigError that names `source`, key, value and the fault."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = "\n".join(
                f"  {'.'.join(map(str, e['loc'])) or 'file'}: "
                f"{e['msg'].removeprefix('Value error, ')} (found {e['input']!r:.80})"
                for e in error.errors()
            )
            raise ConfigError(f"{source} cannot be used:\n{faults}") from None

    @classmethod
    def from_file(cls, path: Path) -> Config:
        """Read a YAML file. Raises ConfigError when it is absent, no YAML or wrong."""
        return cls.from_dict(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises ConfigError that names the path and the line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected keys such as `model:`")
    return data
