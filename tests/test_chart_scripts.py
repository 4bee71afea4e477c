"""The scripts that the chart's pods run, against a hub, a dashboard and an ingress of our own."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import importlib.util
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from chart.hub import FILES, REPOSITORY, REVISION, ROOT, Dashboard, Hub, run
from edge import Edge, served
from engines import Scripted

pytestmark = pytest.mark.helm


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    served_by = Hub(tiny)
    yield served_by
    served_by.server.shutdown()
    served_by.server.server_close()


def whole(target: Path, hub: Hub) -> bool:
    return {n: (target / n).read_bytes() for n in hub.files} == hub.files


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_download_resumes_a_broken_file_and_marks_what_is_whole(
    name: str, hub: Hub, tmp_path: Path
) -> None:
    large = max(hub.files, key=lambda n: len(hub.files[n]))
    hub.break_after[large] = 1000
    hub.token = "secret"
    done = hub.download(name, tmp_path / "m", HUB_TOKEN="secret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert whole(tmp_path / "m", hub)
    assert "bytes=1000-" in [r for _, r, _ in hub.asked], "the broken file was begun anew"
    assert all(token is None for path, _, token in hub.asked if path.startswith("/store/"))
    assert "every tensor verified" in done.stdout
    mark = json.loads((tmp_path / "m" / ".whalepod-complete").read_text())
    assert mark == {"repository": REPOSITORY, "revision": REVISION}

    before = len(hub.asked)
    assert hub.download(name, tmp_path / "m").returncode == 0
    assert len(hub.asked) == before, "a complete folder needs no hub"


def test_download_goes_on_after_a_killed_run(hub: Hub, tmp_path: Path) -> None:
    large = max(hub.files, key=lambda n: len(hub.files[n]))
    target = tmp_path / "m"
    target.mkdir()
    (target / f"{large}.part").write_bytes(hub.files[large][:5000])
    (target / "config.json").write_bytes(hub.files["config.json"])
    assert hub.download("huggingface", target).returncode == 0
    assert whole(target, hub)
    assert "bytes=5000-" in [r for _, r, _ in hub.asked]
    assert not [path for path, _, _ in hub.asked if path.endswith("/config.json")]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_download_refuses_a_wrong_checksum(name: str, hub: Hub, tmp_path: Path) -> None:
    rotten = next(n for n in hub.files if n.endswith(Path(name).suffix))
    hub.rotten.add(rotten)
    done = hub.download("huggingface", tmp_path / "m")
    assert done.returncode != 0
    assert f"{rotten}: checksum" in done.stderr
    assert not (tmp_path / "m" / rotten).exists()
    assert not (tmp_path / "m" / ".whalepod-complete").exists()


def test_download_says_when_the_token_is_missing(hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    done = hub.download("huggingface", tmp_path / "m")
    assert done.returncode != 0
    assert "answers 401; check model.repository" in done.stderr


def test_download_refuses_files_outside_its_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files["../evil"] = b"x"
    done = hub.download("modelscope", tmp_path / "m")
    assert done.returncode != 0
    assert "lists no usable files" in done.stderr
    assert not (tmp_path / "evil").exists()


def test_download_of_no_checkpoint_is_not_marked(hub: Hub, tmp_path: Path) -> None:
    del hub.files[next(n for n in hub.files if n.endswith(".safetensors"))]
    done = hub.download("huggingface", tmp_path / "m")
    assert done.returncode != 0
    assert "no checkpoint that whalepod can serve" in done.stderr
    assert not (tmp_path / "m" / ".whalepod-complete").exists()


def test_a_claim_is_verified_by_its_sums_and_its_tensors(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tiny.iterdir()}
    lines = [f"{value}  {name}" for name, value in sums.items()]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert run("download_model.py", "--verify", str(tmp_path)).returncode == 0
    (tmp_path / "config.json").write_bytes((tmp_path / "config.json").read_bytes() + b"\n")
    done = run("download_model.py", "--verify", str(tmp_path))
    assert "config.json: sha256" in done.stderr


def test_waiting_ends_with_the_mark(tmp_path: Path) -> None:
    script = [sys.executable, str(FILES / "download_model.py"), "--wait", str(tmp_path)]
    waiting = subprocess.Popen(script, stdout=subprocess.PIPE)
    try:
        assert waiting.stdout is not None
        assert b"waiting for" in waiting.stdout.readline()
        assert waiting.poll() is None
        (tmp_path / ".whalepod-complete").write_text("{}")
        assert waiting.wait(10) == 0
    finally:
        waiting.kill()
        waiting.communicate()


@pytest.mark.parametrize(
    ("states", "why"),
    [
        (["serving", "serving"], ""),
        (["serving", "joining"], "m1 is joining"),
        (["leaving"], "m0 is leaving"),
        ([], None),
    ],
)
def test_a_pod_is_ready_while_its_members_serve(states: list[str], why: str | None) -> None:
    mine = [{"name": f"m{i}", "host": "10.0.0.1", "state": s} for i, s in enumerate(states)]
    other = {"name": "other", "host": "10.0.0.2", "state": "serving"}
    assert load("member_ready").state({"members": [other, *mine]}, "10.0.0.1") == why


def test_the_probe_fails_while_the_ingress_does_not_answer() -> None:
    done = run("member_ready.py", "http://127.0.0.1:1/status", POD_IP="127.0.0.1")
    assert done.returncode == 1
    assert "127.0.0.1 does not tell" in done.stderr


def test_the_probe_reads_what_the_ingress_tells() -> None:
    async def ask(servers: Edge) -> subprocess.CompletedProcess[str]:
        url = f"{servers.http}/status"
        return await asyncio.to_thread(run, "member_ready.py", url, POD_IP="127.0.0.1")

    done = served(Scripted(), ask)
    assert done.returncode == 1
    assert "no member of 127.0.0.1 has joined" in done.stderr


def test_the_probe_asks_on_where_an_ingress_is_dead_or_of_another_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = load("member_ready")
    mine = {"name": "m", "host": "10.0.0.1", "state": "joining"}
    told: dict[str, list[dict[str, str]] | None] = {
        "10.1.0.1": None,
        "10.1.0.2": [],
        "10.1.0.3": [mine],
    }

    def fetch(address: str, port: int, path: str) -> dict[str, object]:
        assert (port, path) == (8000, "/status")
        members = told[address]
        if members is None:
            raise OSError("refused")
        return {"members": members}

    found = [(0, 0, 0, "", (address, 8000)) for address in told]
    monkeypatch.setattr(ready.socket, "getaddrinfo", lambda *a, **k: found)
    monkeypatch.setattr(ready, "fetch", fetch)
    assert ready.judge("http://status:8000/status", "10.0.0.1") == "m is joining"
    mine["state"] = "serving"
    assert ready.judge("http://status:8000/status", "10.0.0.1") == ""
    told["10.1.0.3"] = []
    assert ready.judge("http://status:8000/status", "10.0.0.1")


def test_the_smoke_test_speaks_http_and_grpc() -> None:
    async def ask(servers: Edge) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(run, "smoke.py", servers.http, servers.grpc, "10")

    engine = Scripted([104, 105, 33])
    done = served(engine, ask)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["HTTP", "stream", "gRPC"]
    assert len(engine.requests) == 3


def commands() -> list[str]:
    """The commands that lead a newcomer from an empty cluster to the first answer."""
    block = (ROOT / "helm" / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    return block.replace("\\\n", "").strip().splitlines()


def test_six_commands_lead_to_the_first_answer() -> None:
    found = commands()
    assert len(found) <= 6
    install = next(shlex.split(c, comments=True) for c in found if " helm/whalepod" in c)
    assert (ROOT / install[3]).is_dir()
    assert (ROOT / install[5]).is_file()


def test_the_last_of_them_gets_the_answer() -> None:
    code = shlex.split(commands()[-1])[-1]
    assert "http://whalepod-serve-svc:8000/" in code

    async def ask(servers: Edge) -> subprocess.CompletedProcess[str]:
        here = code.replace("http://whalepod-serve-svc:8000", servers.http)
        command = [sys.executable, "-c", here]
        return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)

    done = served(Scripted([104, 105, 33]), ask)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


def test_the_smoke_test_says_why_nothing_is_served() -> None:
    async def ask(servers: Edge) -> subprocess.CompletedProcess[str]:
        servers.engine.reason = "waiting for an expert member"
        return await asyncio.to_thread(run, "smoke.py", servers.http, servers.grpc, "1")

    done = served(Scripted([1]), ask)
    assert done.returncode != 0
    assert "waiting for an expert member" in done.stderr


@pytest.mark.parametrize("token", ["t", "wrong"])
def test_the_deploying_job_waits_and_hands_the_configuration_over(
    token: str, tmp_path: Path
) -> None:
    handler = type("Handler", (Dashboard,), {"tries": []})
    (tmp_path / "serve.yaml").write_text("applications: [{name: whalepod}]\n")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = run("deploy.py", str(tmp_path / "serve.yaml"), url, RAY_AUTH_TOKEN=token)
        server.shutdown()
    assert (done.returncode == 0) == (token == "t")
    assert [path for path, _, _ in handler.tries] == ["/api/serve/applications/"] * 2
    assert json.loads(handler.tries[1][2]) == {"applications": [{"name": "whalepod"}]}
    if token == "wrong":
        assert "refuses" in done.stderr
        assert "401" in done.stderr
