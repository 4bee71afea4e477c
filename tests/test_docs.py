"""The examples that users copy: each Python block of the pages runs against the servers."""

from __future__ import annotations

import asyncio
import gc
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from edge import TOKENIZER, edge
from engines import Scripted

ROOT = Path(__file__).parent.parent
TEXT = "Whales live in the sea."
BLOCKS = [
    pytest.param(block, id=f"{page}:{i}")
    for page in ("README.md", "docs/api.md")
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S))
]


# The examples are short and leave their connections to the interpreter.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block: str) -> None:
    async def run() -> str:
        async with edge(Scripted(TOKENIZER.encode_text(TEXT))) as servers:
            code = block.replace("http://127.0.0.1:8000", servers.http)
            code = code.replace("127.0.0.1:9000", servers.grpc)
            assert code != block
            code = code.replace('model="demo"', 'model="tiny"')
            with redirect_stdout(io.StringIO()) as said:
                await asyncio.to_thread(exec, compile(code, "example", "exec"), {})
            gc.collect()  # while its warnings are still ignored
            return said.getvalue()

    assert TEXT in asyncio.run(run())


def test_both_pages_have_examples() -> None:
    assert len(BLOCKS) >= 4
