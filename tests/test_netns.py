"""A RayService's pods for real: own addresses, the operator's start lines, tokens, no root.

Run by `make test-netns`, which makes the private network that this needs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import netpods
import pytest
import torch
from chart import render
from netcluster import Cluster
from netpods import CLIENT, NETWORK, OPERATOR, STRANGER

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
PROMPT, TOKENS = "The whale swam", 160
VALUES = Path(__file__).parent / "data" / "netns-values.yaml"


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
def cluster(tiny: Path) -> Iterator[Cluster]:
    done = render.helm("template", "whale", str(render.CHART), "--values", str(VALUES))
    assert done.returncode == 0, done.stderr
    found = Cluster(render.parse(done.stdout), (tiny, "/models/demo"))
    try:
        found.start()
        yield found
    finally:
        print({k: round(v, 1) for k, v in found.times.items()})
        found.close()


def test_answers_over_http_and_grpc(cluster: Cluster, expected: str) -> None:
    assert cluster.ask_http(PROMPT, TOKENS) == expected
    assert cluster.ask_grpc(PROMPT, TOKENS) == expected


def test_members_are_where_their_group_is(cluster: Cluster) -> None:
    found = cluster.application()["deployments"]
    for pool in ("ingress", "attention", "experts"):
        addresses = {p.address for p in cluster.group(pool)}
        assert {r["node_ip"] for r in found[pool]["replicas"]} == addresses, pool


def test_every_probe_says_ready(cluster: Cluster) -> None:
    told = {p.pod.name: p.ready() for p in cluster.pods}
    assert set(told.values()) == {""}, told


def test_the_dashboard_wants_the_token(cluster: Cluster) -> None:
    right, cluster.token = cluster.token, "wrong"
    try:
        with pytest.raises(httpx.HTTPStatusError, match=r"40[13]"):
            cluster.rest("GET", "/api/serve/applications/")
    finally:
        cluster.token = right


def test_policies_hold_nothing_back_that_is_needed(cluster: Cluster) -> None:
    between = [d for p in cluster.pods for d in p.denied() if d.split()[1].startswith(NETWORK)]
    assert between == []  # (Ray also asks for a cloud's metadata; that is held back rightly)


@pytest.mark.parametrize(
    ("who", "group", "port", "open_"),
    [
        (CLIENT, "ingress", 8000, True),
        (CLIENT, "ingress", 9000, True),
        (CLIENT, "ingress", 10002, False),
        (CLIENT, "headgroup", 6379, False),
        (CLIENT, "headgroup", 8265, False),
        (OPERATOR, "headgroup", 8265, True),
        (STRANGER, "headgroup", 6379, False),
        (STRANGER, "ingress", 8000, False),
        (CLIENT, "experts", 6380, False),
    ],
)
def test_who_may_connect(cluster: Cluster, who: str, group: str, port: int, open_: bool) -> None:
    with socket.socket() as caller:
        caller.settimeout(1.0)
        caller.bind((who, 0))
        address = (cluster.group(group)[0].address, port)
        assert (caller.connect_ex(address) == 0) is open_


def experts(cluster: Cluster) -> list[str]:
    told = cluster.status().get("members", [])
    return [m["name"] for m in told if m["pool"] == "experts" and m["state"] == "serving"]


@pytest.mark.parametrize("loss", ["cut_off", "kill"])
def test_an_expert_node_is_lost_under_a_stream(cluster: Cluster, expected: str, loss: str) -> None:
    before, victim = set(experts(cluster)), cluster.group("experts")[0]
    with ThreadPoolExecutor(1) as one:
        answer = one.submit(cluster.ask_http, PROMPT, TOKENS)
        time.sleep(0.5)
        assert not answer.done(), "the stream ended before anything happened"
        getattr(victim, loss)()
        begun = time.monotonic()
        assert answer.result() == expected
    cluster.times[f"answer after {loss}"] = time.monotonic() - begun
    assert cluster.ask_grpc(PROMPT, TOKENS) == expected
    victim.kill()
    cluster.replace(victim)
    cluster.until(lambda: len(experts(cluster)) == 2, "two experts to serve")
    assert set(experts(cluster)) != before
    assert cluster.ask_http(PROMPT, TOKENS) == expected
    cluster.times[f"whole after {loss}"] = time.monotonic() - begun


def test_a_drained_node_hands_over(cluster: Cluster, expected: str) -> None:
    victim, before = cluster.group("experts")[0], len(cluster.status()["history"])
    with ThreadPoolExecutor(1) as one:
        ended = one.submit(victim.terminate, 40.0)
        while not ended.done():
            assert cluster.ask_http(PROMPT, TOKENS) == expected
        took = ended.result()
    assert took is not None, "the pod had to be killed"
    cluster.times["drain"] = took
    told = cluster.status()["history"][before:]
    assert [e["event"] for e in told] == ["serving"], f"not by one orderly epoch: {told}"
