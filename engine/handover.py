"""From one pipeline stage to the next: a step and its streams; and from the last back, what was drawn.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.engine.attention import AttentionStage
from whalepod.engine.legs import SIZED_BYTES, TAG_STAGE, Incoming, Outgoing
from whalepod.engine.sampler import Drawn
from whalepod.engine.step import Step


def pass_on(fabric: Fabric, out: Outgoing, step: Step, x: Seq[Tensor], to: int) -> None:
    """Send a step and its streams to the next stage."""
    data = bytearray(step.to_bytes())
    head = torch.frombuffer(data, dtype=torch.uint8).to(x[0].device)
    out.send(fabric, head, to, TAG_STAGE, SIZED_BYTES + 1)
    for x_TCD in x[: len(step.micro_batches)]:
        message = x_TCD.contiguous().view(torch.uint8).flatten()
        out.send(fabric, message, to, TAG_STAGE, message.numel())


def take_over(fabric: Fabric, src: int, stage: AttentionStage) -> tuple[Step, list[Tensor]]:
    """Receive what `pass_on` sent."""
    head = Incoming(fabric, src, TAG_STAGE, SIZED_BYTES + 1, stage.device).take()
    step = Step.from_bytes(bytes(head.cpu().numpy()))
    shape = (stage.config.hc_mult, stage.config.hidden_size)
    x = []
    for micro_batch in step.micro_batches:
        size = micro_batch.tokens * shape[0] * shape[1] * stage.dtype.itemsize
        data = Incoming(fabric, src, TAG_STAGE, size, stage.device).take()
        x.append(data.view(stage.dtype).view(micro_batch.tokens, *shape))
    return step, x


def pack_drawn(drawn: Seq[Drawn]) -> Tensor:
    """What the last stage answers, bytes: fp64 words, their number of tokens first."""
    words = [float(len(drawn))]
    for one in drawn:
        words += [one.token, one.logprob, *(v for pair in one.alternatives for v in pair)]
    return torch.tensor(words, dtype=torch.float64).view(torch.uint8)


def drawn_bytes(wanted: Seq[int]) -> int:
    """Size of that answer, given the alternatives that each draw asks for."""
    return 8 + sum(16 * (1 + count) for count in wanted)


def unpack_drawn(message: Tensor, wanted: Seq[int]) -> list[Drawn]:
    """Read what `pack_drawn` made."""
    words = message[8:].view(torch.float64).view(-1, 2).tolist()
    drawn, at = [], 0
    for count in wanted:
        (token, logprob), *others = words[at : at + 1 + count]
        drawn.append(Drawn(int(token), logprob, tuple((int(i), p) for i, p in others)))
        at += 1 + count
    return drawn
