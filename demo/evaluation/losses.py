"""Cross-entropy: our engine, transformers, number formats; expert load."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches import Source
from demo.net.parameters import unstack
from demo.net.whole import Net
from demo.weights import load_parts
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.whole import WholeModel

LENGTH = 512


def held_out_rows(source: Source, rows: int, seed: int = 10**9) -> dict[str, list[list[int]]]:
    """Token rows of `LENGTH + 1` by kind, which no training batch contained."""
    rng = Random(seed)
    return {
        kind: [source.row(rng, kind, LENGTH)[0].tolist() for _ in range(rows)]
        for kind in ("text", "short", "recall")
    }


def engine_loss(model: WholeModel, rows: list[list[int]]) -> float:
    """Mean nats per token."""
    total = 0.0
    for row in rows:
        state = model.new_state(len(row))
        logits = model.forward(state, row[:-1]).float()
        model.release(state)
        total += F.cross_entropy(logits, torch.tensor(row[1:])).item()
    return total / len(rows)


def library_loss(folder: Path, rows: list[list[int]]) -> float:
    """The same through transformers in fp32, which reads the checkpoint itself."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    quantization = FineGrainedFP8Config(
        dequantize=True, scale_fmt="ue8m0", weight_block_size=(128, 128), expert_dtype="fp4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = model.float().eval()
    total = 0.0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids[:, :-1]).logits[0].float()
        total += F.cross_entropy(logits, ids[0, 1:]).item()
    return total / len(rows)


def formats(folder: Path, weights: Path, rows: list[list[int]]) -> dict[str, float]:
    """Loss of the unrounded parameters, the checkpoint, and the checkpoint as released models run."""
    checkpoint = Checkpoint.open(folder)
    config, stored = checkpoint.config, checkpoint.everything()
    trained = unstack(load_parts(weights), config)
    return {
        "unquantised": engine_loss(WholeModel(config, trained), rows),
        "quantised": engine_loss(WholeModel(config, stored), rows),
        "released": engine_loss(WholeModel(config, stored, fidelity="released"), rows),
    }


def load_by_layer(weights: Path, config: object, rows: list[list[int]]) -> list[float]:
    """Tokens of the busiest expert over the mean, layer by layer, the MTP block last."""
    net = Net(config, load_parts(weights), torch.float32)  # type: ignore[arg-type]
    total: Tensor | None = None
    for first in range(0, len(rows), 8):
        ids = torch.tensor(rows[first : first + 8])
        load = net.losses(ids, torch.ones(len(ids), LENGTH)).load
        total = load if total is None else total + load
    assert total is not None
    return [round(float(row.max() / row.mean()), 2) for row in total]
