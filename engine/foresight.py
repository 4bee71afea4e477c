"""Plan a decode step before the one before it has been drawn.

It is the step that follows if every sequence goes on and nobody comes: most of them are. Of a sequence that
has ended in the meantime it computes a row that nobody reads: blocks and slots that it gave back are written by
others only in steps that the device does later, and rows do not depend on each other.
"""

from __future__ import annotations

from whalepod.engine.plan import Plan
from whalepod.engine.request import Sequence
from whalepod.engine.scheduler import Scheduler
from whalepod.engine.step import MicroBatch, Part, Step


def plain(part: Part) -> bool:
    """Whether a part is one token whose draw depends on nothing but logits, settings and position."""
    if part.draw is None or len(part.ids) != 1 or part.tell is not None:
        return False
    settings = part.draw[0]
    return settings.adjust is None and not settings.alternatives


def foresee(scheduler: Scheduler, plan: Plan) -> Plan | None:
    """The step after `plan`, which is under way; None where more has to be decided than to go on.

    Its ids are not known; `rows` says which draws of `plan` they are.
    """
    micro_batches, here = plan.step.micro_batches, plan.here
    if scheduler.admits or scheduler.drafts or len(micro_batches) != 1:
        return None
    if len(here) != len(scheduler.running) or not all(plain(part) for _, part in here):
        return None
    planned: list[tuple[Sequence, Part]] = []
    rows: list[int] = []
    for row, part in enumerate(micro_batches[0].parts):
        sequence = plan.by_slot[part.slot]
        ends = sequence.generated + 1 >= sequence.request.max_tokens
        if sequence.slot != part.slot or ends:
            continue
        follows = _following(scheduler, sequence, part)
        if follows is None:
            return None
        planned.append((sequence, follows))
        rows.append(row)
    if not planned:
        return None
    step = Step((MicroBatch(tuple(part for _, part in planned)),))
    return Plan(step, planned, len(planned), rows=tuple(rows))


def _following(scheduler: Scheduler, sequence: Sequence, part: Part) -> Part | None:
    """The part after `part`; None where its block would have to be taken from others."""
    room, start = scheduler.room, part.start + 1
    if not room.grow(sequence, start + 1):
        return None
    if len(sequence.table) != len(sequence.blocks):
        sequence.table = tuple(sequence.blocks)
    kept = room.keep(sequence, start, start + 1, scheduler.running)
    draw = (sequence.request.sampling, start + 1)
    return Part(sequence.slot, start, (0,), sequence.table, draw, keep=kept)
