"""Time the small fused kernels: hyper-connections, norms, window keys, compressors, the sampler.

`python -m bench.kernels_mhc [--compiled] [--only mixing]` on a machine with a GPU prints a Markdown table. Peers
run on the same inputs in the same run: the reference in torch, its compiled form, and transformers'
module. What can be captured is timed as a graph, peers too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from bench.gpu import Row, copy_rate, matrix_rate, table, timed, timed_eagerly
from bench.machine import heading
from torch import Tensor

from whalepod.kernels.compress import Pooling, compress_chunk, compress_decode
from whalepod.kernels.entries import Pages, Rounding
from whalepod.kernels.hyper_connection import Site, hc_post, hc_post_pre, hc_pre
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.sample import sample
from whalepod.kernels.window import window_rows

C, EPS, BF16 = 4, 1e-6, torch.bfloat16
MODELS = {"flash": (4096, 64), "pro": (7168, 128)}
VOCABULARY = 129_280
Call = Callable[..., Any]


def normal(*shape: int, kind: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Fresh normal values on the GPU."""
    return (size * torch.randn(shape, device="cuda")).to(kind)


def turns(count: int) -> Tensor:
    """Unit complex numbers, `[count, 32]`."""
    angles = 6.28 * torch.rand(count, 32, device="cuda")
    return torch.polar(torch.ones_like(angles), angles)


def sets(make: Callable[[], tuple[Any, ...]], nbytes: float) -> list[tuple[Any, ...]]:
    """So many inputs that they do not fit into the cache together."""
    return [make() for _ in range(max(1, min(32, round(120e6 / nbytes))))]


def compare(
    name: str, size: str, kernel: Any, inputs: list[tuple[Any, ...]], nbytes: float,
    others: dict[str, Call] | None = None, *, compiled: bool = False, captured: bool = True,
) -> Row:  # fmt: skip
    """Time a kernel, its reference and others on the same inputs."""

    def calls(function: Call) -> list[Callable[[], object]]:
        return [lambda x=x: function(*x) for x in inputs]  # type: ignore[misc]

    how = timed if captured else timed_eagerly
    peers = [("torch", how(calls(kernel.reference), 5))]
    if compiled:
        torch._dynamo.reset()
        peers.append(("torch.compile", how(calls(torch.compile(kernel.reference)), 5)))
    peers += [(n, timed(calls(f), 5)) for n, f in (others or {}).items()]
    return Row(name, size, timed(calls(kernel)), nbytes, 0.0, tuple(peers))


def transformers_site(site: Site, width: int) -> tuple[Call, Call]:
    """`hc_pre` and, after a block's output is spread, `hc_pre` again, as transformers does them."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer

    config: Any = SimpleNamespace(
        hc_mult=C, hc_sinkhorn_iters=20, hc_eps=EPS, rms_norm_eps=EPS, hidden_size=width
    )
    module, norm = peer.DeepseekV4HyperConnection(config), peer.DeepseekV4RMSNorm(width)
    module, norm = module.cuda().requires_grad_(False), norm.cuda().requires_grad_(False)
    module.fn.data, module.base.data = site.fn, site.base
    module.scale.data = torch.ones(3, device="cuda")

    def pre(x: Tensor, *_: Any) -> Any:
        post, comb, y = module(x.unsqueeze(0))
        return post, comb, norm(y)

    def post_pre(f: Tensor, x: Tensor, post: Tensor, comb: Tensor, *_: Any) -> Any:
        mixed = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
        return pre(post.to(x.dtype).unsqueeze(-1) * f.unsqueeze(-2) + mixed)

    return pre, post_pre


def mixing(sizes: Sequence[int], compiled: bool) -> Iterator[Row]:
    """Hyper-connections; the floor reads the streams once and writes them once."""
    for model, (width, _) in MODELS.items():
        for t in sizes:
            stream, weights = 2 * t * width, 24 * C * width * 4

            def make(t: int = t, width: int = width) -> tuple[Any, ...]:
                site = Site(normal(24, C * width, size=0.01), normal(24), normal(24), 20, EPS, EPS)
                mix = (normal(t, C), normal(t, C, C, size=0.3), site, normal(width))
                return normal(t, width, kind=BF16), normal(t, C, width, kind=BF16), *mix

            floor = (2 * C + 2) * stream + weights
            inputs, size = sets(make, floor), f"{model} M={t}"
            theirs = transformers_site(inputs[0][4], width)
            fast = compiled and model == "flash" and t == 64
            yield compare(
                "hc_post_pre", size, hc_post_pre, inputs, floor, {"transformers": theirs[1]},
                compiled=fast,
            )  # fmt: skip
            some = [(x, site, norm) for _, x, _, _, site, norm in inputs]
            floor = (C + 1) * stream + weights
            yield compare("hc_pre", size, hc_pre, some, floor, {"transformers": theirs[0]})
            yield compare("hc_post", size, hc_post, [i[:4] for i in inputs], (2 * C + 1) * stream)


def small(sizes: Sequence[int], compiled: bool) -> Iterator[Row]:
    """Norms, query heads, window keys."""
    for model, (width, heads) in MODELS.items():
        for t in sizes:
            size = f"{model} M={t}"
            nbytes = 4 * t * width
            inputs = sets(
                lambda t=t, w=width: (normal(t, w, kind=BF16), normal(w), EPS), nbytes  # type: ignore[misc]
            )  # fmt: skip
            fast = compiled and model == "flash" and t == 64
            yield compare("rms_norm", size, rms_norm, inputs, nbytes, compiled=fast)
            nbytes = 4 * t * heads * 512
            inputs = sets(
                lambda t=t, h=heads: (normal(t, h, 512, kind=BF16), None, turns(t), EPS), nbytes  # type: ignore[misc]
            )  # fmt: skip
            yield compare("norm_rotate", size, norm_rotate, inputs, nbytes)
    for t in sizes:
        for form, rounding in (("bf16", "none"), ("released", "kv")):
            slots = min(t, 256)

            def make(
                t: int = t, form: str = form, rounding: str = rounding, slots: int = slots
            ) -> tuple[Any, ...]:
                rings: Any = normal(slots, 128, 512, kind=BF16)
                if form == "released":
                    bytes_ = torch.zeros(slots, 130 * 576, dtype=torch.uint8, device="cuda")
                    rings = Pages(bytes_, 128, 576, 8)
                at = torch.randint(0, 9999, (t,), device="cuda")
                used = torch.randperm(slots, device="cuda")
                kv = normal(t, 512, kind=BF16)
                return kv, normal(512), turns(t), EPS, rounding, rings, 128, used, at

            nbytes = t * (2048 + 256) + slots * (1024 if form == "bf16" else 584)
            inputs = sets(make, max(nbytes, 8e6))
            yield compare(
                "window_rows", f"{form} M={t}", window_rows, inputs, nbytes,
                captured=False,
            )  # fmt: skip


# Compressors: name, ratio, width, rounding, bytes of an entry.
COMPRESSORS: tuple[tuple[str, int, int, Rounding, int], ...] = (
    ("ratio 4", 4, 512, "kv", 584),
    ("indexer", 4, 128, "index", 68),
    ("ratio 128", 128, 512, "kv", 584),
)


def storage(width: int, per: int, blocks: int) -> Pages:
    """Pages of entries in the released byte layout."""
    data, scales = (576, 8) if width == 512 else (64, 4)
    stride = -(-per * (data + scales) // 576) * 576
    return Pages(torch.zeros(blocks, stride, dtype=torch.uint8, device="cuda"), per, data, scales)


def decoding(sizes: Sequence[int], compiled: bool) -> Iterator[Row]:
    """Compressors over decoding rows, at positions at random and where every window closes."""
    for name, ratio, width, rounding, entry in COMPRESSORS:
        channels, slots = width * (2 if ratio == 4 else 1), 8 if ratio == 4 else 128
        for t in sizes:
            for closing in (False, True):

                def make(
                    t: int = t, closing: bool = closing, ratio: int = ratio, width: int = width,
                    rounding: Rounding = rounding, channels: int = channels, slots: int = slots,
                ) -> tuple[Any, ...]:  # fmt: skip
                    how = Pooling(
                        normal(ratio, channels), normal(width), ratio, EPS, BF16, rounding
                    )
                    at = torch.randint(1, 8000, (t,), device="cuda")
                    at = at * ratio - 1 if closing else at
                    order, per = torch.randperm(t, device="cuda"), 128 // ratio
                    raw = normal(t, slots, 2, channels)
                    return (
                        normal(t, 2, channels), how, raw, storage(width, per, t), order, at, order,
                        per, turns(t),
                    )  # fmt: skip

                inputs_bytes = 16 * t * channels
                pooled = (slots - 1) * width * 8 + entry
                inputs = sets(make, inputs_bytes + t * pooled)
                closed = sum(int(((i[5] + 1) % ratio == 0).sum()) for i in inputs) / len(inputs)
                size = f"{name} M={t}{' all close' if closing else ''}"
                nbytes = inputs_bytes + closed * pooled
                yield compare(
                    "compress_decode", size, compress_decode, inputs, nbytes, captured=False
                )


def chunks(sizes: Sequence[int], compiled: bool) -> Iterator[Row]:
    """Compressors over prefill chunks; the biased gate logits are written back."""
    for name, ratio, width, rounding, entry in COMPRESSORS:
        channels, slots = width * (2 if ratio == 4 else 1), 8 if ratio == 4 else 128
        for t in sizes:

            def make(
                t: int = t, ratio: int = ratio, width: int = width, rounding: Rounding = rounding,
                channels: int = channels, slots: int = slots,
            ) -> tuple[Any, ...]:  # fmt: skip
                how = Pooling(normal(ratio, channels), normal(width), ratio, EPS, BF16, rounding)
                flat = torch.randperm(max(1, t // ratio), device="cuda")[: t // ratio]
                pages = storage(width, 128 // ratio, t // 128 + 1)
                rows, raw = normal(t, 2, channels), normal(slots, 2, channels)
                return rows, how, raw, pages, 0, flat, turns(t // ratio)

            nbytes = 12 * t * channels + t // ratio * entry
            inputs = sets(make, nbytes)
            yield compare(
                "compress_chunk", f"{name} M={t}", compress_chunk, inputs, nbytes, captured=False
            )


def sampling(sizes: Sequence[int], compiled: bool) -> Iterator[Row]:
    """The sampler over the logits of a text model (peaked) and over normal ones."""
    off = float("-inf")
    for name, spread, settings in (
        ("greedy", 2.0, (0.0, 0, 1.0, off)),
        ("top-p 0.95, peaked", 0.0, (1.0, 0, 0.95, off)),
        ("top-k 50, top-p 0.95, peaked", 0.0, (0.7, 50, 0.95, off)),
        ("temperature 1, peaked", 0.0, (1.0, 0, 1.0, off)),
        ("top-p 0.95, normal x 2", 2.0, (1.0, 0, 0.95, off)),
        ("temperature 1, normal x 2", 2.0, (1.0, 0, 1.0, off)),
    ):
        for t in sizes:

            def make(
                t: int = t, spread: float = spread, settings: tuple[float, ...] = settings
            ) -> tuple[Any, ...]:
                logits = normal(t, VOCABULARY, size=spread or 1.5)
                if not spread:  # probability falls with the square root of the rank's power
                    rank = torch.rand(t, VOCABULARY, device="cuda").neg_().add_(1)  # never 0
                    logits -= 1.5 * rank.mul_(VOCABULARY).log()
                chosen = torch.tensor([[*settings, 0.0]] * t, dtype=torch.float64)
                chosen[:, 4] = torch.rand(t)
                return logits, chosen.cuda()

            nbytes = 4.0 * t * VOCABULARY
            inputs = sets(make, nbytes)
            yield compare(
                "sample", f"{name} M={t}", sample, inputs, nbytes, {"a sort": sorted_draw},
                captured=False,
            )  # fmt: skip


def sorted_draw(logits: Tensor, settings: Tensor) -> Tensor:
    """Top-p and temperature over whole rows with a sort, as engines without a kernel do it."""
    temperature, p, u = settings[:, :1].clamp_min(1e-6), settings[:, 2:3], settings[:, 4:]
    ordered, ids = torch.sort(logits / temperature.float(), descending=True, stable=True)
    total = torch.softmax(ordered, -1).cumsum(-1)
    kept = total.gather(1, (total < p).sum(-1, keepdim=True).clamp_max(logits.shape[1] - 1))
    place = (total <= u * kept).sum(-1, keepdim=True)
    return ids.gather(1, place.clamp_max(logits.shape[1] - 1))


GROUPS = {
    "mixing": (mixing, (1, 16, 64, 128, 512, 4096)),
    "small": (small, (1, 64, 128, 4096)),
    "decoding": (decoding, (1, 16, 64, 128)),
    "chunks": (chunks, (512, 4096)),
    "sampling": (sampling, (1, 16, 64, 128)),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a peer")
    parser.add_argument("--only", nargs="*", default=(), choices=[*GROUPS])
    parser.add_argument("--sizes", nargs="*", type=int)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy, matrix = copy_rate(), matrix_rate()
    told = f"{heading('python -m bench.kernels_mhc')}, {torch.cuda.get_device_name()}"
    print(f"{told}, copy {copy / 1e9:.0f} GB/s\n")
    head, rule = table([], copy, matrix).splitlines()
    print(head, rule, sep="\n")
    for name, (group, usual) in GROUPS.items():
        if not arguments.only or name in arguments.only:
            for row in group(arguments.sizes or usual, arguments.compiled):
                print(table([row], copy, matrix).splitlines()[2], flush=True)
