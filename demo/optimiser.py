"""Muon for matrices, AdamW for the rest.

Muon orthogonalises each matrix's momentum by Newton-Schulz iterations; matrices of one shape are
one batch. A fused gate-and-up tensor counts as two matrices per expert. The update is scaled to
AdamW's usual size (0.2 * sqrt(larger dim)), so that one learning rate serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demo.net.basic import Params
from demo.net.parameters import trained

_NOT_MUON = ("embed.", "head.", "hc_", ".ape", "attn_sink", "gate.weight", "weights_proj", "norm")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(momentum: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end up near 1.

    Args:
        momentum: `[M, R, C]`.
    """
    a, b, c = _COEFFICIENTS
    x = momentum.to(torch.bfloat16 if momentum.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum and updates of all matrices.

    Args:
        params: the matrices by name: `[R, C]`, or `[E, ..., C]` for experts.
    """

    def __init__(self, params: Params, decay: float = 0.1, momentum: float = 0.95) -> None:
        self.params, self.decay, self.momentum = params, decay, momentum
        self.buffers = {name: torch.zeros_like(p) for name, p in params.items()}
        groups: dict[tuple[int, int], list[str]] = {}
        for name, p in params.items():
            groups.setdefault(self._matrices(name, p).shape[1:], []).append(name)
        self.groups = list(groups.values())

    @staticmethod
    def _matrices(name: str, p: Tensor) -> Tensor:
        if p.ndim == 2:
            return p.unsqueeze(0)
        return p.unflatten(1, (2, -1)).flatten(0, 1) if name.endswith("w13") else p

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients."""
        for names in self.groups:
            pushed = []
            for name in names:
                grad, buffer = self.params[name].grad, self.buffers[name]
                assert grad is not None
                buffer.lerp_(grad, 1 - self.momentum)
                pushed.append(self._matrices(name, grad.lerp(buffer, self.momentum)))
            update = orthogonal(torch.cat(pushed))
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            for name, part in zip(names, update.split([len(x) for x in pushed]), strict=True):
                p = self.params[name]
                p.mul_(1 - lr * self.decay).sub_(part.reshape(p.shape), alpha=lr * scale)


class Optimiser:
    """Both, under one learning rate."""

    def __init__(self, params: Params) -> None:
        moved = {n: p for n, p in params.items() if trained(n)}
        muon = {n: p for n, p in moved.items() if p.ndim > 1 and not any(k in n for k in _NOT_MUON)}
        self.all = list(moved.values())
        self.muon = Muon(muon)
        rest = [p for n, p in moved.items() if n not in muon]
        fused = rest[0].is_cuda
        self.adamw = torch.optim.AdamW(
            rest, lr=0.0, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused
        )

    def step(self, lr: float) -> Tensor:
        """Clip, apply, clear; returns the gradients' norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.all, 1.0, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.muon.step(lr)
        for p in self.all:
            p.grad = None
        return norm

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.buffers}

    def load(self, state: dict[str, object]) -> None:
        """Continue from `state`."""
        self.adamw.load_state_dict(state["adamw"])  # type: ignore[arg-type]
        for name, buffer in state["muon"].items():  # type: ignore[attr-defined]
            self.muon.buffers[name].copy_(buffer)
