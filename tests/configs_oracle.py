"""Small models in the released `config.json` format, between them every shape the layers can take.

Keys are those of the released file, so one dict serves the code under test and the oracles. The
seed of each is one for which no router or indexer choice is decided by a hair (see
`test_fidelity.py`), so that two correct fp32 programs make the same choices on any machine.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def yarn(factor: float, original: int) -> Config:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
    }


BASE: Config = {
    "model_type": "deepseek_v4",
    "vocab_size": 192,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 48,
    "o_lora_rank": 24,
    "o_groups": 4,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 6,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": yarn(4, 64),
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS: dict[str, Config] = {
    "pro": BASE
    | {
        "num_hidden_layers": 6,
        "compress_ratios": [128, 128, 4, 128, 4, 128, 0],
        "num_hash_layers": 3,
        "routed_scaling_factor": 2.5,
        "n_routed_experts": 12,
        "num_experts_per_tok": 6,
    },
    "flash": BASE
    | {
        "num_hidden_layers": 5,
        "compress_ratios": [0, 0, 4, 128, 4, 0],
        "num_hash_layers": 3,
        "num_attention_heads": 4,
        "o_groups": 2,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
    },
    "mixed": BASE,
    "window_128": BASE
    | {
        "sliding_window": 128,
        "compress_ratios": [4, 0, 128, 4, 0],
        "num_hash_layers": 0,
        "index_topk": 24,
    },
    "no_yarn": BASE
    | {
        "rope_scaling": None,
        "o_groups": 1,
        "num_attention_heads": 6,
        "compress_ratios": [128, 4, 0, 4, 0],
        "head_dim": 48,
        "qk_rope_head_dim": 16,
        "num_experts_per_tok": 1,
    },
    "clamped": BASE
    | {
        # Small enough that about a third of the pre-activations are clamped.
        "swiglu_limit": 0.4,
        "num_hidden_layers": 3,
        "compress_ratios": [4, 128, 0, 0],
        "num_hash_layers": 0,
        "n_routed_experts": 6,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.0,
    },
    "two_heads": BASE
    | {
        "num_hidden_layers": 3,
        "compress_ratios": [4, 4, 128, 0],
        "num_attention_heads": 2,
        "o_groups": 2,
        "index_n_heads": 12,
        "index_topk": 3,
        "rope_scaling": yarn(16, 32),
        "max_position_embeddings": 512,
        "q_lora_rank": 20,
    },
    "swa_only": BASE
    | {
        "num_hidden_layers": 2,
        "compress_ratios": [0, 0, 0],
        "num_hash_layers": 1,
        "num_attention_heads": 3,
        "o_groups": 1,
        "n_routed_experts": 5,
        "num_experts_per_tok": 5,
    },
    "few_sinkhorn": BASE
    | {
        # With two iterations the mixing matrices have not converged, so their order shows.
        "hc_sinkhorn_iters": 2,
        "hc_eps": 1e-2,
        "compress_ratios": [128, 4, 128, 0, 0],
        "num_hash_layers": 3,
        "index_head_dim": 32,
    },
    "ratio_8": BASE
    | {
        # Any ratio but 0 and 4 pools without overlap and without an indexer: many entries here.
        "compress_ratios": [8, 4, 0, 8, 0],
        "num_hash_layers": 2,
        "index_topk": 8,
        "n_routed_experts": 9,
        "num_experts_per_tok": 4,
    },
}
SEEDS: dict[str, int] = {
    "pro": 3,
    "flash": 1,
    "mixed": 0,
    "window_128": 0,
    "no_yarn": 1,
    "clamped": 0,
    "two_heads": 0,
    "swa_only": 0,
    "few_sinkhorn": 1,
    "ratio_8": 6,
}
