"""Choose which implementation of a kernel runs, once per device type."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from torch import Tensor

from whalepod.errors import KernelUnavailable

P = ParamSpec("P")
R = TypeVar("R")
Supports = Callable[[str], bool]


def load_twins(device_type: str) -> None:
    """Import the compiled twins, where they can run: seconds the first time on a machine.

    A first call does so too; a member does it before others wait for its first step.
    """
    if device_type != "cpu" or os.environ.get("WHALEPOD_KERNELS") == "torch":
        return
    compiled = importlib.import_module("whalepod.kernels.compiled")
    if compiled.runs("cpu"):
        importlib.import_module("whalepod.kernels.cpu")


_NAMES = {"torch"}


class Kernel(Generic[P, R]):
    """A named operation with one reference in torch and any number of faster twins.

    The reference is always present and always correct; a twin is used when its
    `supports` says so for the device type of the first argument. `WHALEPOD_KERNELS=torch`
    forces the reference everywhere, any other value the twin of that name where there is one.
    The choice is made at the first call on a device type and kept, so the hot path pays one dict
    lookup.
    """

    every: ClassVar[list[Kernel[..., Any]]] = []

    def __init__(self, reference: Callable[P, R]) -> None:
        Kernel.every.append(self)
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self._twins: dict[str, tuple[Supports, Callable[P, R]]] = {}
        self._picked: dict[str, Callable[P, R]] = {}

    def twin(self, name: str, supports: Supports) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a faster implementation under `name`; later ones are tried first."""

        def add(function: Callable[P, R]) -> Callable[P, R]:
            _NAMES.add(name)
            self._twins = {name: (supports, function), **self._twins}
            self._picked = {}
            return function

        return add

    def pick(self, device_type: str) -> Callable[P, R]:
        """Return the implementation that runs on `device_type` (`cpu`, `cuda`)."""
        wanted = os.environ.get("WHALEPOD_KERNELS")
        if wanted == "torch":
            return self.reference
        load_twins(device_type)
        for name, (supports, function) in self._twins.items():
            if wanted in (None, name) and supports(device_type):
                return function
        if wanted is not None and (wanted in self._twins or wanted not in _NAMES):
            raise KernelUnavailable(self.name, wanted, have=["torch", *self._twins])
        return self.reference

    def forget(self) -> None:
        """Choose anew at the next call, as when `WHALEPOD_KERNELS` has changed."""
        self._picked = {}

    def has_twin(self, device_type: str) -> bool:
        """Whether another implementation than the reference runs on `device_type`."""
        function = self._picked.get(device_type)
        if function is None:
            function = self._picked[device_type] = self.pick(device_type)
        return function is not self.reference

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation picked for the first argument's device."""
        first = args[0]
        assert isinstance(first, Tensor)
        kind = "cpu" if first.is_cpu else first.device.type
        function = self._picked.get(kind)
        if function is None:
            function = self._picked[kind] = self.pick(kind)
        return function(*args, **kwargs)
