"""From one pipeline stage to the next: a step and its streams; and from the last back, its outcome.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.engine.attention import AttentionStage
from whalepod.engine.legs import SIZED_BYTES, TAG_STAGE, Incoming, Outgoing
from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.sampler import Drawn
from whalepod.engine.step import Step


def pass_on(fabric: Fabric, out: Outgoing, step: Step, x: Seq[Tensor], to: int) -> None:
    """Send a step and its streams to the next stage."""
    data = bytearray(step.to_bytes())
    head = torch.frombuffer(data, dtype=torch.uint8)
    out.send(fabric.control, head, to, TAG_STAGE, SIZED_BYTES + 1)
    for x_TCD in x[: len(step.micro_batches)]:
        message = x_TCD.contiguous().view(torch.uint8).flatten()
        out.send(fabric, message, to, TAG_STAGE, message.numel())


def take_over(fabric: Fabric, src: int, stage: AttentionStage) -> tuple[Step, list[Tensor]]:
    """Receive what `pass_on` sent."""
    host = torch.device("cpu")
    head = Incoming(fabric.control, src, TAG_STAGE, SIZED_BYTES + 1, host).take()
    step = Step.from_bytes(bytes(head.numpy()))
    shape = (stage.config.hc_mult, stage.config.hidden_size)
    x = []
    for micro_batch in step.micro_batches:
        size = micro_batch.tokens * shape[0] * shape[1] * stage.dtype.itemsize
        data = Incoming(fabric, src, TAG_STAGE, size, stage.device).take()
        x.append(data.view(stage.dtype).view(micro_batch.tokens, *shape))
    return step, x


def pack_outcome(drawn: Seq[Drawn], told: Seq[PromptLogprobs]) -> Tensor:
    """What the last stage answers, bytes: fp64 words of what was drawn, then what is told."""
    words = [float(len(drawn))]
    for one in drawn:
        words += [one.token, one.logprob, *(v for pair in one.alternatives for v in pair)]
    parts = [torch.tensor(words, dtype=torch.float64).view(torch.uint8)]
    for data in (part.to_bytes() for part in told):
        parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return torch.cat(parts)


def outcome_bytes(step: Step) -> int:
    """Size of that answer."""
    told = sum(
        PromptLogprobs.bytes_of(len(tokens), count)
        for m in step.micro_batches
        for _, tokens, count in m.tells()
    )
    return _drawn_bytes(step) + told


def unpack_outcome(message: Tensor, step: Step) -> tuple[list[Drawn], list[PromptLogprobs]]:
    """Read what `pack_outcome` made."""
    at = _drawn_bytes(step)
    pairs = iter(message[8:at].view(torch.float64).view(-1, 2).tolist())
    drawn = []
    for settings, _ in (d for m in step.micro_batches for d in m.draws()):
        token, logprob = next(pairs)
        others = (next(pairs) for _ in range(settings.alternatives))
        drawn.append(Drawn(int(token), logprob, tuple((int(i), p) for i, p in others)))
    data, told = message[at:].numpy().tobytes(), []
    for _, tokens, count in (t for m in step.micro_batches for t in m.tells()):
        size = PromptLogprobs.bytes_of(len(tokens), count)
        told.append(PromptLogprobs.from_bytes(data[:size], count))
        data = data[size:]
    return drawn, told


def _drawn_bytes(step: Step) -> int:
    wanted = (s.alternatives for m in step.micro_batches for s, _ in m.draws())
    return 8 + sum(16 * (1 + count) for count in wanted)
