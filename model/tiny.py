"""Write a small random checkpoint in exactly the released format, for tests and first steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from whalepod.errors import ConfigError
from whalepod.model.names import Stored, TensorSpec, tensor_specs
from whalepod.model.quant import encode_fp4, encode_fp8
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny_tokenizer import small_tokenizer, tokenizer_config

_YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "o_groups": 2,
    "sliding_window": 128,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 3,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 65536,
    "rope_scaling": _YARN,
    "expert_dtype": "fp4",
}
PRESETS: dict[str, dict[str, Any]] = {
    # Every kind of layer once, and the MTP block.
    "tiny": {"num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 128, 0]},
    # The schedules of the two released models, cut short.
    "tiny-flash": {
        "num_hidden_layers": 7,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
        "n_routed_experts": 16,
    },
    "tiny-pro": {
        "num_hidden_layers": 6,
        "compress_ratios": [128, 128, 4, 128, 4, 128, 0],
        "num_attention_heads": 8,
        "o_groups": 4,
        "index_topk": 64,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    },
    # -Base: experts in FP8.
    "tiny-base": {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "expert_dtype": "fp8",
    },
}
_RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


def preset_config(preset: str) -> dict[str, Any]:
    """`config.json` of a preset, with the keys of the release. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    return {**_RELEASED, **_COMMON, **PRESETS[preset]}


def make_tiny(folder: str | Path, preset: str = "tiny", seed: int = 0) -> Path:
    """Write a random checkpoint: config, at least two shards with an index, tokenizer files.

    The same preset and seed give the same bytes.

    Raises:
        ConfigError: an unknown preset, or a folder that already holds a checkpoint.
    """
    config = preset_config(preset)
    out = Path(folder)
    if (out / "config.json").exists():
        raise ConfigError(f"{out} already holds a checkpoint; name another folder or remove it")
    generator = torch.Generator().manual_seed(seed)
    model = ModelConfig.from_dict(config, f"preset {preset}")
    tensors: dict[str, Tensor] = {}
    for spec in tensor_specs(model, config["expert_dtype"]).values():
        if spec.stored is not Stored.SCALE:
            tensors.update(stored_tensors(spec, _random(spec, model, generator)))
    write_checkpoint(out, config, tensors, small_tokenizer(model.vocab_size))
    return out


def stored_tensors(spec: TensorSpec, value: Tensor) -> dict[str, Tensor]:
    """Round a value to its stored form; a quantised matrix gives weight and scale."""
    if spec.scale is not None:
        encode = encode_fp4 if spec.stored is Stored.FP4 else encode_fp8
        weight, scale = encode(value)
        return {spec.name: weight, spec.scale: scale}
    kind = {Stored.BF16: torch.bfloat16, Stored.F32: torch.float32, Stored.I64: torch.int64}
    return {spec.name: value.to(kind[spec.stored]).contiguous()}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    tokenizer_json: str,
    shard_bytes: int | None = None,
) -> list[Path]:
    """Write a folder as the release lays it out; returns the shards, at least two.

    Args:
        shard_bytes: size of a shard, exceeded by at most one tensor; default: half of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(t.nbytes for t in tensors.values())
    count = max(2, -(-total // (shard_bytes or total)))
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    before = 0
    for name, tensor in tensors.items():
        shards[before * count // total][name] = tensor
        before += tensor.nbytes
    paths = [
        folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata={"format": "pt"})
        # save_file leaves files to their owner alone; members may run as another user.
        path.chmod(0o666 & ~_umask())
    placed = {n: p.name for p, shard in zip(paths, shards, strict=True) for n in shard}
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": placed},
    )
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0},
    )
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    limit_tokens = int(config["max_position_embeddings"])
    (folder / "tokenizer_config.json").write_text(tokenizer_config(limit_tokens), encoding="utf-8")
    return paths


def _random(spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Values that exercise everything: biases, sinks and position rows are far from zero."""
    name, shape = spec.name, spec.shape
    if spec.stored is Stored.I64:
        scores = torch.rand(shape[0], config.n_routed_experts, generator=generator)
        return scores.topk(shape[1]).indices
    if spec.stored is Stored.FP4:
        shape = (shape[0], shape[1] * 2)
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("_scale"):
        return 1 + 0.05 * noise
    if name.endswith(("_base", "attn_sink", ".ape", "gate.bias")):
        return 0.5 * noise
    if name == "embed.weight":
        return noise
    # A sharper head makes greedy choices clear-cut, as a trained model's are.
    gain = 4.0 if name == "head.weight" else 1.0
    value: Tensor = gain * noise * shape[-1] ** -0.5
    return value


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
