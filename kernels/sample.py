"""Draw tokens from logits: temperature, min-p, top-k, top-p, then inverse transform.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.draw import ranked
from whalepod.kernels.jit import runs
from whalepod.kernels.registry import Kernel

# Columns of the settings of a row.
TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, UNIFORM = range(5)


@Kernel
def sample(logits_NV: Tensor, settings_N5: Tensor, filtered: bool = True) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Filters keep candidates in the order of (-logit, id); the number falls on one of those that are kept,
    side by side in the order of their ids. Equal logits give equal tokens.

    Args:
        logits_NV: `[N, V]` fp32. Of a row with NaN, +inf, or nothing finite, any token of the
            vocabulary is drawn, and its log-probability is not finite.
        settings_N5: `[N, 5]` fp64: temperature (0 is greedy, ties to the lowest id); top-k (0: all);
            top-p; logarithm of min-p (-inf: none); a number in `[0, 1)` that decides.
        filtered: False where no row has top-k or top-p, which saves a look at all logits.

    Returns:
        tokens `[N]` int64, and their log-probabilities under the unmodified logits `[N]` fp32. The
        Triton twin adds weights as whole numbers, exactly, but takes them from exponentials in fp32:
        it may choose a neighbour where the number falls within 1e-6 of a border between tokens.
    """
    rows = zip(logits_NV, settings_N5.tolist(), strict=True)
    drawn = [draw_row(row, *settings) for row, settings in rows]
    tokens = torch.tensor(drawn, dtype=torch.int64, device=logits_NV.device)
    return tokens, logprobs(logits_NV, tokens)


def logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probabilities of one token a row, `[N]` fp32."""
    return logits_NV.gather(1, tokens_N.unsqueeze(-1)).squeeze(1) - logits_NV.logsumexp(-1)


def draw_row(
    logits_V: Tensor,
    temperature: float,
    top_k: float,
    top_p: float,
    log_min_p: float,
    uniform: float,
) -> int:
    """Draw from one row, in fp64."""
    if temperature == 0:
        return int(logits_V.argmax())
    scaled, ids = logits_V.double() / temperature, None
    if top_k or top_p < 1:
        ids = ranked(logits_V)
        scaled = scaled[ids]
    if log_min_p > float("-inf"):
        # Probabilities of at least min_p times the best one's; the best is always among them.
        scaled = scaled.masked_fill(scaled < scaled.max() + log_min_p, float("-inf"))
    if top_k:
        scaled = scaled[: int(top_k)]
    chances = torch.softmax(scaled, dim=0)
    if top_p < 1:
        # Keep the smallest head whose mass reaches top_p; it always holds the best candidate.
        chances = chances[: int((chances.cumsum(0) < top_p).sum()) + 1]
    if ids is not None:
        ids, order = ids[: len(chances)].sort()
        chances = chances[order]
    cumulative = chances.cumsum(0)
    target = uniform * cumulative[-1].item()
    place = int(torch.searchsorted(cumulative, target, right=True))
    place = min(place, int(chances.nonzero()[-1]))
    return place if ids is None else int(ids[place])


from whalepod.kernels import sample_triton as _twins  # noqa: E402

sample.twin("triton", runs)(_twins.sample)
