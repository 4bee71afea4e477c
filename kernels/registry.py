"""Choose which implementation of a kernel runs, once, by device and by request."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

from whalepod.errors import KernelUnavailable

P = ParamSpec("P")
R = TypeVar("R")
Supports = Callable[[Tensor], bool]


class Kernel(Generic[P, R]):
    """A named operation with one reference in torch and any number of faster twins.

    The reference is always present and always correct; a twin is used when its
    `supports` says so for the first tensor argument. `WHALEPOD_KERNELS=torch`
    forces the reference everywhere.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self._twins: dict[str, tuple[Supports, Callable[P, R]]] = {}

    def twin(self, name: str, supports: Supports) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a faster implementation under `name`; later ones are tried first."""

        def add(function: Callable[P, R]) -> Callable[P, R]:
            self._twins = {name: (supports, function), **self._twins}
            return function

        return add

    def pick(self, x: Tensor) -> Callable[P, R]:
        """Return the implementation that `x` will run on."""
        wanted = os.environ.get("WHALEPOD_KERNELS")
        if wanted == "torch":
            return self.reference
        for name, (supports, function) in self._twins.items():
            if wanted in (None, name) and supports(x):
                return function
        if wanted is not None:
            raise KernelUnavailable(self.name, wanted, have=["torch", *self._twins])
        return self.reference

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation picked for the first argument."""
        assert isinstance(args[0], Tensor)
        return self.pick(args[0])(*args, **kwargs)
