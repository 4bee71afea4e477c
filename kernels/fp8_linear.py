"""Products with E4M3 matrices that stay FP8 in memory.

A matrix is kept in blocks of 128 columns: `codes[g, b, n, j]` (int16) holds column `j` of block `b` of
row `n` in its low byte and column `64 + j` in its high one. Seen as words, a tile is laid out like a
bf16 operand and gives two tiles of 64 columns without a shuffle; seen as bytes, it is an FP8 operand
whose columns are in the order that `act_quant(paired=True)` writes. `scales[g, b, t]` (fp32) belongs to
rows 128 t to 128 t + 127 of block b.

Legend: M rows, G groups (block-diagonal products), N outputs and K inputs of a group,
B = ceil(K / 128); a last block is filled with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.act_quant import act_quant, round_fp8
from whalepod.kernels.dense import dense
from whalepod.kernels.jit import runs
from whalepod.kernels.linear import grouped_linear
from whalepod.kernels.registry import Kernel

BLOCK = 128
_LARGEST = 2.0**7  # of a scale: 2^120 times it must be a finite bf16 number


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """G matrices `[N, K]` in the kernels' layout; see the head of this file.

    Args:
        codes: `[G, B, N, 64]` int16. scales: `[G, B, ceil(N / 128)]` fp32. columns: K.
    """

    codes: Tensor
    scales: Tensor
    columns: int

    @property
    def groups(self) -> int:
        """G."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> Fp8Matrix:
        """The same matrix on another device."""
        return Fp8Matrix(self.codes.to(device), self.scales.to(device), self.columns)


def pack(weight_NK: Tensor, scale: Tensor, groups: int = 1) -> Fp8Matrix:
    """Bring checkpoint tensors into the kernels' layout; no value changes.

    Args:
        weight_NK: `[G * N, K]` E4M3. scale: `[ceil(G N / 128), ceil(K / 128)]` E8M0 or fp32.
        groups: G; more than one needs N a multiple of 128.

    Raises:
        ValueError: shapes that do not belong together; a scale that is NaN, above 2^7 or no power
            of two.
    """
    rows, columns = weight_NK.shape
    tall, blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    if scale.shape != (tall, blocks) or (groups > 1 and rows % (groups * BLOCK)):
        raise ValueError(
            f"FP8 codes {[rows, columns]} in {groups} group(s) with scales {list(scale.shape)}: "
            f"expected scales {[tall, blocks]} and rows of a group that are a multiple of {BLOCK}"
        )
    values = scale.float()
    wrong = ~(values <= _LARGEST) | (values.frexp().mantissa != 0.5)
    if bool(wrong.any()):
        raise ValueError(f"FP8 scale {values[wrong][0].item()}: expected 2^n with n at most 7")
    padded = F.pad(weight_NK.view(torch.uint8), (0, blocks * BLOCK - columns))
    halves = padded.view(groups, rows // groups, blocks, 2, 64).permute(0, 2, 1, 4, 3)
    codes = halves.contiguous().view(torch.int16).squeeze(-1)
    scales = values.view(groups, -1, blocks).transpose(1, 2).contiguous()
    return Fp8Matrix(codes, scales, columns)


def decode(matrix: Fp8Matrix) -> Tensor:
    """The values, `[G, N, K]` fp32."""
    halves = matrix.codes.unsqueeze(-1).view(torch.float8_e4m3fn).float()  # [G, B, N, 64, 2]
    blocks = halves.transpose(3, 4).flatten(3)
    scales = matrix.scales.repeat_interleave(BLOCK, 2)[:, :, : matrix.rows]
    value: Tensor = (blocks * scales.unsqueeze(-1)).transpose(1, 2).flatten(2)
    return value[..., : matrix.columns]


@Kernel
def fp8_linear(x_MK: Tensor, matrix: Fp8Matrix, released: bool = False) -> Tensor:
    """Multiply rows by a stored `[out, in]` matrix: `y = x Wᵀ`, each group's inputs by its own.

    Args:
        x_MK: `[M, G * K]` bf16 or fp32.
        matrix: G matrices `[N, K]`.
        released: round the inputs to FP8 in blocks of 128 columns first (`act_quant`).

    Returns:
        `[M, G * N]` in the dtype of `x_MK`. A row does not depend on the other rows, nor on how many
        there are.
    """
    x = round_fp8.reference(_grouped(x_MK, matrix)) if released else _grouped(x_MK, matrix)
    split = x.float().unflatten(0, (x_MK.shape[0], matrix.groups))
    return grouped_linear.reference(split, decode(matrix)).to(x_MK.dtype)


def _grouped(x_MK: Tensor, matrix: Fp8Matrix) -> Tensor:
    """`[M * G, K]`."""
    return x_MK.contiguous().view(x_MK.shape[0] * matrix.groups, matrix.columns)


@fp8_linear.twin("triton", runs)
def _fp8_linear(x_MK: Tensor, matrix: Fp8Matrix, released: bool = False) -> Tensor:
    sizes = (matrix.rows, matrix.columns, x_MK.dtype, matrix.groups)
    x, scales = _grouped(x_MK, matrix), None
    if released:
        x, scales = act_quant(x, paired=True)
        w = matrix.codes.view(torch.float8_e4m3fn)
        split = x.unflatten(0, (x_MK.shape[0], matrix.groups)) if x.numel() else x_MK[:, None]
        return dense(split, scales, w, matrix.scales, "quant", *sizes)
    split = x.view(x_MK.shape[0], matrix.groups, matrix.columns)
    return dense(split, None, matrix.codes, matrix.scales, "fp8", *sizes)
