"""The model's `config.json`, checked once, frozen after.

Field names are the keys of the released file, so that one can be read beside the other.
Source: DeepSeek-V4 `config.json` (V4-Pro, V4-Flash, and their -Base variants).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whalepod.errors import ConfigError

LayerKind = Literal["swa", "csa", "hca"]


class RopeScaling(BaseModel):
    """Static YaRN scaling of the compressed layers' rotary frequencies."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = 32
    beta_slow: float = 1


class ModelConfig(BaseModel):
    """Sizes and constants of one DeepSeek-V4 model."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["deepseek_v4"] = "deepseek_v4"
    vocab_size: int = Field(ge=2)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: Literal[1] = 1
    head_dim: int = Field(ge=2)
    qk_rope_head_dim: int = Field(ge=2)
    q_lora_rank: int = Field(ge=1)
    o_lora_rank: int = Field(ge=1)
    o_groups: int = Field(ge=1)
    sliding_window: int = Field(ge=1)
    compress_ratios: tuple[int, ...]
    index_n_heads: int = Field(default=64, ge=1)
    index_head_dim: int = Field(default=128, ge=2)
    index_topk: int = Field(default=512, ge=1)
    moe_intermediate_size: int = Field(ge=1)
    n_routed_experts: int = Field(ge=1)
    n_shared_experts: Literal[1] = 1
    num_experts_per_tok: int = Field(ge=1)
    num_hash_layers: int = Field(default=0, ge=0)
    scoring_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: Literal[True] = True
    routed_scaling_factor: float = 1.0
    swiglu_limit: float = Field(default=10.0, gt=0)
    hidden_act: Literal["silu"] = "silu"
    hc_mult: int = Field(default=4, ge=1)
    hc_sinkhorn_iters: int = Field(default=20, ge=1)
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = Field(default=1048576, ge=1)
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: Literal["fp4", "fp8"] | None = None
    quantization_config: dict[str, Any] | None = None
    dspark_block_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: Any) -> Any:
        """Accept the key `rope_type` beside `type` in `rope_scaling` (both generations occur)."""
        if isinstance(data, dict) and isinstance(data.get("rope_scaling"), dict):
            scaling = dict(data["rope_scaling"])
            scaling.setdefault("type", scaling.pop("rope_type", "yarn"))
            data = {**data, "rope_scaling": scaling}
        return data

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        wanted = self.num_hidden_layers + self.num_nextn_predict_layers
        problems = []
        if len(self.compress_ratios) < wanted:
            problems.append(
                f"compress_ratios has {len(self.compress_ratios)} entries; {self.num_hidden_layers} "
                f"layers + {self.num_nextn_predict_layers} MTP block(s) need at least {wanted}"
            )
        if self.num_attention_heads % self.o_groups:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"o_groups {self.o_groups}"
            )
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim >= self.head_dim:
            problems.append(
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even and below "
                f"head_dim {self.head_dim}"
            )
        if 4 in self.compress_ratios:
            if self.qk_rope_head_dim > self.index_head_dim:
                problems.append(
                    f"index_head_dim {self.index_head_dim} must hold the "
                    f"{self.qk_rope_head_dim} rotary dims"
                )
            if self.index_head_dim & (self.index_head_dim - 1):
                problems.append(f"index_head_dim {self.index_head_dim} must be a power of two")
        if self.num_experts_per_tok > self.n_routed_experts:
            problems.append(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.n_routed_experts}"
            )
        if self.num_hash_layers > self.num_hidden_layers:
            problems.append(
                f"num_hash_layers {self.num_hash_layers} exceeds "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if min(self.compress_ratios, default=0) < 0:
            problems.append(f"compress_ratios {self.compress_ratios} has a negative entry")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Check `data` (the parsed file). Raises ConfigError that names `source` and every fault."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']} (found {e['input']!r:.80})"
                for e in error.errors()
            )
            raise ConfigError(f"{source} is no DeepSeek-V4 configuration: {faults}") from None

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a `config.json`. Raises ConfigError when it is absent, no JSON or wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist; name a checkpoint folder that has a config.json"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror} for user {os.getuid()}; change its owner or mode"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}; expected a JSON object")
        return cls.from_dict(data, str(path))

    def ratio(self, layer: int) -> int:
        """Compression ratio of `layer`; index `num_hidden_layers` is the MTP block."""
        return self.compress_ratios[layer]

    def kind(self, layer: int) -> LayerKind:
        """`swa` (window only), `csa` (ratio 4, indexed) or `hca` (any other ratio, all entries)."""
        ratio = self.ratio(layer)
        return "swa" if ratio == 0 else "csa" if ratio == 4 else "hca"

    def is_hash(self, layer: int) -> bool:
        """Whether `layer` picks its experts by token id instead of by score."""
        return layer < self.num_hash_layers

    @property
    def layers(self) -> range:
        """Indices of the main stack (the MTP block comes after them)."""
        return range(self.num_hidden_layers)

    @property
    def hc_mixes(self) -> int:
        """Outputs of one mHC projection: pre, post and the square mixing matrix."""
        return (2 + self.hc_mult) * self.hc_mult

    @property
    def is_dspark(self) -> bool:
        """Whether `mtp.*` holds a DSpark drafter, which is no MTP block."""
        return self.dspark_block_size is not None
