"""What Triton needs of a machine with a GPU is asked for before a member loads anything."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from whalepod.config import Model
from whalepod.engine.source import Source
from whalepod.errors import ConfigError
from whalepod.kernels import jit
from whalepod.model.checkpoint import Checkpoint


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One that has everything, but for the folder of headers that is returned."""
    monkeypatch.delenv("WHALEPOD_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(jit, "triton", object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    return tmp_path


def test_everything_is_there(machine: Path) -> None:
    (machine / "Python.h").touch()
    assert jit.what_is_missing() is None


@pytest.mark.parametrize(
    ("lacks", "said"),
    [("triton", r"whalepod\[gpu\]"), ("compiler", "gcc"), ("headers", "Python.h")],
)
def test_what_lacks_is_named(
    machine: Path, lacks: str, said: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks != "headers":
        (machine / "Python.h").touch()
    if lacks == "triton":
        monkeypatch.setattr(jit, "triton", None)
    if lacks == "compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    checkpoint = Checkpoint.open(tiny)
    with pytest.raises(ConfigError, match=f"cannot be compiled: .*{said}"):
        Source(Model(path=str(tiny)), checkpoint, "cuda")
    monkeypatch.setenv("WHALEPOD_KERNELS", "torch")
    assert jit.what_is_missing() is None
    Source(Model(path=str(tiny)), checkpoint, "cpu")
