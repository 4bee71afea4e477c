"""Kernels compile for a Hopper GPU, with what launches specialise, on a machine without one.

The interpreter runs the same source and never sees what a compiler does: a size of 1 that becomes a
constant, types that two branches disagree on, operations that a target lacks.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.kernels import fp4_experts_hopper
from whalepod.kernels.dense import chunk_of
from whalepod.kernels.dense_hopper import Kind, cut_of, registers, room_of, shared_bytes
from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.jit import INTERPRETED, triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton is None or INTERPRETED, reason="no Triton that compiles here"),
]
BF16, FP32, I16, I32, I64 = "*bf16", "*fp32", "*i16", "*i32", "*i64"
Types = dict[str, str]


def compiled(function: Any, types: Types, constants: dict[str, Any], **options: int) -> Any:
    """Compile for sm_90; pointers are multiples of 16, and sizes "i32:16", as in a model."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import (
        GluonASTSource,
        GluonJITFunction,
    )

    names = function.arg_names
    types = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source(function, types, values, aligned), target=target, options=options)


def assembled(ptx: str) -> str:
    """What the assembler that comes with Triton has to say of a kernel."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [program, "-v", "-arch=sm_90a", "-", "-o", os.devnull]
    made = subprocess.run(command, input=ptx, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return made.stderr


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_products_of_few_rows(kind: str, rows: int) -> None:
    from whalepod.kernels.dense_triton import dense_kernel

    w, scales = (I16, FP32) if kind == "fp8" else (BF16, BF16)
    types = {"x": BF16, "xs": w, "w": w, "ws": scales, "out": FP32, "made": BF16, "counters": I32}
    few: dict[str, Any] = {"M": 1} if rows == 1 else {}
    constants = {
        **{"N": 1536, "COLUMNS": 4096, "KIND": kind, "GROUPS": 1, "CHUNK": 4, "APART": True},
        **{"JOIN": True, "BN": 64, "BM": 16, "EXACT": False, "EARLY": True, **few},
    }
    made = compiled(dense_kernel, {**types, "M": "i32"}, constants, num_warps=4, num_stages=4)
    assert "wgmma" in made.asm["ptx"]
    assert "atom" in made.asm["ptx"]


def product(kind: Kind, rows: int, n: int, columns: int) -> Any:
    """The kernel for a product with `[n, columns]`, compiled, and its cut."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from whalepod.kernels.dense_gluon import dense_kernel

    chunk = chunk_of(n, columns, 1, kind)
    cut = cut_of(kind, rows, n, columns, 1, -(-columns // 128 // chunk))
    form, codes, wide = {
        "fp8": ("bf16", "i16", 64),
        "bf16": ("bf16", "bf16", 64),
        "quant": ("fp8e4nv", "fp8e4nv", 128),
    }[kind]
    layout = NVMMASharedLayout(128, 1024 // wide, 2)
    x, w = (
        f"tensordesc<{t}[{tall}, {wide}],{layout!r}>"
        for t, tall in ((form, cut.rows), (codes, cut.outputs))
    )
    types = {"x": x, "xs": FP32, "w": w, "ws": FP32, "out": FP32, "made": BF16, "counters": I32}
    constants: dict[str, Any] = {
        **{"N": n, "COLUMNS": columns, "KIND": kind, "GROUPS": 1, "CHUNK": chunk},
        **{"APART": cut.apart, "SPAN": cut.span, "ROOM": room_of(columns)},
        **{"JOIN": rows == 1, "BN": cut.outputs, "BM": cut.rows, "STAGES": cut.stages},
        **{"EARLY": True, **({"M": 1} if rows == 1 else {})},
    }
    options = {"num_warps": cut.warps, **registers(kind, cut)}
    return compiled(dense_kernel, {**types, "M": "i32"}, constants, **options), cut


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("kind", ["fp8", "bf16", "quant"])
def test_products_in_gluon(kind: Kind, rows: int) -> None:
    made, cut = product(kind, rows, 1536, 4096)
    ptx = made.asm["ptx"]
    assert "wgmma" in ptx
    asked, waited = ptx.index("cp.async.bulk.tensor"), ptx.index("griddepcontrol.wait")
    assert asked < waited, "weights are asked for before the kernel waits for the one before it"
    assert shared_bytes(kind, cut) <= made.metadata.shared <= 227 << 10
    assert "serialized" not in assembled(ptx), "products wait for each other"


def test_two_programs_of_eight_warps_share_a_processor() -> None:
    made, cut = product("fp8", 128, 32768, 1024)
    assert (cut.warps, cut.stages) == (8, 2)
    assert made.metadata.shared <= 227 << 9
    said = assembled(made.asm["ptx"])
    assert "Used 128 registers" in said
    assert "0 bytes spill stores, 0 bytes spill loads" in said


def test_wide_tiles_leave_room_for_three_stages_on_their_way() -> None:
    made, cut = product("bf16", 256, 129_280, 4096)
    assert (cut.rows, cut.stages, cut.span) == (256, 4, 64)
    assert made.metadata.shared <= 227 << 10
    said = assembled(made.asm["ptx"])
    assert "serialized" not in said
    assert "0 bytes spill stores, 0 bytes spill loads" in said


def test_messages_of_fixed_sizes() -> None:
    from whalepod.kernels import hand_back, hand_out

    rest = {"K": 6, "WIDE": 1024, "EARLY": True}
    table = {"COLUMNS": hand_back.COLUMNS, "ITEM": 2, "EVEN": 8, **rest}
    types = {"ints": I32, "table": I64, "x": BF16, "ids": I32, "bits": I32, "D": "i32:16"}
    taken = compiled(hand_back._take_in_kernel, {"came": BF16, **types}, {"KP": 8, **table})
    assert "ld.global.v4" in taken.asm["ptx"], "rows are read sixteen bytes at a time"
    types |= {"came": I32, "out": BF16, "data": BF16}
    back = compiled(hand_back._hand_back_kernel, types, {"AT_ONCE": 256, **table})
    assert "st.global.v4" in back.asm["ptx"]
    types = {"x": BF16, "experts": I64, "weights": FP32, "holders": I64, "shards": I64}
    types |= dict.fromkeys(("out_step", "ids_step", "D"), "i32:16") | {"first": "i32", "out": BF16}
    types |= dict.fromkeys(("ids", "bits", "seals", "seal"), I32) | {"counts": I64}
    out = compiled(hand_out._hand_out_kernel, types, {"KP": 8, "R": 1, **rest})
    assert "st.global.v4" in out.asm["ptx"]
    types = {"back": BF16, "places": I32, "crowded": I32, "out": FP32}
    types |= dict.fromkeys(("back_step", "places_step", "D"), "i32:16")
    added = compiled(hand_out._sum_kernel, types, {"room": 1, "S": 4, **rest})
    assert "ld.global.v4" in added.asm["ptx"]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_attention_in_gluon(new: bool, listed: bool) -> None:
    from whalepod.kernels.attention_gluon import prefill_kernel

    types = dict.fromkeys(("q", "new", "rings", "pool", "out"), BF16)
    types |= dict.fromkeys(("rows", "table", "seen"), I32)
    types |= dict.fromkeys(("slots", "positions", "starts", "sequences"), I64)
    types |= dict.fromkeys(("sink", "turns", "scratch"), FP32) | {"scale": "fp32"}
    types |= dict.fromkeys(("listed", "width", "T", "FIRST", "HEADS"), "i32")
    sizes = {"H": 64, "D": 512, "RD": 64, "W": 128, "BN": 64, "PER": 1 if listed else 32}
    constants = {**sizes, "LISTED": listed, "SPLIT": 10, "NEW": new, "EARLY": True}
    made = compiled(prefill_kernel, types, constants, num_warps=8)
    assert "griddepcontrol.wait" in made.asm["ptx"]
    assert made.metadata.shared <= 227 << 10, "what a Hopper processor has"


@pytest.mark.parametrize("tokens", [1, 64])
def test_hyper_connections(tokens: int) -> None:
    from whalepod.kernels import hyper_connection_triton as hc

    types = {"f": BF16, "more": BF16, "x": BF16, "post": FP32, "comb": FP32, "out": BF16}
    types |= {"fn": FP32, "parts": FP32, "T": "i32"}
    constants: dict[str, Any] = {
        **{"D": 4096, "N": 24, "SPLITS": 4096 // hc.COLS, "TOP": 6, "PROJECT": True},
        **{"EXACT": False, "CUTS": False, "TOKENS": hc.TOKENS, "COLS": hc.COLS, "REPEAT": 1},
        **{"SWAP": hc.SWAP, "EARLY": True},
    }
    if tokens == 1:
        constants["T"] = 1
    made = compiled(hc.mix_kernel, types, constants, num_warps=hc.WARPS, enable_fp_fusion=False)
    ptx = made.asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")


def test_experts_of_one_token() -> None:
    from whalepod.kernels.fp4_experts_triton import down_kernel, gate_up_kernel

    types = dict.fromkeys(("x", "inner", "out"), BF16) | {"codes": I16, "scales": I32}
    types |= {"gain": FP32, "weights": FP32, "order": I32, "slots": I64}
    tiles = {"TILES": 64, "BN": 64, "BM": 16, "LEAST": 0, "EXPERTS": 256, "EXACT": False}
    tiles |= {"ALONGSIDE": False}
    route = dict.fromkeys(("starts", "stops", "used"))
    rest = {**tiles, **route, "EARLY": True}
    up = {"WIDTH": 2048, "COLUMNS": 4096, "TOP": 6, "LIMIT": 10.0, **rest}
    for kernel, sizes in (
        (gate_up_kernel, up),
        (down_kernel, {"D": 4096, "COLUMNS": 2048, **rest}),
    ):
        made = compiled(kernel, types, sizes, num_warps=4, num_stages=4)
        assert " 0 bytes spill stores" in assembled(made.asm["ptx"])


def test_experts_of_one_turn_are_left_to_the_plain_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp4_experts_hopper, "on_hopper", lambda _: True)
    x = torch.zeros(4, dtype=torch.bfloat16)
    for columns, taken in ((256, False), (512, True), (640, False)):
        stack = Fp4Stack(x, x, x, columns)
        for alone in (True, False):
            cut = fp4_experts_hopper.cut_of(x, stack, 256, 16, alone)
            assert (cut is not None) == taken


@pytest.mark.parametrize("columns", [4096, 512])
@pytest.mark.parametrize(("rows", "alone"), [(16, True), (16, False)])
def test_experts_in_gluon(rows: int, alone: bool, columns: int) -> None:
    from whalepod.kernels.fp4_experts_gluon import down_kernel, gate_up_kernel
    from whalepod.kernels.fp4_experts_hopper import _ALONE, _CUTS

    cut = _ALONE if alone else _CUTS[rows]
    types = dict.fromkeys(("x", "inner", "out"), BF16) | {"codes": I16, "scales": I32}
    types |= {"gain": FP32, "weights": FP32, "order": I32, "slots": I64 if alone else I32}
    route = ("starts", "stops", "used")
    types |= dict.fromkeys(route, I32)
    rest: dict[str, Any] = {"BN": cut.outputs, "BM": rows, "LEAST": 0, "EARLY": True}
    rest |= {"ALONGSIDE": not alone}
    rest |= {"EXPERTS": 256 if alone else 0, "STAGES": cut.stages, "TOGETHER": cut.together}
    rest |= dict.fromkeys(route) if alone else {}
    up = {"WIDTH": 2048, "COLUMNS": columns, "TILES": 4096 // cut.outputs, "TOP": 6, "LIMIT": 10.0}
    down = {"D": 4096, "COLUMNS": columns, "TILES": 4096 // cut.outputs}
    for kernel, sizes in ((gate_up_kernel, up), (down_kernel, down)):
        made = compiled(kernel, types, {**sizes, **rest}, num_warps=cut.warps)
        said = assembled(made.asm["ptx"])
        assert " 0 bytes spill stores" in said
        assert "serialized" not in said, "products wait for each other"


@pytest.mark.parametrize("crowd", [0, 64])
@pytest.mark.parametrize("pairs", [6, 300])
def test_the_route(pairs: int, crowd: int) -> None:
    from whalepod.kernels.route import _place_kernel

    types = {"experts": I64, "pairs": "i32", "chunks": "i32"}
    types |= dict.fromkeys(("slot_of", "parts", "order", "slots", "starts", "stops", "used"), I32)
    constants: dict[str, Any] = {
        **{"ROWS": 16, "MOST": 32 if crowd else (1 << 31) - 1, "CROWD": crowd, "EXPERTS": 256},
        **{"ALL": 32 if pairs == 6 else 512, "CHUNK": 32 if pairs == 6 else 128, "HELD": 256},
        **{"BINS": 512, "STEP": 8, "EARLY": True, **({"chunks": 1} if pairs == 6 else {})},
    }
    assert "atom.shared" in compiled(_place_kernel, types, constants).asm["ptx"], "a histogram"


def test_index_scores_in_gluon() -> None:
    from whalepod.kernels.index_scores_gluon import scores_kernel

    types = {"q": BF16, "gate": FP32, "keys": BF16, "table": I32, "sequences": I32, "seen": I32}
    types |= {"out": FP32} | dict.fromkeys(("width", "E", "HEADS", "RUN", "step"), "i32")
    types["factor"] = "fp32"
    sizes = {"STRIDE": 128, "H": 64, "DIM": 128, "PER": 32, "KIND": "rows", "BN": 64}
    made = compiled(scores_kernel, types, {**sizes, "OWN": True, "EARLY": True}, num_warps=4)
    assert "wgmma" in made.asm["ptx"]


@pytest.mark.parametrize("filtered", [False, True])
def test_draws(filtered: bool) -> None:
    from whalepod.kernels import sample_filters_triton as filters
    from whalepod.kernels import sample_triton as draws

    types = dict.fromkeys(("logits", "best", "sums", "logprobs"), FP32) | {"settings": "*fp64"}
    types |= dict.fromkeys(("masses", "totals", "weights", "tokens"), I64)
    types |= dict.fromkeys(("where", "counts", "starts", "brackets", "keys", "ids"), I32)
    sizes = {"V": 129_280, "S": 32, "SP": 32, "SLICE": 4096, "BEST": 2.0**45, "BUCKETS": 8}
    sizes |= {"BINS": 256, "TILE": 4096, "FEW": 512, "FILTERED": filtered}
    kernels = [
        draws.weigh_kernel,
        filters.bracket_kernel,
        draws.collect_kernel,
        draws.choose_kernel,
    ]
    for kernel in kernels if filtered else kernels[-1:]:
        given = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        spilled = re.search(
            r"(\d+) bytes spill stores",
            assembled(compiled(kernel, types, given, num_warps=8).asm["ptx"]),
        )
        assert spilled is not None
        assert int(spilled[1]) < 256
