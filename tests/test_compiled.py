"""Compiled CPU twins equal their references in torch, and their rows do not see each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from configs_oracle import CONFIGS, SEEDS
from oracle_hf import random_weights
from test_chunks import cuts, logits
from test_mtp import tokens
from torch import Tensor

from whalepod.errors import KernelUnavailable
from whalepod.kernels import compiled
from whalepod.kernels.attend import Listed, Rows, attend, keep_rows, write_ring
from whalepod.kernels.choose import choose_entries
from whalepod.kernels.combine import combine
from whalepod.kernels.draw import best_tokens, ranked
from whalepod.kernels.experts import run_pairs
from whalepod.kernels.hyper_connection import Site, hc_head, hc_post, hc_post_pre, hc_pre
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.pool import pool_entries
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.routes import choose_experts
from whalepod.kernels.swiglu import swiglu
from whalepod.model.shape import ModelConfig
from whalepod.model.whole import WholeModel

pytestmark = pytest.mark.skipif(not compiled.runs("cpu"), reason="numba is not installed")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(*shape: int) -> Tensor:
    """Values that bf16 holds exactly."""
    return random(*shape, seed=5).bfloat16().float()


def check(
    kernel: Kernel, rows: Sequence[Tensor | None], rest: Sequence[object], near: float = 2e-5
) -> None:
    """A twin equals its reference, and each row alone equals itself in company, bit for bit."""

    def run(function: Callable[..., Tensor | tuple[Tensor, ...]], part: slice) -> list[Tensor]:
        made = function(*(r if r is None else r[part] for r in rows), *rest)
        return [made] if isinstance(made, Tensor) else list(made)

    whole = run(kernel, slice(None))
    for got, want in zip(whole, run(kernel.reference, slice(None)), strict=True):
        torch.testing.assert_close(got, want, atol=near, rtol=near)
    total = whole[0].shape[0]
    for part in (*(slice(i, i + 1) for i in range(total)), slice(0, 0), slice(1, 4), slice(2, 9)):
        for got, want in zip(run(kernel, part), whole, strict=True):
            assert torch.equal(got, want[part]), part


OPERATIONS = (
    *(
        attend,
        best_tokens,
        choose_entries,
        choose_experts,
        combine,
        grouped_linear,
        hc_head,
        hc_post,
        hc_post_pre,
    ),
    *(
        hc_pre,
        keep_rows,
        linear,
        norm_rotate,
        pool_entries,
        ranked,
        rms_norm,
        run_pairs,
        swiglu,
        write_ring,
    ),
)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def force(name: str) -> None:
        monkeypatch.setenv("WHALEPOD_KERNELS", name)
        for kernel in Kernel.every:
            kernel.forget()

    yield force
    monkeypatch.undo()
    for kernel in Kernel.every:
        kernel.forget()


def test_twins_run_unless_the_references_are_asked_for(forced: Callable[[str], None]) -> None:
    assert all(kernel.has_twin("cpu") for kernel in OPERATIONS)
    forced("torch")
    assert not any(kernel.has_twin("cpu") for kernel in OPERATIONS)
    forced("compiled")
    assert all(kernel.has_twin("cpu") for kernel in OPERATIONS)
    forced("compield")
    with pytest.raises(KernelUnavailable, match="compield"):
        linear.has_twin("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_model_without_twins_is_near_and_keeps_its_own_bits(
    name: str, forced: Callable[[str], None]
) -> None:
    cfg, ids = CONFIGS[name], tokens(name, 300)
    model = WholeModel(ModelConfig.from_dict(cfg), random_weights(cfg, SEEDS[name]))
    compiled_logits = logits(model, ids, [300])
    forced("torch")
    whole = logits(model, ids, [300])
    torch.testing.assert_close(whole, compiled_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, ids, cuts("a", 300)), whole)


def on_small_grid(*shape: int) -> Tensor:
    """Values that FP8 holds exactly, some of them subnormal, and both zeros."""
    values = random(*shape, seed=6) * torch.logspace(-5, 1, shape[1])
    return values.to(torch.float8_e5m2).float()


@pytest.mark.parametrize("make", [random, on_grid, on_small_grid])
@pytest.mark.parametrize("size", [(1, 16), (16, 48), (24, 1024), (65, 100), (200, 7), (96, 256)])
def test_products(size: tuple[int, int], make: Callable[..., Tensor]) -> None:
    check(linear, [random(11, size[1], seed=1)], [make(*size)], 1e-4)


@pytest.mark.parametrize("make", [random, on_grid, on_small_grid])
@pytest.mark.parametrize("rows", [7, 8, 23, 24, 70])
def test_widened_or_not_a_row_keeps_its_bits(rows: int, make: Callable[..., Tensor]) -> None:
    weight, x = make(200, 64), random(rows, 64, seed=1)
    alone = torch.cat([linear(x[i : i + 1], weight) for i in range(rows)])
    assert torch.equal(linear(x, weight), alone)
    torch.testing.assert_close(alone, x @ weight.t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_grouped_products(groups: int) -> None:
    check(grouped_linear, [random(11, groups, 96, seed=1)], [random(groups, 40, 96)], 1e-4)


def test_a_matrix_changed_in_place_is_seen() -> None:
    weight, x = random(16, 16), random(3, 16, seed=1)
    linear(x, weight)
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight), x @ weight.t())


def test_columns_of_a_wider_tensor_are_taken_where_they_lie() -> None:
    wide, weight = random(5, 96), random(20, 32, seed=1)
    part = wide[:, 32:64]
    assert torch.equal(linear(part, weight), linear(part.contiguous(), weight))


def test_gradients_flow_through_the_reference() -> None:
    weight = random(16, 16).requires_grad_()
    linear(random(3, 16, seed=1), weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("width", [16, 48, 256])
@pytest.mark.parametrize("normed", [True, False])
def test_collapsing_the_streams(width: int, normed: bool) -> None:
    fn, base, scales = random(24, 4 * width) / 6, random(24, seed=2), random(24, seed=3)
    norm = random(width, seed=4) if normed else None
    x = random(13, 4, width, seed=1)
    site = Site(fn, base, scales, 20, 1e-6, 1e-6)
    check(hc_pre, [x], [site, norm], 1e-4)
    rows = [random(13, width, seed=5), x, random(13, 4, seed=6), random(13, 4, 4, seed=7)]
    check(hc_post_pre, rows, [site, norm], 1e-4)
    more = random(13, width, seed=8)
    made = hc_post_pre(*rows, site, norm, more)
    for got, want in zip(made, hc_post_pre.reference(*rows, site, norm, more), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [True, False])
def test_spreading_a_blocks_output(more: bool) -> None:
    rows = [random(13, 48), random(13, 4, 48, seed=1), random(13, 4, seed=2)]
    rows += [random(13, 4, 4, seed=3), random(13, 48, seed=4) if more else None]
    check(hc_post, rows, [])


@pytest.mark.parametrize("weighted", [True, False])
def test_activation(weighted: bool) -> None:
    x, weights = random(11, 96) * 8, random(11, seed=1)
    whole = swiglu(x, 10.0, weights if weighted else None)
    torch.testing.assert_close(whole, swiglu.reference(x, 10.0, weights if weighted else None))
    assert torch.equal(swiglu(x[3:4], 10.0, weights[3:4] if weighted else None), whole[3:4])
    assert swiglu(x[:0], 10.0).shape == (0, 48)
    x[1, 3], x[2, 50] = float("nan"), float("nan")  # of the gate's half, and of the other one
    spoilt = swiglu(x, 10.0)
    assert torch.equal(spoilt.isnan(), swiglu.reference(x, 10.0).isnan())


class Pair:
    def __init__(self, seed: int) -> None:
        self.w13, self.w2 = random(64, 48, seed=seed), random(48, 32, seed=seed + 1)
        self.kept: object = None


@pytest.mark.parametrize("share", [1, 2, 6])
def test_experts(share: int) -> None:
    table = {e: Pair(e) for e in (0, 3, 4, 9)}
    x, weights = random(80, 48, seed=20), random(80 * share, seed=21)
    which = torch.tensor([0, 3, 4, 9])[torch.arange(80 * share) * 7 % 11 % 4]
    whole = run_pairs(x, which, weights, share, table, 10.0)
    want = run_pairs.reference(x, which, weights, share, table, 10.0)
    torch.testing.assert_close(whole, want, atol=1e-3, rtol=1e-4)
    for m in (0, 1, 50, 79):
        pairs = slice(m * share, (m + 1) * share)
        alone = run_pairs(x[m : m + 1], which[pairs], weights[pairs], share, table, 10.0)
        assert torch.equal(alone, whole[pairs])


def angles(rows: int, pairs: int) -> Tensor:
    return torch.polar(torch.ones(rows, pairs), random(rows, pairs, seed=30) * 3)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("pairs", [4, 8, 24])
def test_norm_and_rotation_of_heads(pairs: int, weighted: bool) -> None:
    x, turns = random(9, 3, 48), angles(9, pairs)
    weight = random(48, seed=1) if weighted else None
    for eps in (1e-6, -1.0):
        whole = norm_rotate(x, weight, turns, eps)
        torch.testing.assert_close(whole, norm_rotate.reference(x, weight, turns, eps))
        wide = torch.cat([x, x], 2)[..., 48:]
        assert torch.equal(norm_rotate(wide[4:5], weight, turns[4:5], eps), whole[4:5])
    check(rms_norm, [random(9, 48)], [weight, 1e-6])
    assert rms_norm(x, weight, 1e-6).shape == x.shape


# slot, start, count: decoding rows first; one sequence fills its ring for the first time.
SPANS = ((2, 40, 1), (0, 0, 1), (5, 15, 1), (1, 0, 21), (4, 9, 40), (3, 63, 3))
WINDOW, WIDTH = 16, 48


def rows_of(spans: Sequence[tuple[int, int, int]]) -> Rows:
    slots, starts, firsts, positions, row = [], [], [], [], 0
    for slot, start, count in spans:
        slots += [slot] * count
        starts += [start] * count
        firsts += [row] * count
        positions += range(start, start + count)
        row += count
    return Rows(*(torch.tensor(v) for v in (slots, starts, firsts, positions)))


def listing(rows: Rows, ratio: int) -> Listed:
    """Each row sees the entries of its past, in an order of its own."""
    counts = (rows.position_T + 1) // ratio
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    return Listed(order, rows.slot_T * 2, counts, int(counts.max()))


@pytest.mark.parametrize("heads", [1, 4, 6])
@pytest.mark.parametrize("ratio", [0, 4])
def test_attention_of_decoding_rows_and_chunks(heads: int, ratio: int) -> None:
    rows = rows_of(SPANS)
    count = len(rows.slot_T)
    q, new, rings = (
        random(count, heads, WIDTH),
        random(count, WIDTH, seed=1),
        random(6, WINDOW, WIDTH),
    )
    turns, sink = angles(count, 8), random(heads, seed=3)
    entries = (random(64, WIDTH, seed=4), listing(rows, ratio)) if ratio else (None, None)
    whole = attend(q, new, rings, rows, *entries, sink, turns)
    want = attend.reference(q, new, rings, rows, *entries, sink, turns)
    torch.testing.assert_close(whole, want, atol=2e-5, rtol=2e-5)
    for first, _, span in ((3, 0, SPANS[3]), (24, 0, SPANS[4])):
        # Row by row through the ring instead of in one chunk.
        slot, start, length = span
        ring = rings.clone()
        for i in range(length):
            t = slice(first + i, first + i + 1)
            one = rows_of([(slot, start + i, 1)])
            own = entries
            if entries[1] is not None:
                own = (
                    entries[0],
                    Listed(
                        entries[1].rows,
                        entries[1].offset_T[t],
                        entries[1].count_T[t],
                        entries[1].most,
                    ),
                )
            alone = attend(q[t], new[t], ring, one, *own, sink, turns[t])
            assert torch.equal(alone, whole[t]), (slot, i)
            keep_rows(ring, new[t], one, 1)
            assert torch.equal(ring[slot, (start + i) % WINDOW], new[first + i])


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (8, False)])
def test_closing_windows(ratio: int, overlap: bool) -> None:
    rows, channels = rows_of(SPANS), 2 * WIDTH if overlap else WIDTH
    count, ring = len(rows.slot_T), ratio * (2 if overlap else 1)
    projected, ape = random(count, 2, channels), random(ratio, channels, seed=1)
    raw, entries = random(6, ring, 2, channels, seed=2), random(64, WIDTH, seed=3)
    closing = (rows.position_T + 1) % ratio == 0
    closed = torch.where(closing, torch.arange(count) % 64, -1)
    made = []
    for function in (pool_entries, pool_entries.reference):
        state = projected.clone(), raw.clone(), entries.clone()
        function(
            *(state[0], ape, state[1], rows, 3, closed, random(WIDTH, seed=4)),
            *(angles(count, 8), 1e-6, state[2]),
        )
        made.append(state)
    assert closing.sum() > 5
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_the_indexers_choice(keep: int) -> None:
    rows = rows_of(SPANS)
    count, listed = len(rows.slot_T), listing(rows, 2)
    # Whole numbers, so that sums are exact in any order and many scores are equal.
    q, keys = random(count, 5, 16).round(), random(64, 16, seed=1).round()
    gate = random(count, 5, seed=2).round()
    got = choose_entries(q, gate, keys, listed, keep)
    want = choose_entries.reference(q, gate, keys, listed, keep)
    assert torch.equal(got.count_T, want.count_T)
    for t in range(count):
        a, n = int(got.offset_T[t]), int(got.count_T[t])
        b = int(want.offset_T[t])
        assert got.rows[a : a + n].tolist() == want.rows[b : b + n].tolist()


@pytest.mark.parametrize("experts", [8, 24])
def test_the_routers_choice(experts: int) -> None:
    x, bias = random(9, experts) * 8, random(experts, seed=1)
    check(choose_experts, [x], [bias, None, 3, 1.5])
    given = torch.arange(27).view(9, 3) % experts
    check(choose_experts, [x, None, given], [3, 1.5])
    level = choose_experts(torch.zeros(2, experts), torch.zeros(experts), None, 3, 1.0)[0]
    assert level.tolist() == [[0, 1, 2]] * 2  # ties go to the first


def test_sum_of_parts_and_best_tokens() -> None:
    check(combine, [random(9, 3, 48)], [])
    logits_NV = (random(9, 128) * 4).round()
    check(best_tokens, [logits_NV], [])
    assert best_tokens(torch.zeros(2, 32))[0].tolist() == [0, 0]


def test_machine_code_lies_where_only_the_user_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder() -> Path | None:
        compiled.cache_folder.cache_clear()
        return compiled.cache_folder()

    try:
        mine, open_to_all = tmp_path / "mine", tmp_path / "all"
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        monkeypatch.setenv("WHALEPOD_CACHE", str(mine))
        found = folder()
        assert found is not None
        assert found.parent == mine
        assert found.stat().st_mode & 0o077 == 0
        monkeypatch.setenv("WHALEPOD_CACHE", str(open_to_all))
        found = folder()
        assert found is not None
        assert found.parent == tmp_path / "user" / "whalepod"
        monkeypatch.setattr(compiled, "_candidates", lambda: iter([Path(os.devnull)]))
        assert folder() is None
    finally:
        compiled.cache_folder.cache_clear()


def test_rank_of_tokens() -> None:
    edges = [0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, -3e38]
    for x in (
        torch.tensor(edges * 3),
        (random(4099) * 4).round(),
        random(1),
        random(0),
        random(999),
    ):
        assert torch.equal(ranked(x), ranked.reference(x))


def test_the_last_collapse() -> None:
    site = Site(random(4, 192) / 6, random(4, seed=1), torch.full((4,), 1.7), 1, 1e-6, 1e-6)
    for norm in (None, random(48, seed=3)):
        check(hc_head, [random(9, 4, 48, seed=2)], [site, norm], 1e-4)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (13, 5), (16, 16), (7, 16), (3, 0)])
def test_rows_go_round_the_ring(start: int, count: int) -> None:
    values = random(16, 2, 40)[:, :, 8:24][:count]
    for part in (values, values.contiguous()):
        got, want = random(3, 16, 2, 16, seed=1), random(3, 16, 2, 16, seed=1)
        write_ring(got, 1, start, part)
        write_ring.reference(want, 1, start, part)
        assert torch.equal(got, want)
        assert count == 0 or torch.equal(got[1, start % 16], values[0])


def one_sequence(rows: int, entries: int) -> Listed:
    """What the last rows of one sequence see: the same entries, and one more each."""
    counts = torch.arange(entries - rows + 1, entries + 1)
    shuffled = torch.randperm(entries, generator=torch.Generator().manual_seed(5))
    return Listed(shuffled, torch.zeros(rows, dtype=torch.int64), counts, entries)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_the_choice_among_many(order: str) -> None:
    rows, entries, keep = 21, 3001, 32
    listed = one_sequence(rows, entries)
    scores = {
        "random": random(entries, 1).abs(),
        "rising": torch.arange(1.0, entries + 1)[:, None],
        "falling": torch.arange(entries, 0.0, -1)[:, None],
        "equal": torch.ones(entries, 1),
    }[order]
    keys = torch.zeros(entries, 16)
    keys[listed.rows, :1] = scores
    q, gate = torch.ones(rows, 3, 16), torch.ones(rows, 3)
    got = choose_entries(q, gate, keys, listed, keep)
    for t in range(rows):
        seen = scores[: int(listed.count_T[t]), 0]
        best = sorted(range(len(seen)), key=lambda e: (-float(seen[e]), e))[:keep]
        found = got.rows[t * keep : (t + 1) * keep].tolist()
        assert found == [int(listed.rows[e]) for e in sorted(best)]


def test_threads_and_groups_change_no_choice() -> None:
    rows, entries, keep = 40, 20001, 8
    listed = one_sequence(rows, entries)
    q, gate, keys = random(rows, 4, 32), random(rows, 4, seed=1), random(entries, 32, seed=2)
    alone = [
        choose_entries(
            q[t : t + 1],
            gate[t : t + 1],
            keys,
            Listed(listed.rows, listed.offset_T[t : t + 1], listed.count_T[t : t + 1], entries),
            keep,
        ).rows.tolist()
        for t in range(rows)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = choose_entries(q, gate, keys, listed, keep)
            assert made.rows.view(rows, keep).tolist() == alone
    finally:
        torch.set_num_threads(before)
