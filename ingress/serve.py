"""The Ray Serve application: ingress, attention, experts and router as deployments.

`build` is the import path of the application (`whalepod.ingress.serve:build`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from whalepod.actors.affinity import PrefixRouter
from whalepod.actors.client import RayClient
from whalepod.actors.pools import AttentionReplica, ExpertsReplica, RouterReplica
from whalepod.actors.ports import bind_to_own_address
from whalepod.config import Config, Place
from whalepod.engine.member import context_limit
from whalepod.ingress.grpc import GrpcServer
from whalepod.ingress.http import make_app
from whalepod.ingress.listener import HttpListener
from whalepod.ingress.service import Service
from whalepod.metrics import Metrics
from whalepod.model.shape import ModelConfig
from whalepod.model.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Where blocks of prompts went, remembered by each ingress replica: 16M tokens, about 20 MB.
_REMEMBERED, _BLOCK_TOKENS = 1 << 17, 128


@serve.ingress()
class Ingress:
    """HTTP and gRPC over one `Service`, on listeners of the replica or (HTTP) behind Serve's proxy."""

    def __init__(self, config: dict[str, Any], attention: DeploymentHandle, *pools: Any) -> None:
        del pools  # named only so that they belong to the application
        bind_to_own_address()
        self._config = Config.from_dict(config)
        model = ModelConfig.from_file(Path(self._config.model.path) / "config.json")
        self._client = RayClient(attention, self._config)
        self._service = Service(
            self._client,
            Tokenizer.open(self._config.model.path),
            self._config.model.served_name,
            model,
            context_limit(self._config, model),
            Metrics(self._config.model.served_name),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed, in its event loop."""
        server = self._config.server
        return make_app(
            self._service,
            max_body_bytes=server.max_body_bytes,
            default_thinking=server.default_thinking,
            status=self._client.status,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        server = self._config.server
        listeners: list[GrpcServer | HttpListener] = [
            GrpcServer(
                self._service,
                server.host,
                server.grpc_port,
                max_bytes=server.max_body_bytes,
                default_thinking=server.default_thinking,
            )
        ]
        if server.http == "direct":
            listeners.append(HttpListener(app, server.host, server.http_port))
        for listener in listeners:
            await listener.start()
        try:
            yield
        finally:
            await asyncio.gather(*(listener.stop() for listener in listeners))


def _pool(kind: type, name: Place, replicas: int, config: Config, **options: Any) -> Any:
    """A deployment whose replicas are members."""
    cluster = config.cluster
    return serve.deployment(
        kind,
        name=name,
        num_replicas=replicas,
        ray_actor_options={
            "num_cpus": cluster.cpus_per_member,
            "num_gpus": cluster.gpus_per_member,
            "label_selector": cluster.label_selector.get(name, {}),
        },
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=cluster.drain_s,
        **options,
    )


def build(args: dict[str, Any]) -> Application:
    """Build the application from `{"config": {...}}`."""
    config = Config.from_dict(args["config"])
    plain, topology = config.model_dump(mode="json"), config.topology
    # A member queues and refuses by itself, with a reason; Serve must not hold requests back.
    many = config.engine.max_queue + config.engine.max_batch + 64
    attention = _pool(
        AttentionReplica,
        "attention",
        topology.attention,
        config,
        max_ongoing_requests=many,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "capacity": _REMEMBERED,
                "busy": config.engine.max_batch,
                "block_tokens": _BLOCK_TOKENS,
            },
        ),
    ).bind(plain)
    pools = []
    if topology.layout == "afd":
        pools.append(_pool(ExpertsReplica, "experts", topology.experts, config).bind(plain))
        if topology.router == "own":
            pools.append(_pool(RouterReplica, "router", topology.routers, config).bind(plain))
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.server.replicas,
        ray_actor_options={
            "num_cpus": config.cluster.cpus_per_member,
            "label_selector": config.cluster.label_selector.get("ingress", {}),
        },
        max_ongoing_requests=4096,
    )
    return ingress.bind(plain, attention, *pools)
