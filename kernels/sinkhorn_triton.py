"""Device functions of `hyper_connection_triton` that turn a token's parts into gates and a matrix."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from whalepod.kernels.jit import jit, tl


@jit
def logistic(x):
    """The logistic function, for any x."""
    return 1.0 / (1.0 + tl.exp(tl.where(x < -80.0, 80.0, -x)))  # of a NaN a NaN, unlike a minimum


@jit
def place(n):
    """Row of `fn` behind column n of the parts, and whether there is one."""
    return tl.where(n < 4, n, n - 4), (n < 4) | ((n >= 8) & (n < 28))


@jit
def sinkhorn(
    parts, scales, base, post, comb, first, T, D: tl.constexpr, SPLITS: tl.constexpr,
    ITERS: tl.constexpr, EPS: tl.constexpr, RMS_EPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gates and matrix of TOKENS tokens: rows 2 of eight rows of four are post, rows 3-6 the matrix."""
    t, n = (first + tl.arange(0, TOKENS)).to(tl.int64), tl.arange(0, 32)
    live = (t < T)[:, None]
    acc = tl.zeros((TOKENS, 32), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(
            parts + (t * SPLITS + split)[:, None] * 32 + n[None, :], mask=live, other=0.0
        )
    squares = tl.sum(tl.where((n == 4)[None, :], acc, 0.0), 1)
    rms = 1.0 / tl.sqrt(squares / (4 * D) + RMS_EPS)
    row, real = place(n)
    scale = tl.load(scales + row, mask=real, other=0.0)
    shift = tl.load(base + row, mask=real, other=0.0)
    mixes = tl.where(real[None, :], acc * rms[:, None] * scale[None, :] + shift[None, :], 0.0)
    gate = 2.0 * logistic(mixes)
    tl.store(
        post + t[:, None] * 4 + n[None, :] - 8, gate, mask=live & ((n >= 8) & (n < 12))[None, :]
    )
    cube = tl.reshape(mixes, (TOKENS, 8, 4))
    j = tl.arange(0, 8)
    inside = ((j >= 3) & (j < 7))[None, :, None]
    cube = tl.exp(cube - tl.max(cube, 2)[:, :, None])
    cube = tl.where(inside, cube / tl.sum(cube, 2)[:, :, None] + EPS, 0.0)
    cube = cube / (tl.sum(cube, 1) + EPS)[:, None, :]
    for _ in range(ITERS - 1):
        cube = cube / (tl.sum(cube, 2) + EPS)[:, :, None]
        cube = cube / (tl.sum(cube, 1) + EPS)[:, None, :]
    flat = tl.reshape(cube, (TOKENS, 32))
    kept = live & ((n >= 12) & (n < 28))[None, :]
    tl.store(comb + t[:, None] * 16 + n[None, :] - 12, flat, mask=kept)
