"""Processes with a GPU each (or none), started and spoken to by one that measures."""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LIMIT_S = 300.0


class Child:
    """A process that reads and writes a JSON value a line."""

    def __init__(self, script: str, number: int, cuda: bool, *arguments: str) -> None:
        root = Path(__file__).parent.parent
        path = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if cuda:
            env["CUDA_VISIBLE_DEVICES"] = str(number)
        self.process = subprocess.Popen(
            [sys.executable, script, "--child", str(number), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def tell(self, **value: Any) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def hear(self, kind: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The next line of this kind; others before it are dropped. Raises TimeoutError."""
        end = time.monotonic() + limit_s
        while True:
            try:
                value = self.said.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                raise TimeoutError(f"no {kind!r} within {limit_s} s") from None
            if value["kind"] == "failed":
                raise RuntimeError(value["why"])
            if value["kind"] == kind:
                return value

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            if line.startswith("{"):
                self.said.put(json.loads(line))
        self.said.put({"kind": "failed", "why": "the process has ended"})


@contextmanager
def children(
    script: str, count: int, cuda: bool, *arguments: str, spare: bool = False
) -> Iterator[list[Child]]:
    """Start so many, one more on the last one's GPU if there is a `spare`, and end them."""
    numbers = [*range(count), *([count - 1] if spare else [])]
    made = [Child(script, i, cuda, *arguments) for i in numbers]
    try:
        yield made
    finally:
        for child in made:
            child.end()


def serve(obey: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Be a child: answer every line until there is no more, and say where one is stuck (SIGUSR1)."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for line in sys.stdin:
        try:
            answer = obey(json.loads(line))
        except Exception as error:
            answer = {"kind": "failed", "why": repr(error)}
        if answer is not None:
            say(**answer)


def say(**value: Any) -> None:
    """Be a child: tell something unasked."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
