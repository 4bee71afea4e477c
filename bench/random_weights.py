"""A checkpoint of random weights in the released format, made where they are wanted."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from whalepod.kernels.fp4 import BLOCK, Fp4Stack
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.names import Stored, tensor_specs
from whalepod.model.shape import ModelConfig

# Biased exponents of scales: E4M3 and E2M1 codes are about 1, weights should be about 1/64.
_FP8_SCALE, _FP4_SCALE = 121, 119


class RandomCheckpoint(Checkpoint):
    """Every tensor that a configuration wants, drawn when it is read; nothing is kept.

    A tensor's name is its seed: processes on the same kind of device have the same.

    Args:
        config: sizes. device: where tensors are drawn.
    """

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.path, self.config, self.entries = Path("random weights"), config, {}
        self.expert_dtype = config.expert_dtype or "fp4"
        self.specs, self.unexpected, self.bytes_read = (
            tensor_specs(config, self.expert_dtype),
            [],
            0,
        )
        self._device = torch.device(device)
        self._drawn = torch.Generator(device)

    def packed_expert(
        self, layer: int, expert: int, device: torch.device | str = "cpu"
    ) -> tuple[Fp4Stack, Fp4Stack]:
        """Codes and scales drawn in the kernels' layout: any bits are a weight."""
        self._drawn.manual_seed(layer << 16 | expert)
        width, inner = self.config.hidden_size, self.config.moe_intermediate_size
        return self._stack(2 * inner, width), self._stack(width, inner)

    def _stack(self, rows: int, columns: int) -> Fp4Stack:
        blocks = -(-columns // BLOCK)
        codes = torch.empty(1, blocks, rows, 32, dtype=torch.int16, device=self._device)
        exponents = torch.full((1, blocks, rows, 4), _FP4_SCALE + 126, device=self._device)
        scales = exponents.to(torch.uint8).view(torch.int32).squeeze(-1)
        gain = torch.ones(1, device=self._device)
        return Fp4Stack(codes.random_(-32768, 32767, generator=self._drawn), scales, gain, columns)

    def _read(self, name: str) -> Tensor:
        spec, device, drawn_by = self.specs[name], self._device, self._drawn
        drawn_by.manual_seed(crc32(name.encode()))
        if spec.stored is Stored.I64:
            experts = self.config.n_routed_experts
            drawn = torch.rand(spec.shape[0], experts, device=device, generator=drawn_by)
            return drawn.topk(spec.shape[1], dim=-1).indices
        if spec.stored is Stored.SCALE:
            exponents = torch.full(spec.shape, _FP8_SCALE, dtype=torch.uint8, device=device)
            return exponents.view(torch.float8_e8m0fnu)
        if spec.stored is Stored.FP8:
            return torch.randn(spec.shape, device=device, generator=drawn_by).to(
                torch.float8_e4m3fn
            )
        if spec.stored is Stored.FP4:
            codes = torch.empty(spec.shape, dtype=torch.int8, device=device)
            return codes.random_(-128, 128, generator=drawn_by)
        drawn = torch.randn(spec.shape, device=device, generator=drawn_by)
        if len(spec.shape) > 1:
            drawn /= 64
        elif name.endswith("norm.weight"):
            drawn = 1 + drawn / 8
        return drawn.to(torch.bfloat16 if spec.stored is Stored.BF16 else torch.float32)
