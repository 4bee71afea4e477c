"""Small tensors to a device and back, while it still works on something else.

From ordinary memory a copy would first wait for all that the device has to do, and what follows it would be
launched only then.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sendable(host: Tensor, device: torch.device) -> Tensor:
    """The same values where the device can fetch them by itself; freed when it has."""
    return host.pin_memory() if device.type == "cuda" else host


def upload(host: Tensor, device: torch.device) -> Tensor:
    """The same values on the device; work that is launched from here on finds them there."""
    return sendable(host, device).to(device, non_blocking=True)


class Coming:
    """Whole numbers (int64) and fp32 ones of a device, on their way here in one copy.

    What is launched after this is not waited for.
    """

    def __init__(self, ids_N: Tensor, values_N: Tensor) -> None:
        both = torch.cat([ids_N.view(torch.int32), values_N.view(torch.int32)])
        self._split = 2 * len(ids_N)
        self._there: torch.cuda.Event | None = None
        self._host = both
        if both.device.type == "cuda":
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def take(self) -> tuple[list[int], list[float]]:
        """Wait for them."""
        if self._there is not None:
            self._there.synchronize()
        ids, values = self._host[: self._split], self._host[self._split :]
        return ids.view(torch.int64).tolist(), values.view(torch.float32).tolist()
