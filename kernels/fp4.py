"""FP4 matrices as the GPU kernels read them: still 4 bits a weight, in an order that needs no shuffle.

The checkpoint stores a matrix `[N, K]` of E2M1 codes two columns a byte and one E8M0 scale per row and
32 columns. Here the columns are cut into blocks of 128, four scale groups of 32:

- `codes[e, b, n, j]` (int16) is half of the word of 32 bits that holds columns `j` and `j ^ 1` of each
  of the four groups of block `b` of row `n`: one word yields two elements of four 32-column tiles, so
  a tile of words is loaded and laid out like a bf16 operand and the products need no permutation of
  the inputs.
- inside a word w, the signs, two exponent bits and mantissa bits of group g are where few operations
  put them in the places of two bf16 numbers' signs, last exponent bits and first mantissa bits (15, 8,
  7, 6 and 31, 24, 23, 22):

      group  even column       odd column        to two bf16
        0    15,  8,  7,  6    31, 24, 23, 22    w & 0x81C081C0
        1    11,  4,  3,  2    27, 20, 19, 18    (w << 4) & 0x81C081C0
        2    21, 14, 13, 12     5, 30, 29, 28    (w rotated left by 26) & 0x81C081C0
        3     9, 10,  1,  0    25, 26, 17, 16    (w << 6) & 0x80C080C0 | (w >> 2) & 0x01000100

  These are the codes' values times 2^-126, exact as bf16 (0.5 is a subnormal one).
- `scales[e, b, n]` (int32) holds the four groups' factors, group g in byte g: the biased exponent of
  `2^126 * scale`. One multiplication undoes the offset and applies the scale, without rounding.
- `gain[e]` is a power of two, 1 unless one of the matrix's scales exceeds 2: the kernels multiply it
  onto its sums.

Legend: E matrices, N outputs, K inputs, B = ceil(K / 128) blocks; a last block is filled with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUPS, GROUP = 128, 4, 32
# For each group the places of bits 3 (sign), 2, 1 (exponent) and 0 (mantissa) of an even and an odd column.
_PLACES = (
    ((15, 8, 7, 6), (31, 24, 23, 22)),
    ((11, 4, 3, 2), (27, 20, 19, 18)),
    ((21, 14, 13, 12), (5, 30, 29, 28)),
    ((9, 10, 1, 0), (25, 26, 17, 16)),
)
_LIFT, _MOST = 126, 254  # exponent of the offset; the largest biased exponent of a finite number
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Fp4Stack:
    """E matrices `[N, K]` in the kernels' layout; see the head of this file.

    Args:
        codes: `[E, B, N, 32]` int16. scales: `[E, B, N]` int32.
        gain: `[E]` fp32, powers of two. columns: K.
    """

    codes: Tensor
    scales: Tensor
    gain: Tensor
    columns: int

    @property
    def count(self) -> int:
        """E."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes + self.gain.nbytes

    def to(self, device: torch.device | str) -> Fp4Stack:
        """The same stack on another device."""
        codes, scales, gain = self.codes.to(device), self.scales.to(device), self.gain.to(device)
        return Fp4Stack(codes, scales, gain, self.columns)


def pack(packed: Tensor, scale: Tensor) -> Fp4Stack:
    """Bring checkpoint tensors into the kernels' layout; no value changes.

    Args:
        packed: `[E, N, K/2]` int8, the low nibble is the even column.
        scale: `[E, N, K/32]` E8M0.

    Raises:
        ValueError: shapes that do not belong together, a NaN scale, or scales that span more than
            2^253 (no gain brings them all into range).
    """
    count, rows, half = packed.shape
    columns = 2 * half
    if columns % GROUP or scale.shape != (count, rows, columns // GROUP):
        raise ValueError(
            f"FP4 codes {list(packed.shape)} with scales {list(scale.shape)}: expected scales "
            f"{[count, rows, columns // GROUP]} and columns that are a multiple of {GROUP}"
        )
    parts = [_pack_one(p, s) for p, s in zip(packed, scale.view(torch.uint8), strict=True)]
    codes, scales, gains = zip(*parts, strict=True)
    return Fp4Stack(torch.stack(codes), torch.stack(scales), torch.stack(gains), columns)


def _pack_one(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bytes_ = packed.view(torch.uint8)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    fill = -columns % BLOCK
    nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(1)
    blocks = F.pad(nibbles, (0, fill)).view(rows, -1, GROUPS, GROUP // 2, 2).transpose(0, 1).int()
    words = torch.zeros_like(blocks[:, :, 0, :, 0])
    for group, both in enumerate(_PLACES):
        for odd, places in enumerate(both):
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                words |= ((blocks[:, :, group, :, odd] >> bit) & 1) << place
    exponents, gain = _factors(scale)
    exponents = F.pad(exponents, (0, fill // GROUP), value=1).view(rows, -1, GROUPS)
    factors = exponents.to(torch.uint8).contiguous().view(torch.int32).squeeze(-1)
    codes = words.contiguous().view(torch.int16)
    return codes, factors.t().contiguous(), torch.tensor(gain, device=packed.device)


def unpack(stack: Fp4Stack) -> tuple[Tensor, Tensor]:
    """Give back the checkpoint's tensors: codes `[E, N, K/2]` int8 and scales `[E, N, K/32]` E8M0."""
    words = stack.codes.contiguous().view(torch.int32)
    found = []
    for places in (places for both in _PLACES for places in both):
        bits = [((words >> p) & 1) << b for b, p in zip((3, 2, 1, 0), places, strict=True)]
        found.append(bits[0] | bits[1] | bits[2] | bits[3])
    # A group's even and odd columns, in turn.
    blocks = torch.stack(found, dim=3).unflatten(3, (GROUPS, 2)).transpose(4, 5)
    codes = blocks.flatten(3).transpose(1, 2).flatten(2)[..., : stack.columns]
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8).view(torch.int8)
    exponents = stack.scales.transpose(1, 2).contiguous().unsqueeze(-1).view(torch.uint8).flatten(2)
    shift = stack.gain.log2().int().view(-1, 1, 1)
    scale = exponents[..., : stack.columns // GROUP].int() - _LIFT + shift
    return packed, scale.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode(stack: Fp4Stack) -> Tensor:
    """The values, `[E, N, K]` fp32."""
    packed, scale = unpack(stack)
    codes = packed.view(torch.uint8)
    values = torch.tensor([*_VALUES, *(-v for v in _VALUES)], device=packed.device)
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).long()
    value: Tensor = values[both].unflatten(2, (-1, GROUP)) * scale.float().unsqueeze(-1)
    return value.flatten(2)


def _factors(bytes_: Tensor) -> tuple[Tensor, float]:
    """Biased exponents of `2^126 * scale / gain`, and the gain."""
    if bool((bytes_ == 255).any()):
        raise ValueError("an E8M0 scale is NaN (byte 255)")
    shift = max(0, int(bytes_.max()) + _LIFT - _MOST) if bytes_.numel() else 0
    exponents = bytes_.int() + (_LIFT - shift)
    if shift and bool((exponents < 1).any()):
        low, high = int(bytes_.min()) - 127, int(bytes_.max()) - 127
        raise ValueError(f"FP4 scales from 2^{low} to 2^{high}: expected a span below 2^253")
    return exponents, 2.0**shift
