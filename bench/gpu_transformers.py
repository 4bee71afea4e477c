"""Time transformers and whalepod one after the other on the same slice of V4-Flash, one GPU.

    PYTHONPATH=src:. python bench/gpu_transformers.py [--layers 4] [--batch 1 16 64] [--prompt 256]

Both decode greedily from random weights after a prompt of `--prompt` tokens a sequence; transformers in
bf16 with its batched kernels for experts (`grouped_mm`), whalepod with packed weights and whole steps
(graph, sampling, tokens on the host).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import gpu
from bench.decode_loop import step_seconds
from bench.gpu_step import RATIOS, Slice, prefill_line
from bench.machine import heading

from whalepod.engine.graph import DecodeGraphs
from whalepod.model.shape import ModelConfig

STEPS = 20


def repeated(step: Callable[[], object], steps: int = STEPS) -> float:
    """Median seconds of a step that ends with its tokens on the host."""
    times = []
    for _ in range(steps + 4):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[4:])


def transformers_model(config: ModelConfig) -> torch.nn.Module:
    """The slice with weights drawn on the GPU."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    keys = {k: v for k, v in config.model_dump().items() if v is not None}
    keys["quantization_config"] = None
    hub = DeepseekV4Config(**keys, attn_implementation="eager", experts_implementation="grouped_mm")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = DeepseekV4ForCausalLM(hub)
        model = model.to_empty(device="cuda").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
    for name, buffer in model.named_buffers():  # hash layers choose by tables of ids
        if not buffer.is_floating_point():
            buffer.random_(0, config.n_routed_experts)
            assert "tid2eid" in name, name
    return model  # type: ignore[no-any-return]


def time_transformers(
    model: torch.nn.Module, config: ModelConfig, batch: int, prompt: int
) -> float:
    """Steps of batched greedy decoding with transformers' cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, config.vocab_size, (batch, prompt), device="cuda")
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        token.tolist()

    return repeated(step)


def time_prefill(model: torch.nn.Module, config: ModelConfig, tokens: int) -> float:
    """Seconds of one prompt in one pass."""
    ids = torch.randint(0, config.vocab_size, (1, tokens), device="cuda")
    return repeated(lambda: model(ids, use_cache=False, logits_to_keep=1).logits.argmax().item(), 3)


def time_ours(found: Slice, batch: int, context: int) -> float:
    """Whole steps, as a member runs them."""
    graphs = DecodeGraphs(found.stage)
    return step_seconds(found.stage, graphs, found.experts, batch, context)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    known = ModelConfig.from_file(Path("configs/models/deepseek-v4-flash.json")).model_dump()
    ratios = [*RATIOS[: args.layers]]
    changes = {"num_hidden_layers": args.layers, "num_nextn_predict_layers": 0}
    config = ModelConfig.from_dict({**known, **changes, "compress_ratios": ratios})
    print(heading(" ".join(["python", *sys.argv])))
    print(f"\nCopy {gpu.copy_rate() / 1e9:.0f} GB/s. Layers {ratios}, 256 experts each.\n")
    with torch.inference_mode():
        model = transformers_model(config)
        theirs = {
            batch: time_transformers(model, config, batch, args.prompt) for batch in args.batch
        }
        long = time_prefill(model, config, args.prefill)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        blocks = max(max(args.batch) * -(-(args.prompt + 64) // 128), args.prefill // 128 + 1)
        found = Slice.of(config, "plain", "cuda", blocks)
        print("| batch | transformers ms a step | whalepod ms a step | times |\n|---|---|---|---|")
        for batch in args.batch:
            ours = time_ours(found, batch, args.prompt)
            print(
                f"| {batch} | {theirs[batch] * 1e3:.1f} | {ours * 1e3:.2f} "
                f"| {theirs[batch] / ours:.1f} |"
            )
        print(
            f"\nA prompt of {args.prefill:,} tokens in one pass: transformers {long * 1e3:.1f} ms, "
            f"{args.prefill / long:,.0f} tokens/s; whalepod: {prefill_line(found, args.prefill)}"
        )


if __name__ == "__main__":
    main()
