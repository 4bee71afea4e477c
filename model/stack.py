"""Routed experts of one layer as a GPU keeps them: FP4 matrices in one stack, in the kernels' layout.

Legend: T tokens, K experts a token, D width, I intermediate width, E experts of the layer, S places.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.fp4_experts import fp4_experts


class ExpertStack:
    """Experts by id, each in a place of two stacks; the kernels read a table of places.

    Args:
        experts: E. limit: `swiglu_limit`. released: round activations to FP8 before both products.
        device: where the stacks lie.
    """

    def __init__(
        self, experts: int, limit: float, released: bool, device: torch.device | str
    ) -> None:
        self.limit, self.released, self.device = limit, released, torch.device(device)
        self._place: dict[int, int] = {}
        self._free: list[int] = []
        self._slot_of_E = torch.full((experts,), -1, dtype=torch.int32, device=device)
        self.moves = 0  # how often the stacks have been put elsewhere
        self._w13: Fp4Stack | None = None
        self._w2: Fp4Stack | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stacks, free places included."""
        return sum(stack.nbytes for stack in (self._w13, self._w2) if stack is not None)

    def __contains__(self, expert: int) -> bool:
        """Whether an expert is here."""
        return expert in self._place

    def __iter__(self) -> Iterator[int]:
        """Ids of the experts that are here."""
        return iter(self._place)

    def __len__(self) -> int:
        """How many are here."""
        return len(self._place)

    def reserve(self, more: int, like: tuple[Fp4Stack, Fp4Stack]) -> None:
        """Make room for so many further experts at once: growing copies what is there."""
        lacking = more - len(self._free)
        if lacking <= 0:
            return
        held = len(self._place) + len(self._free)
        self.moves += 1
        self._w13, self._w2 = (
            _grown(old, new, lacking, self.device)
            for old, new in zip((self._w13, self._w2), like, strict=True)
        )
        self._free += range(held, held + lacking)

    def __setitem__(self, expert: int, matrices: tuple[Fp4Stack, Fp4Stack]) -> None:
        """Put an expert's gate and up projection `[1, 2I, D]` and its down one `[1, D, I]` here."""
        if expert not in self._place:
            self.reserve(1, matrices)
            self._place[expert] = self._free.pop(0)
        place = self._place[expert]
        for stack, one in zip((self._w13, self._w2), matrices, strict=True):
            assert stack is not None
            stack.codes[place] = one.codes[0]
            stack.scales[place] = one.scales[0]
            stack.gain[place] = one.gain[0]
        self._slot_of_E[expert] = place

    def __delitem__(self, expert: int) -> None:
        """Give an expert's place to others."""
        self._free.append(self._place.pop(expert))
        self._slot_of_E[expert] = -1

    def __call__(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted outputs `[T, K, D]`, zeros for experts that are not here."""
        assert self._w13 is not None
        assert self._w2 is not None
        return fp4_experts(
            *(x_TD, experts_TK, weights_TK, self._slot_of_E, self._w13, self._w2),
            *(self.limit, self.released),
        )


def _grown(old: Fp4Stack | None, like: Fp4Stack, more: int, device: torch.device) -> Fp4Stack:
    held = 0 if old is None else old.count

    def room(one: Tensor) -> Tensor:
        return torch.zeros(held + more, *one.shape[1:], dtype=one.dtype, device=device)

    made = Fp4Stack(room(like.codes), room(like.scales), room(like.gain), like.columns)
    if old is not None:
        made.codes[:held], made.scales[:held], made.gain[:held] = old.codes, old.scales, old.gain
    return made
