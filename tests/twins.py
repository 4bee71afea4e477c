"""What tests of Triton twins share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from whalepod.kernels.registry import Kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def twin(kernel: Kernel) -> object:  # type: ignore[type-arg]
    """The Triton twin, which must be what runs on this device."""
    picked = kernel.pick(DEVICE)
    assert picked is not kernel.reference, f"{kernel.name}: no twin on {DEVICE}"
    return picked


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that comes unwritten with NaN (the largest integer), so that gaps show."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, kind: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Fresh normal values."""
    return (size * torch.randn(shape)).to(kind).to(DEVICE)


def error(got: Tensor, truth: Tensor) -> float:
    """Relative distance; NaN never passes a comparison with it."""
    got, truth = got.double().cpu(), truth.double().cpu()
    return float((got - truth).norm() / truth.norm().clamp_min(1e-30))


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal on a GPU; NumPy, which interprets, sums by the place of a row, so nearly there."""
    return torch.equal(a, b) if GPU else error(a, b) < 1e-2 and a.shape == b.shape
