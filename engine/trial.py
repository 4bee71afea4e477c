"""Try what clients send as grammars, in processes that may die of it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from whalepod.engine import grammar_rules
from whalepod.engine.request import Grammar
from whalepod.errors import RequestError

_REMEMBERED = 1024


class Trial:
    """Says of grammars whether they can be used. Processes start with the first one.

    Args:
        data: text of `tokenizer.json`.
        limit_s: longest that compiling and walking one may take.
        processes: how many are tried at once.
    """

    def __init__(
        self, data: str, vocab_size: int, eos: int, *, limit_s: float = 4.0, processes: int = 2
    ) -> None:
        self._opening = json.dumps([data, vocab_size, eos]) + "\n"
        self.limit_s = limit_s
        self._pool = ThreadPoolExecutor(processes, "trial")
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._idle)
        self._known: OrderedDict[tuple[str, str], Future[None]] = OrderedDict()

    def check(self, grammar: Grammar) -> Future[None]:
        """Try a grammar, once; the result raises RequestError with what is wrong."""
        key = grammar.kind, grammar.text
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._pool.submit(self._try, *key)
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
        return found

    def _try(self, kind: str, text: str) -> None:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        answer = self._ask(process, json.dumps([kind, text]) + "\n")
        if answer:
            self._idle.put(process)
            problem = json.loads(answer)
        else:
            _end(process)
            problem = (
                f"compiling the {grammar_rules.NAMES[kind]} took more than {self.limit_s:g} s or "
                "too much memory; simplify it"
            )
        if problem is not None:
            raise RequestError(problem, "structured_outputs")

    def _start(self) -> subprocess.Popen[str]:
        # -P: the folder of the file is not searched for modules.
        process = subprocess.Popen(
            [sys.executable, "-P", grammar_rules.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None
        process.stdin.write(self._opening)
        return process

    def _ask(self, process: subprocess.Popen[str], line: str) -> str:
        """Send a line and return the answer, nothing when the process has died or had to."""
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(self.limit_s, process.kill)
        watch.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return ""
        finally:
            watch.cancel()


def _end_all(idle: queue.SimpleQueue[subprocess.Popen[str]]) -> None:
    while not idle.empty():
        _end(idle.get())


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            pass
