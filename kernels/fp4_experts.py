"""Routed experts over weights that stay FP4 in memory: one output row per (token, choice).

Legend: T tokens, K choices a token, D hidden width, I intermediate width, E experts of the model,
S experts held here, R = T * K pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from whalepod.kernels import fp4_experts_hopper
from whalepod.kernels.act_quant import round_fp8
from whalepod.kernels.fp4 import Fp4Stack, decode
from whalepod.kernels.jit import INTERPRETED, runs, triton
from whalepod.kernels.linear import linear
from whalepod.kernels.overlap import LATE, early
from whalepod.kernels.registry import Kernel
from whalepod.kernels.route import Alone, Blocks, Route, route
from whalepod.kernels.swiglu import swiglu


class Tiles(NamedTuple):
    """Rows of a block, `(outputs, warps)` of a tile of either launch, stages of both.

    Experts of more than twice `rows` pairs get launches of their own, with blocks of `crowd` rows: a few
    crowded experts among many are what random or narrow prompts make. Theirs come first, and the others'
    programs fill a GPU that those do not any more.
    """

    rows: int
    up: tuple[int, int]
    down: tuple[int, int]
    stages: int
    crowd: int = 0


# More rows a block share the decoding, empty ones waste products: by the rows an expert has on
# average. A few pairs alone need small tiles to occupy a GPU. Four warps and no more: with eight,
# Triton 3.6 lets one half overwrite inputs that the other still multiplies (tests/test_gpu_rows.py).
_FEW_PAIRS, _FEW = 8, Tiles(16, (64, 4), (64, 4), 4)
_TILES = (
    (3, Tiles(16, (128, 4), (128, 4), 4)),
    (14, Tiles(16, (128, 4), (128, 4), 4, 64)),
    (28, Tiles(32, (128, 4), (128, 4), 3, 128)),
    (80, Tiles(64, (128, 4), (128, 4), 3)),
    (1 << 40, Tiles(128, (128, 4), (128, 4), 3)),
)
# Products in fp32 have no matrix units: larger tiles would take minutes to compile.
_IN_FP32 = Tiles(32, (64, 4), (64, 4), 3)


def tiles_of(pairs: int, held: int) -> Tiles:
    """How to cut the work."""
    if pairs <= _FEW_PAIRS:
        return _FEW
    return next(tiles for most, tiles in _TILES if pairs <= most * held)


class Launch(NamedTuple):
    """Of the first `blocks`, those of more than `least` rows and at most `tiles.rows`.

    `alongside`: another launch of the same product has just been made.
    """

    least: int
    blocks: int
    tiles: Tiles
    alongside: bool = False


@Kernel
def fp4_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    slot_of_E: Tensor,
    w13: Fp4Stack,
    w2: Fp4Stack,
    limit: float,
    released: bool = False,
) -> Tensor:
    """Run every token through the experts chosen for it that are held here.

    `down(swiglu(gate(x), up(x)) * weight)`: gate and up are rounded to the dtype of `x_TD` before the
    clamped SwiGLU, which is computed in fp32, and so is the result before the down projection.

    Args:
        x_TD: `[T, D]` bf16 or fp32.
        experts_TK: `[T, K]` int32 or int64. weights_TK: `[T, K]` fp32.
        slot_of_E: `[E]` int32: which matrix of the stacks an expert is, -1 for one not held here.
        w13: S matrices `[2I, D]`, gate rows then up rows. w2: S matrices `[D, I]`.
        limit: clamp of the pre-activations, as for `swiglu`.
        released: round inputs and intermediates to FP8 in blocks of 128 columns (`round_fp8`).

    Returns:
        `[T, K, D]` in the dtype of `x_TD`; zeros where the expert is not held here. A row does not
        depend on the other rows, nor on how many there are.
    """
    tokens, k = experts_TK.shape
    x = round_fp8.reference(x_TD) if released else x_TD
    out = x_TD.new_zeros(tokens * k, w2.rows)
    inside = (experts_TK >= 0) & (experts_TK < slot_of_E.numel())
    slots = slot_of_E[experts_TK.clamp(0, slot_of_E.numel() - 1).long()].masked_fill(~inside, -1)
    for slot in range(w13.count):
        pairs = (slots.flatten() == slot).nonzero()[:, 0]
        gate_up = linear.reference(x[pairs // k].float(), decode(_one(w13, slot))[0])
        inner = swiglu.reference(gate_up.to(x.dtype), limit, weights_TK.flatten()[pairs])
        inner = round_fp8.reference(inner) if released else inner
        out[pairs] = linear.reference(inner.float(), decode(_one(w2, slot))[0]).to(x.dtype)
    return out.view(tokens, k, w2.rows)


def _one(stack: Fp4Stack, slot: int) -> Fp4Stack:
    part = slice(slot, slot + 1)
    return Fp4Stack(stack.codes[part], stack.scales[part], stack.gain[part], stack.columns)


@fp4_experts.twin("triton", runs)
def _fp4_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    slot_of_E: Tensor,
    w13: Fp4Stack,
    w2: Fp4Stack,
    limit: float,
    released: bool = False,
) -> Tensor:
    tokens, k = experts_TK.shape
    pairs, held = tokens * k, w13.count
    tiles = _IN_FP32 if x_TD.dtype == torch.float32 else tiles_of(pairs, held)
    way, launches = _way(experts_TK, slot_of_E, held, tiles)
    x = round_fp8(x_TD) if released else x_TD.contiguous()
    # Rows of absent experts stay as they are; NumPy, which interprets, warns of what may lie there.
    inner = x.new_zeros(pairs, w2.columns) if INTERPRETED else x.new_empty(pairs, w2.columns)
    for launch in launches:
        gate_up(x, weights_TK.contiguous(), way, k, w13, limit, inner, launch)
    inner = round_fp8(inner) if released else inner
    out = x.new_empty(pairs, w2.rows)
    for launch in launches:
        down(inner, way, w2, out, launch)
    return out.view(tokens, k, w2.rows)


def _way(
    experts_TK: Tensor, slot_of_E: Tensor, held: int, tiles: Tiles
) -> tuple[Route | Alone, list[Launch]]:
    """Where the pairs go, and the launches for it."""
    tokens, k = experts_TK.shape
    if tokens == 1:
        return Alone(slot_of_E, experts_TK[0].contiguous()), [Launch(0, k, tiles)]
    crowds = tiles.crowd > 0 and tokens > 2 * tiles.rows  # a token chooses an expert once
    blocks = Blocks(tiles.rows, 2 * tiles.rows, tiles.crowd) if crowds else Blocks(tiles.rows)
    way = route(experts_TK, slot_of_E, held, blocks)
    rest = Launch(0, len(way.slots), tiles)
    most = min(len(way.slots), blocks.bound_crowded(tokens * k))
    if not most:
        return way, [rest]
    wide = tiles._replace(rows=tiles.crowd, stages=3)
    return way, [Launch(tiles.rows, most, wide), rest._replace(alongside=True)]


def _pointers(way: Route | Alone) -> tuple[Tensor | None, ...]:
    """`order`, `slots`, `starts`, `stops` and `used` as the kernels take them."""
    return way if isinstance(way, Route) else (*way, None, None, None)


def gate_up(
    x: Tensor, weights: Tensor, way: Route | Alone, k: int, w13: Fp4Stack, limit: float, out: Tensor,
    launch: Launch,
) -> None:  # fmt: skip
    """`out[place]` in the order of the route, `[R, I]`; absent experts' rows stay."""
    # One token's choice is one program, while the shared expert fills most processors on another branch: what
    # came early would share the few that have room.
    when = LATE if isinstance(way, Alone) else early()
    source, n, how = _cut(x, way, w13, out.shape[1], launch, launch.tiles.up)
    programs = triton.cdiv(2 * out.shape[1], n)
    if launch.blocks:
        source.gate_up_kernel[(programs * launch.blocks,)](
            x, w13.codes, w13.scales, w13.gain, weights, *_pointers(way), out, WIDTH=out.shape[1],
            COLUMNS=w13.columns, TOP=k, LIMIT=limit, TILES=programs, **how, **when,
        )  # fmt: skip


def down(
    inner: Tensor, way: Route | Alone, w2: Fp4Stack, out: Tensor, launch: Launch
) -> None:  # fmt: skip
    """Rows of the route to `out[pair]`, `[R, D]`; arguments as for `gate_up`."""
    source, n, how = _cut(inner, way, w2, w2.rows, launch, launch.tiles.down)
    programs = triton.cdiv(w2.rows, n)
    if launch.blocks:
        source.down_kernel[(programs * launch.blocks,)](
            inner, w2.codes, w2.scales, w2.gain, *_pointers(way), out, D=w2.rows,
            COLUMNS=w2.columns, TILES=programs, **how, **early(),
        )  # fmt: skip


def _cut(
    x: Tensor, way: Route | Alone, stack: Fp4Stack, outputs: int, launch: Launch, tile: tuple[int, int]
) -> tuple[Any, int, dict[str, Any]]:  # fmt: skip
    """The module of the kernel that suits, outputs of a program, and how it is launched."""
    alone = isinstance(way, Alone)
    how = {
        "BM": launch.tiles.rows, "LEAST": launch.least, "ALONGSIDE": launch.alongside,
        "EXPERTS": way.slot_of_E.numel() if isinstance(way, Alone) else 0,
    }  # fmt: skip
    cut = fp4_experts_hopper.cut_of(x, stack, outputs, launch.tiles.rows, alone)
    if cut is None:
        how |= {"EXACT": _exact(x), "num_warps": tile[1], "num_stages": launch.tiles.stages}
        return fp4_experts_triton, tile[0], how | {"BN": tile[0]}
    how |= {"STAGES": cut.stages, "TOGETHER": cut.together, "num_warps": cut.warps}
    return fp4_experts_gluon, cut.outputs, how | {"BN": cut.outputs}


def _exact(x: Tensor) -> bool:
    """Whether products are taken in fp32: for fp32 inputs, and where there are no bf16 products."""
    return INTERPRETED or x.dtype == torch.float32


if triton is not None:
    from whalepod.kernels import fp4_experts_gluon, fp4_experts_triton
