"""A member in a process of its own: follows the controller's orders, one epoch after the other."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

import ray
import torch

from whalepod.actors.controller import get_controller
from whalepod.cluster.doorbell import Doorbell, Ringer
from whalepod.cluster.epoch import Epoch
from whalepod.cluster.fabric import Fabric
from whalepod.cluster.rendezvous import connect
from whalepod.cluster.report import Order
from whalepod.cluster.topology import MemberInfo, Pool
from whalepod.config import Config
from whalepod.engine.member import Member
from whalepod.engine.request import TokenEvent
from whalepod.engine.source import Source
from whalepod.errors import EpochLost
from whalepod.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)
_SWITCH_S = 0.0002


class Shell:
    """Gives a `Member` a process, a device and a name.

    Two threads: one follows orders (loads weights, enters and leaves epochs), one serves.

    Args:
        stage, replica: see `MemberInfo`.
        emit: takes token events; called from the serving thread.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        name: str,
        *,
        stage: int = 0,
        replica: str = "",
        emit: Callable[[TokenEvent], None] = lambda event: None,
    ) -> None:
        # Members share the machine's cores; one thread each keeps them out of each other's way,
        # and results independent of the core count.
        torch.set_num_threads(1)
        logging.basicConfig()
        logging.getLogger("whalepod").setLevel(logging.INFO)
        # The serving thread gives the interpreter up at every tensor operation and must get it back
        # soon, however long the event loop beside it could go on (the default is 5 ms).
        sys.setswitchinterval(_SWITCH_S)
        self.config, self.name = config, name
        self.host = str(ray.util.get_node_ip_address())
        device = "cuda" if config.cluster.fabric == "nccl" else "cpu"
        source = Source(config.model, Checkpoint.open(config.model.path), device)
        self.member = Member(name, config, source, emit)
        if pool == "attention":
            self.member.open_attention(_stage_layers(config, source, stage))
        self._bell = Doorbell(self.host, self._wake)
        self._info = MemberInfo(name, pool, stage, replica or name, self.host, self._bell.port)
        self._handle = ray.get_runtime_context().current_actor
        self._controller = get_controller(config, source.config)
        self._epoch: Epoch | None = None
        self._fabric: Fabric | None = None
        self._serving: threading.Thread | None = None
        self._stop = threading.Event()
        self._closed = False
        self.fault: str | None = None
        self._join()
        threading.Thread(target=self._follow, name="orders", daemon=True).start()

    def check(self) -> None:
        """Raise when this process should be replaced (Serve's health check)."""
        if self.fault is not None:
            raise RuntimeError(self.fault)

    async def leave(self) -> None:
        """Leave the cluster in an orderly way; returns when an epoch without this member runs."""
        if not self._closed:
            try:
                await self._controller.leave.remote(self.name)
            finally:
                self._closed = True

    @property
    def epoch_id(self) -> int:
        """The epoch this member serves in, 0 between epochs."""
        return self._epoch.id if self._epoch is not None else 0

    def _wake(self) -> None:
        if self.member.loop is not None:
            self.member.loop.wake.set()

    def _join(self) -> None:
        epoch = self._epoch
        call = self._controller.join.remote(
            self._info, [self._handle], self.config.digest, epoch.to_dict() if epoch else None
        )
        ray.get(call, timeout=60)
        if epoch is not None and (self._serving is None or not self._serving.is_alive()):
            # Lost while no controller was there to be told; a new one must not take it for alive.
            self._report(EpochLost(epoch.id, [], "it had ended before the controller restarted"))

    def _follow(self) -> None:
        seen = 0
        while not self._closed:
            try:
                call = self._controller.next_order.remote(self.name, seen)
                order: Order | None = ray.get(call, timeout=30)
                if order is None:
                    continue
                if order.seq < 0:  # a new controller that does not know us yet
                    self._join()
                    seen = 0
                    continue
                seen = order.seq
                self._obey(order)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                log.warning("%s: no word from the controller: %s", self.name, error)
                time.sleep(0.5)
            except EpochLost as error:
                self._report(error)
            except Exception as error:
                log.exception("%s cannot follow its orders", self.name)
                self.fault = f"{self.name} cannot follow its orders: {error!r}"
                return

    def _obey(self, order: Order) -> None:
        if order.phase == "rest" or order.epoch is None:
            self._end_epoch()
            return
        epoch = Epoch.from_dict(order.epoch)
        epoch.admit(self.name, self.config.digest)
        self.member.prepare(epoch)
        if order.phase == "prepare":
            ray.get(self._controller.prepared.remote(self.name, epoch.id), timeout=30)
            return
        self._end_epoch()
        self._enter(epoch)

    def _end_epoch(self) -> None:
        """Let the running epoch end at its next step boundary; force it when that takes too long."""
        thread, self._serving = self._serving, None
        if thread is None:
            return
        self._stop.set()
        self._wake()
        thread.join(self.config.cluster.step_deadline_s)
        if thread.is_alive() and self._fabric is not None:
            self._fabric.close()
            thread.join(self.config.cluster.step_deadline_s)
        self._epoch = None

    def _enter(self, epoch: Epoch) -> None:
        seat = epoch.member(self.name)
        fabric = connect(
            epoch.id,
            seat.rank,
            epoch.names,
            address=epoch.rendezvous,
            backend=epoch.backend,
            host=self.host,
            deadline_s=self.config.cluster.step_deadline_s,
        )
        if self.member.loop is not None:
            lead = epoch.lead
            self.member.loop.ring = Ringer(lead.host, lead.doorbell)
        self._fabric, self._epoch, self._stop = fabric, epoch, threading.Event()
        self._serving = threading.Thread(
            target=self._serve, args=(epoch, fabric, self._stop), name="serve", daemon=True
        )
        self._serving.start()
        ray.get(self._controller.entered.remote(self.name, epoch.id), timeout=30)

    def _serve(self, epoch: Epoch, fabric: Fabric, stop: threading.Event) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                self.member.serve(epoch, fabric, stop)
        except EpochLost as error:
            self._report(error)
        except Exception as error:
            log.exception("%s failed in epoch %d", self.name, epoch.id)
            self.fault = f"{self.name} failed in epoch {epoch.id}: {error!r}"
            self._report(EpochLost(epoch.id, [self.name], repr(error)))
        finally:
            fabric.close()

    def _report(self, error: EpochLost) -> None:
        log.warning("%s: %s", self.name, error)
        self._controller.report_lost.remote(self.name, error.epoch, str(error))


def _stage_layers(config: Config, source: Source, stage: int) -> range:
    layers, stages = source.config.num_hidden_layers, config.topology.stages
    return range(layers * stage // stages, layers * (stage + 1) // stages)
