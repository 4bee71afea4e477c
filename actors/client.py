"""The engine as the ingress sees it over Ray: one streaming call per request, replayed on loss."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from whalepod.actors.controller import find_controller
from whalepod.config import Config
from whalepod.engine.request import Request, TokenEvent
from whalepod.errors import NotReady, Overloaded, RequestError

_STATUS_S = 0.5


class RayClient:
    """An `EngineClient` over the attention pool.

    It keeps what each live request has emitted. When an attention member dies, prompt and emitted
    tokens go to another one, which continues with the same tokens: sampling depends on nothing
    else. The caller sees a pause.

    Args:
        attention: handle of the attention deployment.
        config: names the controller, and says how long a request may wait for a member.
    """

    def __init__(self, attention: DeploymentHandle, config: Config) -> None:
        self._attention = attention.options(stream=True, method_name="generate")
        self._config, self._patience_s = config, config.cluster.ready_timeout_s
        self._controller: ActorHandle | None = None
        self._status: tuple[float, str | None] = (0.0, "the controller")
        self.replays = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """See `EngineClient.generate`."""
        emitted, attempt = list(request.emitted), 0
        deadline, begun = time.monotonic() + self._patience_s, time.monotonic()
        while True:
            # A name of its own for every attempt: the end of one must not cancel the next.
            name = f"{request.id}.{attempt}" if attempt else request.id
            left = request.timeout_s and max(0.0, request.timeout_s - time.monotonic() + begun)
            # What is asked of the prompt comes with the first event, so it is not told twice.
            again = dataclasses.replace(
                request,
                id=name,
                emitted=tuple(emitted),
                timeout_s=left,
                replayed=request.replayed or attempt > 0,
                prompt_logprobs=None if emitted else request.prompt_logprobs,
            )
            stream = self._attention.remote(again)
            try:
                async for item in stream:
                    if isinstance(item, tuple):
                        _refuse(*item)
                    for event in item:
                        if event.token >= 0:
                            emitted.append(event.token)
                        yield event
                        if event.finish is not None:
                            return
                    deadline = time.monotonic() + self._patience_s
            except RayTaskError:
                raise  # the member's own fault, which another one would repeat
            except (RayError, RayServeException) as error:
                lost = error
            else:
                lost = None
            finally:
                stream.cancel()
            if time.monotonic() > deadline:
                raise NotReady(
                    f"no attention member took the request within {self._patience_s} s"
                ) from lost
            self.replays, attempt = self.replays + 1, attempt + 1
            await asyncio.sleep(0.05)

    async def ready(self) -> str | None:
        """See `EngineClient.ready`; asks the controller at most twice a second."""
        asked, answer = self._status
        if time.monotonic() - asked > _STATUS_S:
            answer = await self._ask()
            self._status = (time.monotonic(), answer)
        return answer

    async def status(self) -> dict[str, Any]:
        """The controller's report. Raises NotReady when there is none."""
        self._controller = self._controller or find_controller(self._config)
        if self._controller is None:
            raise NotReady("no controller runs yet")
        try:
            report: dict[str, Any] = await asyncio.wait_for(self._controller.status.remote(), 5)
        except (RayError, TimeoutError) as error:
            self._controller = None
            raise NotReady(f"the controller does not answer ({type(error).__name__})") from None
        return report

    async def _ask(self) -> str | None:
        try:
            report = await self.status()
        except NotReady as error:
            return str(error)
        if report["ready"]:
            return None
        return f"waiting for {report['waiting_for'] or 'the next epoch'}"


def _refuse(kind: str, message: str, detail: Any) -> None:
    if kind == "request":
        raise RequestError(message, detail)
    raise Overloaded(message, float(detail))
