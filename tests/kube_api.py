"""A Kubernetes API server for tests: kmock on a loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kmock
from aiohttp.test_utils import RawTestServer

NAMESPACE = "whale"


class _Server(RawTestServer):
    """Does not wait long for clients that ask on while it stops, as a follower of logs does."""

    async def _make_runner(self, **options: Any) -> Any:
        return await super()._make_runner(shutdown_timeout=0.2, **options)


class Api:
    """Objects by the path that lists them; anything else by `on`.

    Lists honour label selectors, `limit` and `continue`. One reaction of kmock takes every request
    and looks the answer up here: with one for each path, each request would be held against all
    requests before it, once a path.
    """

    def __init__(self) -> None:
        self.store: dict[str, list[dict[str, Any]]] = {}
        self.denied: set[tuple[str, str]] = set()  # (verb, resource) that access reviews refuse
        self.events: list[dict[str, Any]] = []  # what a watch on any list tells, then it ends
        self.url = ""
        self._answers: dict[str, Any] = {}
        self._handler = kmock.KubernetesScaffold()
        self._handler << self._answer
        self.on("post /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self._review)

    def add(self, path: str, *objects: dict[str, Any]) -> None:
        """Serve a list; more objects may be added later."""
        self.store.setdefault(path, []).extend(objects)

    def on(self, what: str, answer: Any) -> None:
        """Answer `get /path` with a payload: bytes, object, stream, function or `refuse`."""
        self._answers[what] = answer

    def _answer(self, request: kmock.Request) -> Any:
        path = request.url.path
        answer = self._answers.get(f"{request.method.lower()} {path}")
        if answer is not None:
            return answer
        if request.method == "GET" and path in self.store:
            return self._list(request, path)
        return refuse(404, f"nothing is at {path}")

    def _list(self, request: kmock.Request, path: str) -> Any:
        if "watch" in request.params:
            return (b"", *self.events)
        chosen = [o for o in self.store[path] if matches(o, request.params)]
        start = int(request.params.get("continue", 0))
        end = start + int(request.params.get("limit", 10**6))
        more = {"continue": str(end)} if end < len(chosen) else {}
        metadata = {"resourceVersion": "7", **more}
        return {"kind": "List", "metadata": metadata, "items": chosen[start:end]}

    def _review(self, request: kmock.Request) -> Any:
        spec = request.data["spec"]
        asked = spec.get("resourceAttributes") or spec["nonResourceAttributes"]
        resource = asked.get("resource", asked.get("path"))
        if asked.get("subresource"):
            resource += f"/{asked['subresource']}"
        return {"status": {"allowed": (asked["verb"], resource) not in self.denied}}

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Listen until the block ends."""
        ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

        async def run() -> None:
            async with self._handler, kmock.Server(self._handler, server_cls=_Server) as server:
                self.url = str(server.url).rstrip("/")
                ready.set()
                await stop.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            loop.close()

    @property
    def requests(self) -> list[kmock.Request]:
        """Everything that was asked for."""
        return list(self._handler)

    def kubeconfig(self, folder: Path) -> str:
        """A kubeconfig for this server."""
        path = folder / "kubeconfig"
        path.write_text(json.dumps(kubeconfig(self.url)))
        return str(path)


def refuse(status: int, message: str = "no") -> kmock.KubernetesError:
    """A `Status` answer, for `Api.on` or for a function of it to raise."""
    return kmock.KubernetesError(status=status, reason="Refused", message=message)


def kubeconfig(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}},
            {"name": "there", "context": {"cluster": "c", "user": "u"}},
        ],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }


def matches(found: dict[str, Any], params: Any) -> bool:
    """Whether an object has the labels that a request selects (`a=b`, `a in (b, c)`)."""
    labels = found.get("metadata", {}).get("labels", {})
    selector = params.get("labelSelector", "")
    if " in (" in selector:
        key, _, values = selector.partition(" in (")
        return labels.get(key) in [v.strip() for v in values.rstrip(")").split(",")]
    pairs = [part.split("=", 1) for part in selector.split(",") if part]
    return all(labels.get(key) == value for key, value in pairs)
