"""The `whalepod` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from whalepod import __version__
from whalepod.commands import cluster, k8s, local
from whalepod.errors import WhalepodError


def parser() -> argparse.ArgumentParser:
    """The command line; each subcommand knows its function as `run`."""
    root = argparse.ArgumentParser(prog="whalepod", description="Serve DeepSeek-V4 on Ray.")
    root.add_argument("--version", action="version", version=f"whalepod {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for add in (*cluster.COMMANDS, *local.COMMANDS, *k8s.COMMANDS):
        add(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of ours end it with one readable message and status 1."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except WhalepodError as error:
        print(f"whalepod: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
