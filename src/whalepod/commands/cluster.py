"""Commands that speak to a cluster: up, status, scale, down."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from whalepod.actors import localcluster
from whalepod.actors.dashboard import DEFAULT_URL, Dashboard, serve_config, token
from whalepod.config import Config, read_yaml
from whalepod.errors import ConfigError, WhalepodError
from whalepod.model.checkpoint import Checkpoint

Parsers = Any


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default="local",
        help="local: a cluster of this machine that `up` starts (default); auto: the one whose "
        "dashboard is at RAY_API_SERVER_ADDRESS or 127.0.0.1:8265; or a dashboard's http://host:port",
    )


def read_config(path: str | None, model: str | None, overrides: list[str]) -> Config:
    """The configuration file with `--model` and `--set key=value` on top. Raises ConfigError."""
    data = read_yaml(Path(path)) if path else {}
    if model:
        data["model"] = {**(data.get("model") or {}), "path": str(Path(model).resolve())}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected key=value, as in topology.experts=3")
        node, *rest = key.split(".")
        place = data
        for part in rest:
            place = place.setdefault(node, {})
            node = part
        place[node] = _scalar(value)
    if isinstance(data.get("model"), dict) and isinstance(data["model"].get("path"), str):
        # Members run in folders of their own, so a relative path must be settled here.
        data["model"]["path"] = str(Path(data["model"]["path"]).resolve())
    if not data.get("model"):
        raise ConfigError("no model is named; give a configuration file or --model DIR")
    return Config.from_dict(data, path or "command line")


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _dashboard(address: str) -> Dashboard:
    if address == "local":
        cluster = localcluster.running()
        if cluster is None:
            raise localcluster.LocalClusterError(
                "no local cluster runs; start one with `whalepod up`, or name one with --address"
            )
        return Dashboard(cluster.dashboard, localcluster.use_token(cluster))
    if address == "auto":
        address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_URL)
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {address}: expected local, auto or a dashboard's http://host:port"
        )
    return Dashboard(address, token())


def add_up(commands: Parsers) -> None:
    """`whalepod up`."""
    parser = commands.add_parser("up", help="serve a checkpoint on a cluster")
    parser.add_argument("config", nargs="?", help="configuration file (YAML)")
    parser.add_argument("--model", help="checkpoint folder; overrides model.path")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--timeout", type=float, default=180, help="seconds to wait until ready")
    _address(parser)
    parser.set_defaults(run=up)


def up(options: argparse.Namespace) -> None:
    """Start a local cluster if asked to, deploy, wait until requests are served."""
    config = read_config(options.config, options.model, options.overrides)
    checkpoint = Checkpoint.open(config.model.path)
    for name in checkpoint.unexpected[:5]:
        print(f"warning: {name} is no tensor of this model; ignored", file=sys.stderr)
    server = config.server
    http, grpc = (f"{server.host}:{p}" for p in (server.http_port, server.grpc_port))
    started = None
    if options.address == "local":
        started = localcluster.start(f"http://{http}", grpc)
    try:
        dashboard = _dashboard(options.address)
        dashboard.deploy(config)
        _await_ready(dashboard, f"http://{http}", options.timeout)
    except BaseException:
        if started is not None:
            localcluster.stop(started)
        raise
    print(f"serving {config.model.served_name}")
    print(f"  HTTP   http://{http}/v1   (OpenAI clients: base_url)")
    print(f"  gRPC   {grpc}   (whalepod.v1.Inference)")
    print(f"  Ray    {dashboard.url}")
    print("  whalepod status | whalepod scale experts=3 | whalepod down")


def _await_ready(dashboard: Dashboard, http: str, limit_s: float) -> None:
    end, said = time.monotonic() + limit_s, "the application"
    while time.monotonic() < end:
        application = dashboard.application() or {}
        state = application.get("status")
        if state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise WhalepodError(f"Serve cannot start the application: {_why(application)}")
        try:
            reply = httpx.get(f"{http}/ready", timeout=5, trust_env=False)
            if reply.status_code == 200:
                return
            said = reply.json().get("reason", said) if reply.status_code == 503 else said
        except (httpx.HTTPError, json.JSONDecodeError):
            said = f"Serve ({state})"
        time.sleep(0.2)
    raise WhalepodError(f"not ready after {limit_s:.0f} s: {said}")


def _why(application: dict[str, Any]) -> str:
    told = [application.get("message", "")]
    told += [d.get("message", "") for d in application.get("deployments", {}).values()]
    lines = [line for text in told for line in str(text).strip().splitlines()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason given"])[-1]


def add_status(commands: Parsers) -> None:
    """`whalepod status`."""
    parser = commands.add_parser("status", help="show epochs and members")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--url", help="HTTP address of the ingress, http://host:port")
    _address(parser)
    parser.set_defaults(run=status)


def status(options: argparse.Namespace) -> None:
    """Print the controller's report."""
    url = options.url
    if url is None and options.address == "local" and (found := localcluster.running()):
        url = found.http
    url = url or "http://127.0.0.1:8000"
    try:
        reply = httpx.get(f"{url}/status", timeout=10, trust_env=False)
        report = reply.raise_for_status().json()
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise WhalepodError(
            f"{url}/status does not answer ({error or type(error).__name__}); is whalepod up? "
            "--url names another ingress"
        ) from None
    if options.json:
        print(json.dumps(report, indent=1))
        return
    state = "serving" if report["ready"] else f"waiting for {report['waiting_for']}"
    print(f"epoch {report['epoch']}: {state}; fabric {report['fabric']}")
    print(f"{'rank':>4}  {'pool':9}  {'state':8}  {'experts':>7}  {'roles':22}  member")
    for member in report["members"]:
        rank = "-" if member["rank"] is None else member["rank"]
        roles = "+".join(member["roles"]) or "-"
        print(
            f"{rank:>4}  {member['pool']:9}  {member['state']:8}  {member['experts']:>7}  "
            f"{roles:22}  {member['name']}"
        )
    for event in report["history"][-5:]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        print(f"{clock}  epoch {event['epoch']} {event['event']}: {event['detail']}")


def add_scale(commands: Parsers) -> None:
    """`whalepod scale`."""
    parser = commands.add_parser("scale", help="change the size of pools while serving")
    parser.add_argument("pools", nargs="+", metavar="POOL=N", help="attention=2 experts=3 ...")
    _address(parser)
    parser.set_defaults(run=scale)


def scale(options: argparse.Namespace) -> None:
    """Set pool sizes through Ray's REST API."""
    wanted = {}
    for item in options.pools:
        pool, _, count = item.partition("=")
        if pool not in ("attention", "experts", "router", "ingress") or not count.isdigit():
            raise ConfigError(
                f"{item}: expected attention=N, experts=N, router=N or ingress=N with a whole N"
            )
        wanted[pool] = int(count)
    dashboard = _dashboard(options.address)
    for pool, count in wanted.items():
        dashboard.scale(pool, count)
        print(f"{pool}: {count} asked for; `whalepod status` shows when they serve")


def add_down(commands: Parsers) -> None:
    """`whalepod down`."""
    parser = commands.add_parser("down", help="stop serving (and the local cluster)")
    _address(parser)
    parser.set_defaults(run=down)


def down(options: argparse.Namespace) -> None:
    """Remove the application; end the local cluster if it is ours."""
    if options.address == "local":
        cluster = localcluster.running()
        if cluster is None:
            print("no local cluster runs")
            return
        localcluster.stop(cluster)
    else:
        _dashboard(options.address).remove()
    print("stopped")


def add_serve_config(commands: Parsers) -> None:
    """`whalepod serve-config`."""
    parser = commands.add_parser(
        "serve-config", help="print the Serve configuration (a RayService's serveConfigV2)"
    )
    parser.add_argument("config", nargs="?", help="configuration file (YAML)")
    parser.add_argument("--model", help="checkpoint folder; overrides model.path")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.set_defaults(run=print_serve_config)


def print_serve_config(options: argparse.Namespace) -> None:
    """Print what `up` would deploy, as YAML."""
    config = read_config(options.config, options.model, options.overrides)
    print(yaml.safe_dump(serve_config(config), sort_keys=False), end="")


COMMANDS = (add_up, add_status, add_scale, add_down, add_serve_config)
