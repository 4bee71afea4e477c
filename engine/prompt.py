"""What the model says of the tokens of a prompt, as it would have said of them had it drawn them.

Legend: N rows of logits, V vocabulary, R tokens, K alternatives of each.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whalepod.kernels.draw import best_tokens, ranked

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log-probabilities of consecutive tokens of a prompt, each given all before it.

    Args:
        logprobs_R: of the tokens. ranks_R: their places among all tokens, 1 for the most probable.
        ids_RK: the most probable tokens in their places, the best first; among equals the lowest id.
        values_RK: the log-probabilities of those.
    """

    logprobs_R: Floats
    ranks_R: Ints
    ids_RK: Ints
    values_RK: Floats

    def __len__(self) -> int:
        """Tokens told of."""
        return len(self.logprobs_R)

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity has spoilt them."""
        return bool(np.isfinite(self.logprobs_R).all())

    @classmethod
    def join(cls, parts: Seq[PromptLogprobs], count: int) -> PromptLogprobs:
        """One after the other; `count` alternatives a token."""
        none = cls.from_bytes(b"", count)
        rows = [none, *parts]
        return cls(
            np.concatenate([r.logprobs_R for r in rows]),
            np.concatenate([r.ranks_R for r in rows]),
            np.concatenate([r.ids_RK for r in rows]),
            np.concatenate([r.values_RK for r in rows]),
        )

    def cut(self, start: int, stop: int, count: int) -> PromptLogprobs:
        """Some of the tokens, with at most `count` alternatives."""
        some = slice(start, stop)
        return PromptLogprobs(
            self.logprobs_R[some],
            self.ranks_R[some],
            self.ids_RK[some, :count],
            self.values_RK[some, :count],
        )

    def to_bytes(self) -> bytes:
        """Rows of `bytes_of` bytes, one a token."""
        columns = [self.logprobs_R[:, None].view(np.int32), self.ranks_R[:, None]]
        columns += [self.ids_RK, np.ascontiguousarray(self.values_RK).view(np.int32)]
        return np.concatenate(columns, axis=1).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> PromptLogprobs:
        """Read what `to_bytes` wrote, given the number of alternatives."""
        words = np.frombuffer(data, np.int32).reshape(-1, 2 + 2 * count)
        floats = words.view(np.float32)
        ids, values = words[:, 2 : 2 + count], floats[:, 2 + count :]
        return cls(floats[:, 0].copy(), words[:, 1].copy(), ids.copy(), values.copy())

    @staticmethod
    def bytes_of(rows: int, count: int) -> int:
        """Length of what `to_bytes` writes."""
        return rows * 4 * (2 + 2 * count)


def score(logits_NV: Tensor, tokens_N: Tensor, count: int) -> PromptLogprobs:
    """What is told of one token a row.

    Args:
        logits_NV: `[N, V]` fp32.
        tokens_N: `[N]` int64.
        count: alternatives of each.
    """
    _, norm_N = best_tokens(logits_NV)
    own_N1 = logits_NV.gather(1, tokens_N.unsqueeze(-1))
    better_N = (logits_NV > own_N1).count_nonzero(-1)
    tied_N = (logits_NV >= own_N1).count_nonzero(-1) > better_N + 1
    for row in tied_N.nonzero().flatten().tolist():
        token = int(tokens_N[row])
        better_N[row] += (logits_NV[row, :token] == own_N1[row]).count_nonzero()
    ids_NK = most_probable(logits_NV, count)
    values_NK = logits_NV.gather(1, ids_NK) - norm_N.unsqueeze(-1)
    return PromptLogprobs(
        (own_N1.squeeze(1) - norm_N).cpu().numpy(),
        (better_N + 1).to(torch.int32).cpu().numpy(),
        ids_NK.to(torch.int32).cpu().numpy(),
        values_NK.cpu().numpy(),
    )


def most_probable(logits_NV: Tensor, count: int) -> Tensor:
    """The `count` best tokens of every row, in the order of (-logit, id), `[N, count]` int64.

    The same as the beginning of `ranked`, without sorting whole rows where no tie makes that due.
    """
    if not count:
        return torch.empty(len(logits_NV), 0, dtype=torch.int64, device=logits_NV.device)
    values_NK, ids_NK = logits_NV.topk(count)
    ids_NK = ids_NK.sort(-1).values
    order_NK = logits_NV.gather(1, ids_NK).sort(dim=-1, descending=True, stable=True).indices
    ids_NK = ids_NK.gather(1, order_NK)
    # Of tokens equal to the last one, any may have been taken.
    tied_N = (logits_NV >= values_NK[:, -1:]).count_nonzero(-1) > count
    for row in tied_N.nonzero().flatten().tolist():
        ids_NK[row] = ranked(logits_NV[row])[:count]
    return ids_NK
