"""Checkpoints made here are in the released format: transformers reads them, to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.errors import ConfigError
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tiny import PRESETS, make_tiny


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path: Path, tiny: Path) -> None:
    assert digest(make_tiny(tmp_path / "again")) == digest(tiny)
    assert digest(make_tiny(tmp_path / "other", seed=1)) != digest(tiny)


def test_files_are_for_everybody(tmp_path: Path) -> None:
    # Members may run as another user than whoever wrote the checkpoint.
    assert {p.stat().st_mode & 0o044 for p in make_tiny(tmp_path / "new").iterdir()} == {0o044}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound_and_sharded(preset: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / preset, preset)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.unexpected == []
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(s.nbytes for s in checkpoint.specs.values())


def test_an_unknown_preset_and_a_used_folder(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError, match="tiny-pro"):
        make_tiny(tmp_path / "x", "huge")
    with pytest.raises(ConfigError, match="already holds"):
        make_tiny(tiny)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("preset", ["tiny", "tiny-pro", "tiny-flash"])
def test_transformers_loads_it_whole_and_says_the_same(preset: str, tmp_path: Path) -> None:
    """No missing and no unexpected key, and the same greedy tokens from the same files."""
    from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

    folder = make_tiny(tmp_path / preset, preset, seed=3)
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(
            dequantize=True, scale_fmt="ue8m0", expert_dtype="fp4"
        ),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not [k for k in info["unexpected_keys"] if not k.startswith("mtp.")]
    model = model.float().eval()
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(3, 900, (150,), generator=generator)
    with torch.inference_mode():
        ids = prompt[None]
        for _ in range(24):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        config = Config.from_dict(
            {"model": {"path": str(folder)}, "topology": {"layout": "single"}}
        )
        engine = SingleEngine(config, Source(config.model, Checkpoint.open(folder)))
        request = Request("r", tuple(prompt.tolist()), 24, Sampling(0.0), ignore_eos=True)
        ours = [event.token for event in engine.run([request])]
    assert ours == ids[0, 150:].tolist()
