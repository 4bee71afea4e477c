"""The commands that need no cluster, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from whalepod.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("whalepod: ")
    assert "Traceback" not in said
    return said


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_make_tiny_then_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    run(capsys, "make-tiny", folder, "--preset", "tiny-base", "--seed", "4")
    told = run(capsys, "inspect", folder)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    size, tensors = index["metadata"]["total_size"], len(index["weight_map"])
    assert told.splitlines()[-1] == f"total_bytes {size} tensors {tensors}"
    assert "already holds" in refuse(capsys, "make-tiny", folder)


def test_generate_text_and_json(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    model = ("--model", str(tiny), "--max-tokens", "5")
    text = run(capsys, "generate", *model, "--prompt", "The whale")
    (found,) = lines(run(capsys, "generate", *model, "--prompt", "The whale", "--json"))
    assert found["text"] == text.removesuffix("\n")
    assert len(found["ids"]) == 5
    assert found["finish_reason"] == "length"
    ids = ",".join(map(str, found["prompt_ids"]))
    again = run(capsys, "generate", *model, "--prompt-ids", ids, "--json", "--layout", "afd")
    assert lines(again) == [found]


def test_generate_from_a_file_in_order(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    requests = [
        {"prompt": "A pod", "max_tokens": 9},
        {"prompt_ids": [0, 5, 6], "temperature": 1.0, "seed": 3, "ignore_eos": True},
        {"prompt_ids": [0, 5, 6], "temperature": 1.0, "seed": 4, "ignore_eos": True},
        {"prompt": "42", "max_tokens": 2},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, requests)) + "\n\n")
    base = ("generate", "--model", str(tiny), "--prompts", str(file), "--json", "--max-tokens", "6")
    found = lines(run(capsys, *base))
    assert [len(f["ids"]) for f in found] == [9, 6, 6, 2]
    assert found[1]["prompt_ids"] == [0, 5, 6]
    assert found[1]["ids"] != found[2]["ids"]
    assert lines(run(capsys, *base, "--max-batch", "1")) == found
    assert lines(run(capsys, *base, "--layout", "ep", "--attention", "2")) == found


def test_generate_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bare"))
    (folder / "tokenizer.json").unlink()
    base = ("generate", "--model", str(folder), "--max-tokens", "3")
    (found,) = lines(run(capsys, *base, "--prompt-ids", "0,5", "--json"))
    assert found["text"] is None
    assert run(capsys, *base, "--prompt-ids", "0,5") == ",".join(map(str, found["ids"])) + "\n"
    assert "has no tokenizer.json" in refuse(capsys, *base, "--prompt", "x")


def test_bad_input_is_explained(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    model = ("generate", "--model", str(tiny))
    assert "outside the vocabulary" in refuse(capsys, *model, "--prompt-ids", "5,99999")
    assert "whole numbers" in refuse(capsys, *model, "--prompt-ids", "a,b")
    assert "max_tokens is 0" in refuse(capsys, *model, "--prompt", "x", "--max-tokens", "0")
    assert "temperature is 3.0" in refuse(capsys, *model, "--prompt", "x", "--temperature", "3")
    assert "exceed the context" in refuse(capsys, *model, "--prompt", "x", "--max-tokens", "999999")
    assert "does not exist" in refuse(capsys, "generate", "--model", "/none", "--prompt", "x")
    assert "does not exist" in refuse(capsys, "inspect", "/none")
    file = tmp_path / "p.jsonl"
    for text, fact in (
        ("{", "line 1 is no JSON"),
        ('{"promt": "x"}', "'promt'"),
        ("{}", "either prompt or prompt_ids"),
        ('{"prompt_ids": [true]}', "whole number"),
        ("", "no request"),
    ):
        file.write_text(text)
        assert fact in refuse(capsys, *model, "--prompts", str(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own schema, at import
def test_serve_config_is_what_ray_accepts(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from whalepod.config import Config

    told = run(capsys, "serve-config", "--model", str(tiny), "--set", "topology.experts=5")
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(told))
    (application,) = parsed.applications
    assert application.external_scaler_enabled
    assert application.import_path == "whalepod.ingress.serve:build"
    assert Config.from_dict(application.args["config"]).topology.experts == 5


def test_cluster_commands_without_a_cluster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHALEPOD_STATE", str(tmp_path))
    assert "no local cluster runs" in refuse(capsys, "scale", "experts=2")
    assert "expected attention=N" in refuse(capsys, "scale", "whales=2")
    assert "is whalepod up?" in refuse(capsys, "status", "--url", "http://127.0.0.1:9")
    assert run(capsys, "down") == "no local cluster runs\n"
    assert "127.0.0.1:9" in refuse(capsys, "down", "--address", "http://127.0.0.1:9")
    assert "expected local, auto" in refuse(capsys, "down", "--address", "ftp://x")
