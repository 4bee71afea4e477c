"""The whole system on Ray: real clients, real processes, real signals.

One cluster serves the random checkpoint; what it says is compared with layout `single` in this
process, token for token, while members come, go and die.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch

from whalepod.actors import localcluster
from whalepod.actors.dashboard import Dashboard
from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
PROMPTS = ["The whale swam", "A pod of whales", "Once upon a time there was", "42"]
TOKENS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A running `whalepod up`."""

    state: Path
    http: str
    grpc: str
    model: Path
    dashboard: Dashboard

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "whalepod", *arguments],
            env={**os.environ, "WHALEPOD_STATE": str(self.state)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.http}/status", timeout=10).json()
        return found

    def members(self, pool: str) -> list[str]:
        told = self.status()["members"]
        return [m["name"] for m in told if m["pool"] == pool and m["state"] == "serving"]

    def pids(self, pool: str) -> list[int]:
        """Process ids of a pool's replicas that Serve counts as running."""
        application = self.dashboard.application()
        assert application is not None
        replicas = application["deployments"][pool]["replicas"]
        return [r["pid"] for r in replicas if r["state"] == "RUNNING"]

    def until(self, what: Callable[[], bool], limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < end, f"still waiting: {json.dumps(self.status())[:2000]}"
            time.sleep(0.1)

    def settled(self, **pools: int) -> None:
        """Wait until an epoch serves with exactly these pool sizes."""

        def reached() -> bool:
            # A controller that is just coming back says only that.
            ready = bool(self.status().get("ready"))
            return ready and all(len(self.members(p)) == n for p, n in pools.items())

        self.until(reached)


@contextmanager
def serving(model: Path, state: Path, *settings: str, limit_s: float = 200) -> Iterator[Served]:
    """`whalepod up` with these settings, and its end."""
    http_port, grpc_port = free_port(), free_port()
    before = {k: os.environ.get(k) for k in ("WHALEPOD_STATE", "RAY_AUTH_TOKEN_PATH")}
    os.environ["WHALEPOD_STATE"] = str(state)
    up = [sys.executable, "-m", "whalepod", "up", "--model", str(model)]
    ports = f"server.http_port={http_port}", f"server.grpc_port={grpc_port}"
    for setting in (*ports, *settings):
        up += ["--set", setting]
    done = subprocess.run(up, capture_output=True, text=True, timeout=limit_s)
    try:
        assert done.returncode == 0, done.stderr
        cluster = localcluster.running()
        assert cluster is not None
        dashboard = Dashboard(cluster.dashboard, localcluster.use_token(cluster))
        http = f"http://127.0.0.1:{http_port}"
        yield Served(state, http, f"127.0.0.1:{grpc_port}", model, dashboard)
    finally:
        if (cluster := localcluster.running()) is not None:
            localcluster.stop(cluster)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("state")
    with serving(tiny, state, "topology.experts=2", "server.max_body_bytes=1000000") as found:
        yield found


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    """Greedy tokens of every prompt by layout `single` in this process."""
    tokenizer = Tokenizer.open(tiny)
    assert tokenizer is not None
    config = Config.from_dict({"model": {"path": str(tiny)}, "topology": {"layout": "single"}})
    out: dict[str, list[int]] = {}
    with torch.inference_mode():
        engine = SingleEngine(config, Source(config.model, Checkpoint.open(tiny)))
        requests = [
            Request(str(i), (0, *tokenizer.encode_text(p)), TOKENS, Sampling(0.0))
            for i, p in enumerate(PROMPTS)
        ]
        for event in engine.run(requests):
            out.setdefault(event.request_id, []).append(event.token)
    return [out[str(i)] for i in range(len(PROMPTS))]


async def stream(client: httpx.AsyncClient, served: Served, i: int) -> list[int]:
    """Stream one completion over HTTP; returns its token ids."""
    body = {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    ids: list[int] = []
    async with client.stream("POST", f"{served.http}/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                ids += chunk["choices"][0]["token_ids"]
    return ids


def under_load(
    served: Served, act: Callable[[], object], streams: int = 8, delay_s: float = 0.8
) -> list[list[int]]:
    """Run `act` while streams are going on; returns what they gave."""

    async def run() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=120) as client:
            tasks = [asyncio.create_task(stream(client, served, i)) for i in range(streams)]
            await asyncio.sleep(delay_s)
            assert not any(t.done() for t in tasks), "the streams ended before anything happened"
            await asyncio.to_thread(act)
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def ours(expected: list[list[int]], count: int = 8) -> list[list[int]]:
    return [expected[i % len(PROMPTS)] for i in range(count)]


# -- real clients ---------------------------------------------------------------------------------


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0)


def test_openai_completions(served: Served, expected: list[list[int]]) -> None:
    tokenizer = Tokenizer.open(served.model)
    assert tokenizer is not None
    with client_of(served) as client:
        model = client.models.list().data[0].id
        whole = client.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=20, temperature=0
        )
        assert whole.choices[0].text == tokenizer.decode(expected[0][:20])
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 20
        chunks = list(
            client.completions.create(
                model=model,
                prompt=PROMPTS[0],
                max_tokens=20,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_prompts_are_told_of_and_choices_made(served: Served) -> None:
    with client_of(served) as client:
        model = client.models.list().data[0].id
        # The model is random, so its text would not be encoded as it was made; ids are.
        made = client.completions.create(
            model=model,
            prompt=list(range(40, 240)),
            max_tokens=8,
            n=3,
            seed=5,
            logprobs=2,
            extra_body={"return_token_ids": True},
        )
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        assert made.usage is not None
        assert made.usage.prompt_tokens == 200
        for choice in made.choices:
            assert choice.model_extra is not None
            assert choice.logprobs is not None
            known = [*range(40, 240), *choice.model_extra["token_ids"]]
            told = client.completions.create(
                model=model,
                prompt=known,
                max_tokens=0,
                echo=True,
                logprobs=2,
                extra_body={"prompt_logprobs": 0},
            )
            again = told.choices[0].logprobs
            assert again is not None
            assert again.token_logprobs is not None
            assert again.token_logprobs[200:] == choice.logprobs.token_logprobs
            assert again.top_logprobs is not None
            assert again.top_logprobs[200:] == choice.logprobs.top_logprobs


def test_openai_chat(served: Served) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where do whales live?"},
    ]
    with client_of(served) as client:
        whole = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=16, temperature=0
        )
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=16, temperature=0, stream=True
            )
        )
    message = whole.choices[0].message
    text = (message.model_extra or {})["reasoning_content"] or message.content
    assert text
    deltas = [c.choices[0].delta for c in chunks]
    said = [(d.model_extra or {}).get("reasoning_content") or d.content or "" for d in deltas]
    assert "".join(said) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_errors_and_the_server_goes_on(served: Served) -> None:
    with client_of(served) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="tiny", prompt="x", temperature=-1)
        with pytest.raises(openai.BadRequestError, match="exceed the context"):
            client.completions.create(model="tiny", prompt="x", max_tokens=10**6)
        big = httpx.post(f"{served.http}/v1/completions", content=b"x" * 20_000_000, timeout=60)
        assert big.status_code == 413
        again = client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert again.choices[0].finish_reason == "length"


def test_a_timeout_ends_a_request_and_the_next_one_runs(served: Served) -> None:
    more = {"timeout": 0.4, "ignore_eos": True, "priority": -1}
    with client_of(served) as client:
        with pytest.raises(openai.InternalServerError, match=r"not done within its 0.4 s") as late:
            client.completions.create(model="tiny", prompt="x", max_tokens=1900, extra_body=more)
        assert late.value.status_code == 504
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 0


def test_grpc_client(served: Served, expected: list[list[int]]) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        sampling = pb.Sampling(max_tokens=12, temperature=0)
        request = pb.CompleteRequest(text=PROMPTS[1], sampling=sampling)
        whole = stub.Complete(request, timeout=60)
        assert list(whole.token_ids) == expected[1][:12]
        assert whole.usage.completion_tokens == 12
        parts = list(stub.CompleteStream(request, timeout=60))
        assert [t for p in parts for t in p.token_ids] == expected[1][:12]
        assert parts[-1].finish_reason == pb.FINISH_REASON_LENGTH
        messages = [pb.Message(role=pb.ROLE_USER, content="hello")]
        chat = pb.ChatRequest(messages=messages, sampling=sampling, thinking=False)
        answer = stub.Chat(chat, timeout=60)
        streamed = list(stub.ChatStream(chat, timeout=60))
        assert "".join(p.content for p in streamed) == answer.content
        with pytest.raises(grpc.RpcError) as failure:
            stub.Complete(pb.CompleteRequest(), timeout=60)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_everything_listens_on_loopback(served: Served) -> None:
    group = os.getpgid(localcluster.running().pid)  # type: ignore[union-attr]
    inodes = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) != os.getsid(group):
                continue
            for fd in os.listdir(f"/proc/{pid}/fd"):
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    private = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) > 5
    assert not [address for address in listening if address not in private]


# -- the same tokens, whatever happens --------------------------------------------------------------


def test_eight_streams_give_the_tokens_of_single(served: Served, expected: list[list[int]]) -> None:
    assert under_load(served, lambda: None, delay_s=0.1) == ours(expected)


@pytest.mark.parametrize("pool", ["experts", "router", "attention"])
def test_a_killed_member_changes_no_token(
    served: Served, expected: list[list[int]], pool: str
) -> None:
    served.settled(attention=1, router=1, experts=2)
    epoch = served.status()["epoch"]

    def kill() -> None:
        os.kill(served.pids(pool)[0], signal.SIGKILL)

    assert under_load(served, kill) == ours(expected)
    served.settled(attention=1, router=1, experts=2)
    assert served.status()["epoch"] > epoch


def test_a_killed_controller_is_noticed_by_nobody(
    served: Served, expected: list[list[int]]
) -> None:
    served.settled(attention=1, router=1, experts=2)
    epoch = served.status()["epoch"]
    session = os.getsid(localcluster.running().pid)  # type: ignore[union-attr]

    def kill() -> None:
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                named = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Controller")
                if named and os.getsid(int(pid)) == session:
                    found.append(int(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
        assert len(found) == 1
        os.kill(found[0], signal.SIGKILL)

    assert under_load(served, kill) == ours(expected)
    served.settled(attention=1, router=1, experts=2)
    assert served.status()["epoch"] == epoch


def test_scaling_under_load_fails_no_stream(served: Served, expected: list[list[int]]) -> None:
    """Attention 1 -> 2 -> 1 by Ray's REST call, experts 2 -> 3 -> 2 by the command."""
    served.settled(attention=1, router=1, experts=2)
    for act, sizes in (
        (lambda: served.dashboard.scale("attention", 2), {"attention": 2, "experts": 2}),
        (lambda: served.command("scale", "experts=3"), {"attention": 2, "experts": 3}),
        (lambda: served.dashboard.scale("attention", 1), {"attention": 1, "experts": 3}),
        (lambda: served.command("scale", "experts=2"), {"attention": 1, "experts": 2}),
    ):
        assert under_load(served, act) == ours(expected)
        served.settled(**sizes)


def test_status_shows_members(served: Served) -> None:
    text = served.command("status")
    assert "serving; fabric gloo" in text
    assert text.count("expert ") >= 2


@pytest.mark.parametrize(
    "topology",
    [
        {"layout": "single"},
        {"layout": "ep", "attention": 2},
        {"attention": 2, "router": "attention", "experts": 2},
        {"stages": 2, "experts": 3},
    ],
    ids=lambda t: " ".join(f"{k}={v}" for k, v in t.items()),
)
def test_other_layouts_on_ray(
    served: Served, expected: list[list[int]], topology: dict[str, Any]
) -> None:
    """Redeploy the running cluster with another layout; its tokens are the same."""
    port = served.grpc.rsplit(":", 1)[1]
    server = {"http_port": int(served.http.rsplit(":", 1)[1]), "grpc_port": int(port)}
    config = Config.from_dict(
        {"model": {"path": str(served.model)}, "topology": topology, "server": server}
    )
    served.dashboard.deploy(config)

    def reached() -> bool:
        try:
            told = served.status()
        except (httpx.HTTPError, ValueError):
            return False
        return told.get("config_digest") == config.digest and bool(told["ready"])

    served.until(reached, 90)
    assert under_load(served, lambda: None, streams=1, delay_s=0.05) == ours(expected, 1)
    assert under_load(served, lambda: None, delay_s=0.05) == ours(expected)
    if topology.get("attention") == 2:
        followed_up(served)


def followed_up(served: Served) -> None:
    """Follow-up requests go to the member that knows their beginning, each of several."""
    client = client_of(served)
    for first in range(3, 11):
        prompt = [first + i % 200 for i in range(300)]
        for more in ([], [5] * 10, [6] * 20):
            done = client.completions.create(model="tiny", prompt=prompt + more, max_tokens=1)
            assert done.usage is not None
            details = done.usage.prompt_tokens_details
            known = details.cached_tokens if details else 0
            assert known == (256 if more else 0), (first, more)
