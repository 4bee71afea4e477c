"""Write trained parameters as a checkpoint in exactly the released layout.

python -m demo.export --weights .cache/demo/run/weights --folder .cache/demo --out models/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from demo.model import demo_config
from demo.net.parameters import specs_of, unstack
from demo.weights import load_parts
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny import stored_tensors, write_checkpoint

# Two shards of much the same size, far below the 16 MB that a file may have.
SHARD_BYTES = 10_000_000


def main() -> None:
    """Round and write; the number formats are those of the release, matrix by matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path(".cache/demo/run/weights"))
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/demo"), help="of tokenizer.json"
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    args = parser.parse_args()
    config = ModelConfig.from_dict(demo_config())
    values = unstack(load_parts(args.weights), config)
    tensors: dict[str, Tensor] = {}
    for spec in specs_of(config):
        tensors.update(stored_tensors(spec, values[spec.name]))
    tokenizer = (args.folder / "tokenizer.json").read_text(encoding="utf-8")
    for path in write_checkpoint(args.out, demo_config(), tensors, tokenizer, SHARD_BYTES):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
