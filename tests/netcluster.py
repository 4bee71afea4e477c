"""A RayService running in `netpods`: what the operator and kubelet would do, in order."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import kuberay
import yaml
from netfiles import Image, Volumes
from netpods import CLIENT, NODE, OPERATOR, Network, Sandbox, client
from netpolicy import Peer, ruleset

from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

HTTP, GRPC = 8000, 9000


class Cluster:
    """The pods of a RayService.

    Args:
        objects: what was rendered: one RayService, and the ConfigMaps and Services that it uses.
        model: a checkpoint folder; where pods look for it.
    """

    def __init__(self, objects: list[dict[str, Any]], model: tuple[Path, str]) -> None:
        (self.document,) = (d for d in objects if d["kind"] == "RayService")
        self._policies = [d for d in objects if d["kind"] == "NetworkPolicy"]
        self._services = [d for d in objects if d["kind"] == "Service"]
        self.image = Image.from_environment()
        self.token = secrets.token_hex(32)
        auth = self.document["spec"]["rayClusterConfig"]["authOptions"]
        maps = {d["metadata"]["name"]: d["data"] for d in objects if d["kind"] == "ConfigMap"}
        self.volumes = Volumes(
            secrets={auth["secretName"]: {"auth_token": self.token}},
            config_maps=maps,
            files={model[1]: model[0]},
        )
        self.network = Network()
        self.pods: list[Sandbox] = []
        self.times: dict[str, float] = {}

    def start(self) -> None:
        """Start every pod, deploy, and wait until the application serves."""
        begun = time.monotonic()
        head, *workers = [self._add(pod) for pod in kuberay.pods(self.document)]
        self._name_services(head)
        self._enforce()
        head.start()
        with ThreadPoolExecutor(2) as two:  # more at once only time out on few cores
            list(two.map(self._bring_up, workers))
        self.until(lambda: len(self.nodes()) == len(self.pods), "all nodes to join")
        self.times["nodes"] = time.monotonic() - begun
        self.deploy()
        self.until(self.served, "requests to be served")
        self.times["served"] = time.monotonic() - begun

    def replace(self, gone: Sandbox) -> Sandbox:
        """Start a pod in the place of one that is gone, with an address of its own."""
        self.pods.remove(gone)
        sandbox = self._add(dataclasses.replace(gone.pod, name=f"{gone.pod.name}n"))
        self._enforce()
        self._bring_up(sandbox)
        return sandbox

    def close(self) -> None:
        """End everything."""
        for sandbox in self.pods:
            sandbox.kill()
        self.network.close()

    def _add(self, pod: kuberay.Pod) -> Sandbox:
        sandbox = Sandbox(self.network, self.image, self.volumes, pod)
        self.pods.append(sandbox)
        return sandbox

    def _name_services(self, head: Sandbox) -> None:
        """Give services the address of the first pod behind them, under the names of cluster DNS."""
        whole = kuberay.head_host(head.pod.labels["ray.io/cluster"], head.pod.namespace)
        found = {whole.split(".")[0]: head}
        for service in self._services:
            wanted = service["spec"].get("selector", {}).items()
            behind = [p for p in self.pods if wanted <= p.pod.labels.items()]
            if wanted and behind:
                found[service["metadata"]["name"]] = behind[0]
        domain = whole.split(".", 1)[1]
        for name, pod in found.items():
            self.network.names |= {name: pod.address, f"{name}.{domain}": pod.address}

    def _enforce(self) -> None:
        """Make the NetworkPolicies true for every pod that runs."""
        operator = {"app.kubernetes.io/name": "kuberay-operator"}
        around = [Peer(CLIENT, {}, {}), Peer(OPERATOR, operator, {}, "kuberay")]
        peers = {p.pod.name: p.peer for p in self.pods}
        for pod in self.pods:
            others = [*around, *(peer for name, peer in peers.items() if name != pod.pod.name)]
            pod.obey(ruleset(self._policies, pod.peer, others, NODE))

    def _bring_up(self, sandbox: Sandbox) -> None:
        sandbox.init()
        sandbox.start()

    def group(self, name: str) -> list[Sandbox]:
        """The pods of a group; `headgroup` is the head's."""
        return [p for p in self.pods if p.pod.group == name]

    def rest(self, method: str, path: str, body: Any = None) -> Any:
        """Call the dashboard as the operator does. Raises httpx.HTTPError."""
        url = f"http://{self.group('headgroup')[0].address}:{kuberay.DASHBOARD}{path}"
        headers = {"Authorization": f"Bearer {self.token}"}
        with client(OPERATOR) as operator:
            reply = operator.request(method, url, json=body, headers=headers).raise_for_status()
        return reply.json() if reply.content else None

    def deploy(self) -> None:
        """Put the Serve configuration, as the operator does."""
        body = yaml.safe_load(self.document["spec"]["serveConfigV2"])
        self.rest("PUT", "/api/serve/applications/", body)

    def nodes(self) -> list[dict[str, Any]]:
        """Ray's living nodes."""
        try:
            found = self.rest("GET", "/nodes?view=summary")["data"]["summary"]
        except httpx.HTTPError:
            return []
        return [n for n in found if n["raylet"].get("state") == "ALIVE"]

    def served(self) -> bool:
        """Whether the ingress says that requests are served."""
        application = self.application()
        assert application.get("status") != "DEPLOY_FAILED", application
        return self.status().get("ready", False)

    def application(self) -> dict[str, Any]:
        """Serve's view."""
        found = self.rest("GET", "/api/serve/applications/")["applications"]
        application: dict[str, Any] = found.get("whalepod", {})
        return application

    def status(self) -> dict[str, Any]:
        """The controller's report; empty when the ingress does not answer."""
        try:
            with client(limit_s=5) as asker:
                reply = asker.get(f"{self.http}/status")
            report: dict[str, Any] = reply.raise_for_status().json()
        except httpx.HTTPError:
            return {}
        return report

    @property
    def http(self) -> str:
        """Where clients send HTTP."""
        return f"http://{self.group('ingress')[0].address}:{HTTP}"

    def ask_http(self, prompt: str, tokens: int) -> str:
        """Complete over HTTP, greedily."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        with client(limit_s=60) as asker:
            reply = asker.post(f"{self.http}/v1/completions", json=body)
        return str(reply.raise_for_status().json()["choices"][0]["text"])

    def ask_grpc(self, prompt: str, tokens: int) -> str:
        """Complete over gRPC, greedily."""
        sampling = pb.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        with grpc.insecure_channel(f"{self.group('ingress')[0].address}:{GRPC}") as channel:
            stub = pb_grpc.InferenceStub(channel)
            request = pb.CompleteRequest(text=prompt, sampling=sampling)
            return str(stub.Complete(request, timeout=60).text)

    def until(self, what: Callable[[], bool], wanted: str, limit_s: float = 90) -> float:
        """Wait; returns how long. A time-out shows the cluster's state and logs."""
        begun = time.monotonic()
        while not what():
            if time.monotonic() > begun + limit_s:
                logs = "\n".join(f"== {p.pod.name}\n{p.log(15)}" for p in self.pods)
                raise AssertionError(f"waited {limit_s} s for {wanted}\n{self.status()}\n{logs}")
            time.sleep(0.2)
        return time.monotonic() - begun
