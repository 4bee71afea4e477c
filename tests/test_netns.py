"""A RayService's pods for real: own addresses, the operator's start lines, tokens, no root.

Run by `make test-netns`, which makes the private network that this needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import netpods
import pytest
import torch
import yaml
from netcluster import Cluster

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not netpods.private_network(), reason="`make test-netns` runs this"),
]
PROMPT, TOKENS = "The whale swam", 24
MANIFEST = Path(__file__).parent / "data" / "rayservice.yaml"


@pytest.fixture(scope="module")
def expected(tiny: Path) -> str:
    """What layout `single` says in this process."""
    tokenizer = Tokenizer.open(tiny)
    assert tokenizer is not None
    config = Config.from_dict({"model": {"path": str(tiny)}, "topology": {"layout": "single"}})
    prompt = (0, *tokenizer.encode_text(PROMPT))
    with torch.inference_mode():
        engine = SingleEngine(config, Source(config.model, Checkpoint.open(tiny)))
        sampling = (
            Sampling(0.0, ignore_eos=True) if hasattr(Sampling, "ignore_eos") else Sampling(0.0)
        )
        events = engine.run([Request("0", prompt, TOKENS, sampling)])
        return tokenizer.decode([event.token for event in events])


@pytest.fixture(scope="module")
def cluster(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    (document,) = yaml.safe_load_all(MANIFEST.read_text())
    claim = tmp_path_factory.mktemp("claim")
    claim.chmod(0o755)
    shutil.copytree(tiny, claim / "tiny")
    (claim / "tiny").chmod(0o755)
    found = Cluster(document, {"model": claim}, [])
    try:
        found.start()
        yield found
    finally:
        print({k: round(v, 1) for k, v in found.times.items()})
        found.close()


def test_answers_over_http_and_grpc(cluster: Cluster, expected: str) -> None:
    assert cluster.ask_http(PROMPT, TOKENS) == expected
    assert cluster.ask_grpc(PROMPT, TOKENS) == expected
