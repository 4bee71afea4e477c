"""Commands that ask a Kubernetes cluster: k8s preflight, status, logs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from whalepod.cluster import kube_demand, kube_objects
from whalepod.commands import k8s_show as show
from whalepod.commands.cluster import read_config
from whalepod.errors import ConfigError

if TYPE_CHECKING:
    from whalepod.cluster.kube import Kube
    from whalepod.cluster.kube_status import Release

Parsers = Any
_TAIL = 200
# The chart's service of the ingress whether ready or not; else KubeRay's own of what is ready.
_SERVICES, _PORT = ("status", "serve-svc"), "serve"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_k8s(commands: Parsers) -> None:
    """`whalepod k8s`."""
    parser = commands.add_parser("k8s", help="look at a Kubernetes cluster")
    parts = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_preflight(parts)
    _add_status(parts)
    _add_logs(parts)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--namespace", help="default: the context's, else `default`")
    parser.add_argument("--context", help="of the kubeconfig; default: its current one")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, else ~/.kube/config")
    parser.add_argument(
        "--timeout", type=float, default=15.0, help="longest time one call of the API may take, s"
    )


def _add_preflight(parts: Parsers) -> None:
    parser = parts.add_parser("preflight", help="whether the cluster can run whalepod")
    parser.add_argument("config", nargs="?", help="configuration file (YAML) to compare with")
    parser.add_argument(
        "--manifests", metavar="FILE", help="output of `helm template` to compare with; - is stdin"
    )
    parser.add_argument("--operator-namespace", help="where KubeRay runs; default: look everywhere")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    _add_cluster(parser)
    parser.set_defaults(run=preflight)


def _add_status(parts: Parsers) -> None:
    parser = parts.add_parser("status", help="show a release's pods, epoch and roles")
    parser.add_argument("release", nargs="?", default="whalepod")
    parser.add_argument(
        "--address", help="HTTP address of the ingress, as from a port-forward: http://host:port"
    )
    parser.add_argument(
        "--service",
        metavar="NAME[:PORT]",
        help="service of the ingress, asked through the API server; default: the chart's",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    _add_cluster(parser)
    parser.set_defaults(run=status)


def _add_logs(parts: Parsers) -> None:
    parser = parts.add_parser("logs", help="print a release's logs, by role or pod")
    parser.add_argument("release", nargs="?", default="whalepod")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--role", help="head, ingress, attention, experts or router; default: all")
    which.add_argument("--pod", help="one pod by name")
    parser.add_argument("-c", "--container", help="default: the one Ray runs in")
    parser.add_argument("-f", "--follow", action="store_true", help="go on; pods that come, too")
    parser.add_argument("--previous", action="store_true", help="of the container before a restart")
    parser.add_argument("--since", metavar="DURATION", help="as 90s, 10m, 1h30m or 2d")
    parser.add_argument(
        "--tail", type=int, help=f"last lines of each pod, -1 for all; default {_TAIL}, or --since"
    )
    parser.add_argument("--timestamps", action="store_true", help="print when each line was logged")
    _add_cluster(parser)
    parser.set_defaults(run=logs)


def _open(options: argparse.Namespace) -> Kube:
    from whalepod.cluster.kube import Kube  # noqa: PLC0415  (a large client; others start faster)

    if not options.timeout > 0:
        raise ConfigError(f"--timeout {options.timeout:g}: expected seconds above 0")
    return Kube.open(options.kubeconfig, options.context, options.namespace, options.timeout)


def preflight(options: argparse.Namespace) -> None:
    """Print what was found; exit with status 1 when a deployment cannot work."""
    demand = _demand(options)
    with _open(options) as kube:
        from whalepod.cluster.kube_preflight import preflight as look  # noqa: PLC0415

        found = look(kube, demand, options.operator_namespace)
    print(json.dumps(found.as_dict(), indent=1) if options.json else show.preflight(found))
    if not found.good:
        sys.exit(1)


def _demand(options: argparse.Namespace) -> kube_demand.Demand | None:
    if options.config and options.manifests:
        raise ConfigError("a configuration and --manifests were given; give one of them")
    if options.config:
        return kube_demand.of_config(read_config(options.config, None, []), options.config)
    if options.manifests is None:
        return None
    if options.manifests == "-":
        return kube_demand.of_manifests(sys.stdin.read(), "standard input")
    try:
        text = Path(options.manifests).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--manifests {options.manifests}: {error}") from None
    return kube_demand.of_manifests(text, options.manifests)


def status(options: argparse.Namespace) -> None:
    """Print the release's Ray objects, its pods, and the epoch's members in them."""
    from whalepod.cluster import kube_status  # noqa: PLC0415

    report, trouble = None, None
    with _open(options) as kube:
        release = kube_status.find_release(kube, options.release)
        pods, _, _ = kube_status.find_pods(kube, release)
        try:
            report = _report(options, kube, release)
        except kube_objects.KubeError as error:
            trouble = str(error)
    states, lost = kube_status.join(pods, report)
    ray = [kube_status.ray_state(o) for o in (*release.services, *release.clusters)]
    if options.json:
        told = {
            "release": release.name,
            "namespace": kube.namespace,
            "ray": ray,
            "report": report,
            "report_error": trouble,
            "pods": [s.as_dict() for s in states],
            "members_without_pod": lost,
        }
        print(json.dumps(told, indent=1))
        return
    print(show.ray(ray))
    print(show.epoch(report, trouble))
    print(show.pods(states, lost))


def _report(options: argparse.Namespace, kube: Kube, release: Release) -> dict[str, Any]:
    from whalepod.cluster.kube_status import checked_report  # noqa: PLC0415

    if options.address:
        url = f"{options.address.rstrip('/')}/status"
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--address {options.address}: expected http://host:port")
        try:
            reply = httpx.get(url, timeout=options.timeout, trust_env=False)
            return checked_report(reply.raise_for_status().json(), url)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise kube_objects.KubeError(
                "unreachable",
                f"{url} does not answer with a report ({error or type(error).__name__})",
                "is the port-forward up? (kubectl port-forward service/NAME 8000)",
            ) from None
    if options.service:
        name, _, port = options.service.partition(":")
        return checked_report(kube.service(name, port or _PORT, "status"), f"service {name}")
    first, second = (f"{release.serve_name}-{ending}" for ending in _SERVICES)
    try:
        return checked_report(kube.service(first, _PORT, "status"), f"service {first}")
    except kube_objects.KubeError as error:
        if error.fault != "not found":
            raise
    return checked_report(kube.service(second, _PORT, "status"), f"service {second}")


def logs(options: argparse.Namespace) -> None:
    """Print logs, each line after its pod's name; remarks go to standard error."""
    if options.follow and options.previous:
        raise ConfigError("--follow and --previous: a container that has ended logs nothing new")
    since = seconds(options.since) if options.since else None
    tail = (None if since else _TAIL) if options.tail is None else options.tail
    if tail is not None and tail < -1:
        raise ConfigError(f"--tail {tail}: expected a number of lines, or -1 for all")
    from whalepod.cluster import kube_logs, kube_status  # noqa: PLC0415

    choice = kube_logs.Choice(
        options.role,
        options.pod,
        options.container,
        since,
        None if tail == -1 else tail,
        options.previous,
    )
    with _open(options) as kube:
        release = kube_status.find_release(kube, options.release)
        pods, version, selector = kube_status.find_pods(kube, release)
        chosen = choice.of(pods)
        if options.follow:
            lines = kube_logs.Tail(kube, choice, selector, version).lines(chosen)
        else:
            lines = kube_logs.read(kube, chosen, choice)
        for line in lines:
            if not line.stamp:
                print(f"{line.pod}: {line.text}", file=sys.stderr)
                continue
            stamp = f"{line.stamp} " if options.timestamps else ""
            print(f"{line.pod} | {stamp}{line.text}", flush=options.follow)


def seconds(text: str) -> int:
    """A duration such as `1h30m` in seconds. Raises ConfigError."""
    parts = re.findall(r"(\d+)([smhd])", text)
    if not parts or "".join(n + u for n, u in parts) != text or not any(int(n) for n, _ in parts):
        raise ConfigError(f"--since {text}: expected a duration such as 90s, 10m, 1h30m or 2d")
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


COMMANDS = (add_k8s,)
