"""From one pipeline stage to the next: a step and its streams.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.engine.attention import AttentionStage
from whalepod.engine.legs import SIZED_BYTES, TAG_STAGE, Incoming, Outgoing
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
