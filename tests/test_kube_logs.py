"""`whalepod k8s logs`: chosen pods, merged by time, followed through restarts and replacements."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from kube_api import Api, refuse
from kube_world import PODS, RELEASE, fill, pod

from whalepod.cli import main
from whalepod.cluster.kube import Kube
from whalepod.cluster.kube_logs import Choice, Line, Tail, split
from whalepod.cluster.kube_objects import KubeError
from whalepod.cluster.kube_status import INSTANCE
from whalepod.commands.k8s import seconds
from whalepod.errors import ConfigError

SELECTOR = f"{INSTANCE}={RELEASE}"


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    with found.serve():
        fill(found)
        yield found


@pytest.fixture
def kube(api: Api, tmp_path: Path) -> Iterator[Kube]:
    with Kube.open(api.kubeconfig(tmp_path), timeout_s=10) as found:
        yield found


def line(second: float, text: str) -> bytes:
    return f"2026-01-31T12:00:{second:012.9f}Z {text}\n".encode()


def on_log(api: Api, name: str, answer: Any) -> None:
    api.on(f"get {PODS}/{name}/log", answer)


class Run:
    def __init__(self, api: Api, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config, self.capsys = api.kubeconfig(folder), capsys
        self.err = ""

    def __call__(self, *arguments: str) -> list[str]:
        main(["k8s", "logs", RELEASE, *arguments, "--kubeconfig", self.config])
        said = self.capsys.readouterr()
        self.err = said.err
        return said.out.splitlines()

    def refused(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            self(*arguments)
        assert ended.value.code == 1
        return self.capsys.readouterr().err


@pytest.fixture
def run(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(api, tmp_path, capsys)


def test_lines_of_all_pods_in_the_order_of_time(api: Api, run: Run) -> None:
    on_log(api, "deep-head", line(1, "one") + line(4, "four") + b"a line without a time\n")
    on_log(api, "deep-att-0", line(3, "three"))
    on_log(api, "deep-exp-0", line(2, "two") + line(5, "five"))
    assert run() == [
        "deep-head | one",
        "deep-exp-0 | two",
        "deep-att-0 | three",
        "deep-head | four",
        "deep-head | a line without a time",
        "deep-exp-0 | five",
    ]
    asked = [r.params for r in api.requests if r.subresource == "log"]
    assert {p["container"] for p in asked} == {"ray"}
    assert {p["tailLines"] for p in asked} == {"200"}
    assert all("sinceSeconds" not in p and p["previous"].lower() == "false" for p in asked)


def test_what_is_asked_for(api: Api, run: Run) -> None:
    on_log(api, "deep-exp-0", line(2, "two"))
    told = run("--role", "experts", "--since", "1h30m", "--timestamps", "--previous")
    assert told == ["deep-exp-0 | 2026-01-31T12:00:02.000000000Z two"]
    asked = api.requests[-1].params
    assert asked["sinceSeconds"] == "5400"
    assert asked["previous"].lower() == "true"
    assert "tailLines" not in asked
    run("--pod", "deep-exp-0", "--tail", "7", "-c", "wait")
    asked = api.requests[-1].params
    assert (asked["tailLines"], asked["container"]) == ("7", "wait")
    run("--role", "experts", "--tail", "-1")
    assert "tailLines" not in api.requests[-1].params


def test_a_role_is_a_group_or_the_head(api: Api, run: Run) -> None:
    on_log(api, "deep-head", line(1, "one"))
    assert run("--role", "head") == ["deep-head | one"]


def test_wrong_choices(api: Api, run: Run) -> None:
    said = run.refused("--role", "router")
    assert "has no pod of role router; it has roles attention, experts, head" in said
    assert "pods deep-att-0, deep-exp-0, deep-head" in run.refused("--pod", "p")
    assert "no container sidecar; it has ray, wait" in run.refused("-c", "sidecar")
    assert "a container that has ended" in run.refused("--follow", "--previous")
    assert "--tail -2" in run.refused("--tail", "-2")
    assert "--since soon" in run.refused("--since", "soon")
    api.store[PODS].clear()
    assert "it has roles none" in run.refused()


def test_a_pod_without_a_log_yet_is_a_remark(api: Api, run: Run) -> None:
    on_log(api, "deep-head", line(1, "one"))
    for name in ("deep-att-0", "deep-exp-0"):
        on_log(api, name, refuse(400, "container ray is waiting to start: ContainerCreating"))
    assert run() == ["deep-head | one"]
    assert run.err.count("waiting to start: ContainerCreating") == 2
    assert run.err.startswith("deep-att-0: get pods/log deep-att-0 in namespace whale")
    assert "waiting to start" in run.refused("--role", "experts")


def test_logs_that_are_forbidden(api: Api, run: Run) -> None:
    on_log(api, "deep-head", line(1, "one"))
    on_log(api, "deep-att-0", refuse(403))
    on_log(api, "deep-exp-0", line(1, "one"))
    assert "verb get on pods/log" in run.refused()
    assert "verb get on pods/log" in run.refused("--follow")


def test_a_lost_node_hides_no_other_log(api: Api, run: Run) -> None:
    on_log(api, "deep-head", line(1, "one"))
    on_log(api, "deep-att-0", refuse(500, "dial tcp 10.0.0.2:10250: no route to host"))
    on_log(api, "deep-exp-0", line(2, "two"))
    assert run() == ["deep-head | one", "deep-exp-0 | two"]
    assert "deep-att-0: get pods/log" in run.err
    assert "no route to host" in run.err


def test_a_log_that_stops_in_the_middle(api: Api, kube: Kube) -> None:
    kube.timeout_s = 0.2
    on_log(api, "deep-head", (line(1, "one"), lambda: asyncio.sleep(3)))
    lines = kube.log("deep-head", "ray")
    assert next(lines).endswith(" one")
    with pytest.raises(KubeError, match=r"within 0\.2 s") as raised:
        next(lines)
    assert raised.value.fault == "timeout"


class TestFollow:
    def tail(self, kube: Kube, choice: Choice, **options: Any) -> Tail:
        return Tail(kube, choice, SELECTOR, "7", pause_s=0.01, **{"idle_s": 0.3, **options})

    def pods(self, api: Api, *names: str) -> list[dict[str, Any]]:
        return [p for p in api.store[PODS] if p["metadata"]["name"] in names]

    def take(self, tail: Tail, pods: list[dict[str, Any]], count: int) -> list[str]:
        lines = tail.lines(pods)
        found = [f"{n.pod} {n.text}" for n in islice(lines, count)]
        lines.close()
        return found

    def test_a_stream_is_opened_anew_without_a_line_lost_or_twice(
        self, api: Api, kube: Kube
    ) -> None:
        whole = [line(1, "a"), line(1, "b"), line(1.5, "c"), line(1.4, "late"), line(2, "d")]
        parts = [whole[:2], whole[:4], whole[2:], whole]
        asked: list[dict[str, str]] = []

        def answer(request: Any) -> Any:
            asked.append(dict(request.params))
            return b"".join(parts[min(len(asked), len(parts)) - 1])

        on_log(api, "deep-exp-0", answer)
        tail = self.tail(kube, Choice(pod="deep-exp-0", tail=9))
        told = self.take(tail, self.pods(api, "deep-exp-0"), 5)
        assert told == [f"deep-exp-0 {t}" for t in ("a", "b", "c", "late", "d")]
        assert asked[0]["tailLines"] == "9"
        assert "sinceSeconds" not in asked[0]
        assert "tailLines" not in asked[1]
        assert asked[1]["sinceSeconds"] == "5"

    def test_a_lost_node_is_told_once(self, api: Api, kube: Kube) -> None:
        turns: list[int] = []

        def answer() -> Any:
            turns.append(0)
            return refuse(502, "no route") if len(turns) < 9 else line(1, "back")

        on_log(api, "deep-exp-0", answer)
        tail = self.tail(kube, Choice(pod="deep-exp-0"))
        remark, first = islice(tail.lines(self.pods(api, "deep-exp-0")), 2)
        assert "502 no route" in remark.text
        assert first.text == "back"

    def test_silence_is_no_failure(self, api: Api, kube: Kube) -> None:
        turns: list[int] = []

        def answer() -> Any:
            turns.append(0)
            if len(turns) == 1:
                return (line(1, "a"), lambda: asyncio.sleep(2))
            return (line(1, "a"), line(2, "b"))

        on_log(api, "deep-exp-0", answer)
        tail = self.tail(kube, Choice(pod="deep-exp-0"), idle_s=0.1)
        told = self.take(tail, self.pods(api, "deep-exp-0"), 2)
        assert told == ["deep-exp-0 a", "deep-exp-0 b"]

    def test_a_pod_that_replaces_another_is_followed(self, api: Api, kube: Kube) -> None:
        on_log(api, "deep-exp-0", line(1, "old"))
        on_log(api, "deep-exp-1", line(2, "new"))
        on_log(api, "deep-att-1", line(2, "other role"))
        api.events = [
            {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "8"}}},
            {"type": "ADDED", "object": pod("deep-att-1", "attention", "10.0.0.8")},
            {"type": "ADDED", "object": pod("deep-exp-1", "experts", "10.0.0.9")},
            {"type": "DELETED", "object": self.pods(api, "deep-exp-0")[0]},
        ]
        tail = self.tail(kube, Choice(group="experts"))
        told = self.take(tail, self.pods(api, "deep-exp-0"), 2)
        assert sorted(told) == ["deep-exp-0 old", "deep-exp-1 new"]
        watched = next(r.params for r in api.requests if "watch" in r.params)
        assert watched["labelSelector"] == SELECTOR
        assert watched["resourceVersion"] == "7"

    def test_a_pod_that_starts_later(self, api: Api, kube: Kube) -> None:
        turns: list[int] = []

        def answer() -> Any:
            turns.append(0)
            return refuse(400, "waiting to start") if len(turns) < 4 else line(1, "a")

        on_log(api, "deep-exp-0", answer)
        tail = self.tail(kube, Choice(pod="deep-exp-0"))
        remark, first = islice(tail.lines(self.pods(api, "deep-exp-0")), 2)
        assert (remark.stamp, first.text) == ("", "a")
        assert "waiting to start" in remark.text

    @pytest.mark.parametrize("end", ["deleted", "gone", "failed"])
    def test_a_named_pod_that_ends_ends_it(self, api: Api, kube: Kube, end: str) -> None:
        on_log(api, "deep-exp-0", line(1, "a"))
        (found,) = self.pods(api, "deep-exp-0")
        if end == "gone":
            turns: list[int] = []
            on_log(
                api,
                "deep-exp-0",
                lambda: turns.append(0) or (line(1, "a") if len(turns) == 1 else refuse(404)),
            )
        elif end == "deleted":
            api.events = [{"type": "DELETED", "object": found}]
        else:
            over = pod("deep-exp-0", "experts", "", status={"phase": "Failed"})
            api.events = [{"type": "MODIFIED", "object": over}]
        tail = self.tail(kube, Choice(pod="deep-exp-0"))
        assert [n.text for n in tail.lines([found])] == ["a"]

    def test_an_expired_watch_lists_anew(self, api: Api, kube: Kube) -> None:
        on_log(api, "deep-exp-0", line(1, "old"))
        on_log(api, "deep-exp-1", line(2, "new"))
        turns: list[str] = []
        old, new = self.pods(api, "deep-exp-0")[0], pod("deep-exp-1", "experts", "10.0.0.9")

        def answer(request: Any) -> Any:
            if "watch" not in request.params:
                return {"items": [old, new], "metadata": {"resourceVersion": "90"}}
            turns.append(request.params["resourceVersion"])
            return refuse(410, "too old") if len(turns) == 1 else (b"", lambda: asyncio.sleep(1))

        api.on(f"get {PODS}", answer)
        told = self.take(self.tail(kube, Choice(group="experts")), [old], 2)
        assert sorted(told) == ["deep-exp-0 old", "deep-exp-1 new"]
        assert turns[0] == "7"
        assert turns[1:] in ([], ["90"])

    def test_a_watch_that_always_expires_is_given_up(self, api: Api, kube: Kube) -> None:
        on_log(api, "deep-exp-0", line(1, "a"))
        page = {"items": [], "metadata": {"resourceVersion": "9"}}
        api.on(f"get {PODS}", lambda r: refuse(410, "too old") if "watch" in r.params else page)
        with pytest.raises(KubeError, match="410 too old") as raised:
            list(self.tail(kube, Choice(group="experts")).lines(self.pods(api, "deep-exp-0")))
        assert raised.value.fault == "gone"

    @pytest.mark.parametrize(
        ("status", "fault", "attempts"), [(403, "forbidden", 1), (500, "server", 6)]
    )
    def test_a_watch_that_fails(
        self, api: Api, kube: Kube, status: int, fault: str, attempts: int
    ) -> None:
        on_log(api, "deep-exp-0", line(1, "a"))
        api.on(f"get {PODS}", refuse(status))
        with pytest.raises(KubeError) as raised:
            list(self.tail(kube, Choice(group="experts")).lines(self.pods(api, "deep-exp-0")))
        assert raised.value.fault == fault
        assert len([r for r in api.requests if "watch" in r.params]) == attempts

    def test_a_malformed_event(self, api: Api, kube: Kube) -> None:
        on_log(api, "deep-exp-0", line(1, "a"))
        api.on(f"get {PODS}", (b"<html>\n",))
        with pytest.raises(KubeError) as raised:
            list(self.tail(kube, Choice(group="experts")).lines(self.pods(api, "deep-exp-0")))
        assert raised.value.fault == "malformed"


def test_cutting_lines() -> None:
    first = split("p", "2026-01-31T12:00:00.5Z a  b")
    assert (first.stamp, first.text) == ("2026-01-31T12:00:00.5Z", "a  b")
    assert first.moment[1] == 500_000_000
    east = split("p", "2026-01-31T14:00:00.500000001+02:00 c")
    assert east.moment == (first.moment[0], 500_000_001)
    assert split("p", "no time", first.moment) == Line("p", "-", "no time", first.moment)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800)]
)
def test_durations(text: str, value: int) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0s", "10", "m", "1h x", "-5m", "1.5h"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a duration"):
        seconds(text)
