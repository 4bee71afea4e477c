"""Compile CPU twins with numba, where it is installed, and keep the machine code on disk.

The code is made for the CPU at hand when the twins are loaded (seconds for all of them) and read
from disk by later processes. Its folder is private to the user, because what lies there is run.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import llvmlite.binding as llvm
    import numba
    import numba.core.caching
except ImportError:  # pragma: no cover - the references are always there
    numba = llvm = None


@functools.cache
def features() -> frozenset[str]:
    """What code is made for, by LLVM's names: `NUMBA_CPU_FEATURES`, else what the CPU can do."""
    if numba is None:
        return frozenset()
    if numba.config.CPU_FEATURES is not None:
        wanted = numba.config.CPU_FEATURES.split(",")
        return frozenset(name[1:] for name in wanted if name.startswith("+"))
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def runs(device_type: str) -> bool:
    """Whether compiled twins can run on tensors of this device type.

    They need fused multiply-add, which every ARM and every x86 since 2013 has. Under Triton's
    interpreter they stay away, because there Triton's twins are what is tested.
    """
    if device_type != "cpu" or numba is None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return platform.machine() in ("aarch64", "arm64") or "fma" in features()


def _candidates() -> Iterator[Path]:
    if chosen := os.environ.get("WHALEPOD_CACHE"):
        yield Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    yield (Path(base) if base else Path("~/.cache").expanduser()) / "whalepod"
    yield Path(tempfile.gettempdir()) / f"whalepod-{os.getuid()}"


def _private(folder: Path) -> bool:
    """Make a folder that only this user can write to; False where that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o022 and os.access(folder, os.W_OK)


@functools.cache
def cache_folder() -> Path | None:
    """Where machine code is kept, or None where nothing can be written (then nothing is).

    `$WHALEPOD_CACHE`, the user's cache folder, or one under the temporary folder: the first that
    can be written. Its name holds a digest of our sources: code that was inlined has no date of
    its own.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for base in _candidates():
        folder = base / f"kernels-{digest.hexdigest()[:16]}"
        if _private(base) and _private(folder):
            return folder
    return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile where it is first used, without reordering sums."""
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    folder, before = cache_folder(), numba.config.CACHE_DIR
    if folder is None:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    numba.config.CACHE_DIR = str(folder)  # read while the function is wrapped
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = before


def entry(*floats: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function that Python calls, at once: addresses and counts, and these floats."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        names = inspect.signature(function).parameters
        made: Any = compiled(function)
        made.compile(tuple(numba.float64 if n in floats else numba.int64 for n in names))
        return made  # type: ignore[no-any-return]

    return make
