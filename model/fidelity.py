"""Where activations are rounded: `released` as the weights were trained for, `plain` nowhere.

Source: DeepSeek-V4 inference/model.py and kernel.py (act_quant, fp4_act_quant).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whalepod.kernels.hadamard import hadamard
from whalepod.model.quant import fake_fp4, fake_fp8


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The roundings of one mode; each method returns its input untouched in `plain`."""

    mode: Literal["plain", "released"] = "plain"

    @property
    def released(self) -> bool:
        """Whether anything is rounded."""
        return self.mode == "released"

    def linear_input(self, x: Tensor) -> Tensor:
        """Input of an FP8 or FP4 matrix: FP8 in blocks of 128 along the last dim."""
        return fake_fp8(x, 128) if self.released else x

    def kv(self, x: Tensor, rotary_dims: int) -> Tensor:
        """Window keys and compressed entries: FP8 in blocks of 64, rotary dims untouched."""
        if not self.released:
            return x
        plain = x.shape[-1] - rotary_dims
        return torch.cat([fake_fp8(x[..., :plain], 64), x[..., plain:]], dim=-1)

    def index(self, x: Tensor) -> Tensor:
        """Indexer queries and keys: Hadamard rotation, then FP4 in blocks of 32.

        The rotation is orthogonal, so `plain` leaves it out on both sides.
        """
        return fake_fp4(hadamard(x), 32) if self.released else x
