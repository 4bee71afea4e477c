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
def sample(logits_NV: Tensor, settings_N5: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Candidates are taken in the order of (-logit, id), so equal logits give equal tokens.

    Args:
        logits_NV: `[N, V]` fp32, no NaN, at least one finite a row.
        settings_N5: `[N, 5]` fp64: temperature (0 is greedy, ties to the lowest id); top-k (0: all);
            top-p; logarithm of min-p (-inf: none); a number in `[0, 1)` that decides.

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
    ids = ranked(logits_V)
    ordered = logits_V[ids].double() / temperature
    if log_min_p > float("-inf"):
        # Probabilities of at least min_p times the best one's; the best is always among them.
        keep = int((ordered >= ordered[0] + log_min_p).sum())
        ordered, ids = ordered[:keep], ids[:keep]
    if top_k:
        ordered, ids = ordered[: int(top_k)], ids[: int(top_k)]
    cumulative = torch.softmax(ordered, dim=0).cumsum(0)
    if top_p < 1:
        # Keep the smallest head whose mass reaches top_p; it always holds the best candidate.
        keep = int((cumulative < top_p).sum()) + 1
        cumulative = cumulative[:keep]
    target = uniform * cumulative[-1].item()
    place = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(place, len(cumulative) - 1)])


from whalepod.kernels import sample_triton as _twins  # noqa: E402

sample.twin("triton", runs)(_twins.sample)
