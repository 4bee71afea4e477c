"""Everything whalepod raises on purpose.

WhalepodError
├── ConfigError          the user's file, flag or model configuration is wrong; nothing was started
├── CheckpointError      a tensor is missing, misshapen, truncated or of an unknown dtype
├── RequestError         one request is wrong; it is answered with 4xx / INVALID_ARGUMENT
├── Overloaded           the queue is full; answered with 429 / RESOURCE_EXHAUSTED
├── DeadlineExceeded     the request's time is over; answered with 504 / DEADLINE_EXCEEDED
├── NotReady             no epoch is serving yet; answered with 503 / UNAVAILABLE
├── KernelUnavailable    the asked-for kernel cannot run here
├── OutOfBlocks          the KV pool is full; the scheduler preempts, the user never sees it
└── EpochLost            a member died; the step is void, the request is replayed
"""

from __future__ import annotations

from collections.abc import Sequence


class WhalepodError(Exception):
    """Base of the tree above."""


class ConfigError(WhalepodError):
    """The configuration cannot work; the message names the key, its value and a value that would."""


class CheckpointError(WhalepodError):
    """A checkpoint cannot be read; the message names file, tensor, what was found and expected."""


class RequestError(WhalepodError):
    """A request cannot be served as written; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(WhalepodError):
    """The server takes no more work now; `retry_after_s` says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(WhalepodError):
    """A request was not done within the time its sender gave it; what it held is free."""


class NotReady(WhalepodError):
    """No epoch serves; the message says what is awaited."""


class KernelUnavailable(WhalepodError):
    """Name the kernel, what was asked for, and what there is."""

    def __init__(self, kernel: str, wanted: str, have: Sequence[str]) -> None:
        super().__init__(
            f"kernel {kernel!r} has no {wanted!r} implementation that runs here; "
            f"it has {', '.join(have)}. Unset WHALEPOD_KERNELS to let each call choose."
        )


class OutOfBlocks(WhalepodError):
    """The cache has no room left for this step: KV blocks, or the slots of sequences."""

    def __init__(self, wanted: int, free: int, what: str = "KV blocks") -> None:
        super().__init__(f"{wanted} {what} wanted, {free} free; give a sequence's room back first")


class EpochLost(WhalepodError):
    """Say which epoch ended, who left, and what happens next."""

    def __init__(self, epoch: int, gone: Sequence[str], detail: str = "") -> None:
        who = ", ".join(gone) if gone else "a member"
        super().__init__(
            f"epoch {epoch} ended: {who} stopped answering{f' ({detail})' if detail else ''}. "
            f"Steps in flight are run again in epoch {epoch + 1}."
        )
        self.epoch = epoch
        self.gone = tuple(gone)
