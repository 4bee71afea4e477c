"""The HTTP listener: its address, its port shared by replicas, its end."""

import asyncio
import socket
from typing import Any

import httpx
import pytest

from whalepod.errors import ConfigError
from whalepod.ingress.listener import HttpListener


async def hello(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def test_two_listeners_share_a_port_and_each_ends_alone() -> None:
    async def ask(port: int) -> str:
        async with httpx.AsyncClient(verify=False) as client:
            return (await client.get(f"http://127.0.0.1:{port}")).text

    async def run() -> None:
        first = HttpListener(hello, "127.0.0.1", 0)
        second = HttpListener(hello, "127.0.0.1", first.port)
        for listener in (first, second):
            await listener.start()
        assert [await ask(first.port) for _ in range(8)] == ["hello"] * 8
        await first.stop(1)
        assert [await ask(second.port) for _ in range(8)] == ["hello"] * 8
        await second.stop(1)
        with pytest.raises(httpx.ConnectError):
            await ask(second.port)

    asyncio.run(run())


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"listen on 127\.0\.0\.1:{port} .*set server\.http"):
            HttpListener(hello, "127.0.0.1", port)
