from pathlib import Path
from typing import Any

import pytest

from whalepod.commands.cluster import read_config
from whalepod.config import Config
from whalepod.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


def test_shipped_files_are_sound() -> None:
    found = [Config.from_file(p) for p in CONFIGS.glob("*.yaml")]
    assert found


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ({}, "model: Field required"),
        ({"model": {"path": "x", "colour": 1}}, "model.colour: Extra inputs"),
        ({"model": {"path": "x", "dtype": "fp8"}}, "model.dtype"),
        ({"model": {"path": "x"}, "topology": {"experts": 0}}, "topology.experts"),
        (
            {"model": {"path": "x"}, "topology": {"layout": "single", "attention": 2}},
            "layout single has one member, not attention=2",
        ),
        (
            {"model": {"path": "x"}, "topology": {"layout": "ep", "stages": 2}},
            "layout ep has no stages (stages=2); use layout afd",
        ),
        ({"model": {"path": "x"}, "server": {"http_port": 99999}}, "server.http_port"),
    ],
)
def test_faults_name_key_and_value(data: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError) as failure:
        Config.from_dict(data, "file.yaml")
    assert fact in str(failure.value)
    assert "file.yaml" in str(failure.value)


def test_the_digest_covers_what_members_must_agree_on() -> None:
    def digest(**sections: Any) -> str:
        return Config.from_dict({"model": {"path": "x"}, **sections}).digest

    base = digest()
    assert digest(topology={"experts": 5}) == base
    assert digest(server={"http_port": 1234}) == base
    selector = {"experts": {"whalepod/role": "experts"}}
    assert digest(cluster={"label_selector": selector}) == base
    assert digest(engine={"max_batch": 5}) != base
    assert digest(topology={"micro_batches": 1}) != base


def test_overrides_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: a}\ntopology: {experts: 4}\n")
    config = read_config(str(file), "/other", ["topology.experts=3", "engine.max_context=99"])
    assert config.model.path == "/other"
    assert (config.topology.experts, config.engine.max_context) == (3, 99)
    assert read_config(str(file), None, []).model.path == str(Path.cwd() / "a")
    with pytest.raises(ConfigError, match="expected key=value"):
        read_config(str(file), None, ["topology.experts"])
    with pytest.raises(ConfigError, match="no model is named"):
        read_config(None, None, [])
    file.write_text("model: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(str(file), None, [])


def test_there_is_no_mode_that_gives_determinism_up() -> None:
    data = {"model": {"path": "/m"}, "engine": {"deterministic": True}}
    assert Config.from_dict(data).engine.deterministic
    data["engine"]["deterministic"] = False
    with pytest.raises(ConfigError, match=r"deterministic=false is no mode.*leave the key out"):
        Config.from_dict(data)
