"""How calls of the Kubernetes API are sent, bounded in time, and read; how each failure is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import urllib3
import yaml
from kubernetes import client, config
from urllib3 import exceptions as net

from whalepod.cluster.kube_access import Access
from whalepod.cluster.kube_objects import Fault, KubeError, Object, dig, name_of, objects

_PAGE = 500
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
Call = Callable[..., Any]


class Transport:
    """One namespace of one cluster, as one user.

    Args:
        configuration: server, credentials and certificates.
        namespace: where the release is.
        timeout_s: longest time one call may take, connecting and reading.
    """

    def __init__(
        self, configuration: client.Configuration, namespace: str, timeout_s: float = 15.0
    ) -> None:
        configuration.retries = False  # a time limit is only one if nothing is tried again unasked
        configuration.connection_pool_maxsize = 256  # one for each log that is followed
        self.server = str(configuration.host)
        self.namespace, self.timeout_s = namespace, timeout_s
        self.api = client.ApiClient(configuration)

    @classmethod
    def open(
        cls,
        kubeconfig: str | None = None,
        context: str | None = None,
        namespace: str | None = None,
        timeout_s: float = 15.0,
    ) -> Self:
        """As kubectl does: a kubeconfig, else the service account of the pod this runs in.

        Raises KubeError (configuration).
        """
        configuration = client.Configuration()
        inside = "KUBERNETES_SERVICE_HOST" in os.environ and _NAMESPACE_FILE.exists()
        if inside and not (kubeconfig or context or "KUBECONFIG" in os.environ):
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException as error:
                raise _unusable("the pod's service account", error) from None
            own = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
            return cls(configuration, namespace or own, timeout_s)
        source = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
        try:
            # The client's own default is read when it is imported; the environment may have moved.
            file = os.path.expanduser(source)
            config.load_kube_config(file, context, configuration, persist_config=False)
            contexts, active = config.list_kube_config_contexts(file)
            chosen = next((c for c in contexts if c["name"] == context), active)
            found = (chosen.get("context") or {}).get("namespace")
        except (config.ConfigException, yaml.YAMLError, OSError) as error:
            raise _unusable(source, error, context) from None
        except (TypeError, AttributeError, KeyError, ValueError) as error:  # YAML of another shape
            raise _unusable(source, f"not a kubeconfig ({error!r})", context) from None
        return cls(configuration, namespace or found or "default", timeout_s)

    def __enter__(self) -> Self:
        """Nothing to be done."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close idle connections."""
        self.api.rest_client.pool_manager.clear()

    def read(self, what: Access, call: Call, *args: Any, name: str = "", **options: Any) -> Object:
        """Send one call and read its JSON object. Raises KubeError."""
        end = time.monotonic() + self.timeout_s
        reply = self._send(what, call, *args, name=name, idle_s=self.timeout_s, **options)
        body = bytearray()
        with self._guard(what, name):
            for part in reply.stream(1 << 16):
                body += part
                if time.monotonic() > end:  # a server that drips never runs into a socket's limit
                    reply.close()
                    raise net.ReadTimeoutError(None, None, "the answer came too slowly")  # type: ignore[arg-type]
        return self.parse(what, bytes(body))

    def parse(self, what: Access, body: bytes) -> Object:
        """A JSON object. Raises KubeError (malformed)."""
        try:
            found = json.loads(body)
        except ValueError:
            found = body.decode("utf-8", "replace")
        if not isinstance(found, dict):
            raise self.malformed(what, "a JSON object", found)
        return found

    def items(
        self,
        what: Access,
        call: Call,
        *args: Any,
        state: dict[str, str] | None = None,
        **options: Any,
    ) -> list[Object]:
        """All items, page by page; `state` takes the list's resource version. Raises KubeError."""
        for last in (False, True):
            found: list[Object] = []
            token: str | None = None
            try:
                while True:
                    more = {"_continue": token} if token else {}
                    page = self.read(what, call, *args, limit=_PAGE, **more, **options)
                    found += self._checked(what, page)
                    metadata = dig(page, "metadata", kind=dict, default={})
                    token = dig(metadata, "continue", kind=str)
                    if state is not None:
                        version = dig(metadata, "resourceVersion", kind=str, default="")
                        state["resourceVersion"] = version
                    if not token:
                        return found
            except KubeError as error:
                # The list changed under the pages; from the start, once.
                if error.fault != "gone" or token is None or last:
                    raise
        raise AssertionError("unreachable")

    def lines(
        self, what: Access, call: Call, *args: Any, name: str = "", idle_s: float, **options: Any
    ) -> Generator[str, None, None]:
        """Send one call and yield its lines as they come. Raises KubeError.

        Args:
            idle_s: longest silence.
        """
        reply = self._send(what, call, *args, name=name, idle_s=idle_s, **options)
        rest = b""
        try:
            with self._guard(what, name):
                for part in reply.stream(None, decode_content=False):
                    *whole, rest = (rest + part).split(b"\n")
                    yield from (line.decode("utf-8", "replace") for line in whole if line)
            if rest:
                yield rest.decode("utf-8", "replace")
        finally:
            reply.close()

    def refusal(self, what: Access, name: str, status: int, body: str | bytes | None) -> KubeError:
        """An HTTP status of 400 or more, told with the way out."""
        body = body.decode("utf-8", "replace") if isinstance(body, bytes) else body or ""
        try:
            told = json.loads(body)
            said = str(told.get("message") or told) if isinstance(told, dict) else body
        except ValueError:
            said = body
        fault, fix = _fault(status, what, self.namespace)
        shown = f"{self._told(what, name)}: {status}"
        return KubeError(fault, f"{shown} {' '.join(said.split())[:300]}", fix)

    def malformed(self, what: Access, expected: str, found: Any) -> KubeError:
        """An answer that is no Kubernetes answer."""
        return KubeError(
            "malformed",
            f"{self._told(what)}: expected {expected}, found {str(found)[:120]!r}",
            f"is {self.server} the API server, and not a proxy or a login page? "
            "(`kubectl cluster-info`)",
        )

    def _send(
        self, what: Access, call: Call, *args: Any, name: str = "", idle_s: float, **options: Any
    ) -> urllib3.HTTPResponse:
        with self._guard(what, name):
            reply: urllib3.HTTPResponse = call(
                *args, _preload_content=False, _request_timeout=(self.timeout_s, idle_s), **options
            )
            if not 200 <= reply.status <= 299:  # older clients raise ApiException by themselves
                raise self.refusal(what, name, reply.status, reply.data)
            return reply

    @contextmanager
    def _guard(self, what: Access, name: str = "") -> Iterator[None]:
        shown = self._told(what, name)
        try:
            yield
        except client.ApiException as error:
            if error.status:
                raise self.refusal(what, name, error.status, error.body) from None
            raise self._unreachable(shown, error.reason) from None
        except net.NewConnectionError as error:
            raise self._unreachable(shown, error) from None
        except net.TimeoutError:
            raise KubeError(
                "timeout",
                f"{shown}: no whole answer within {self.timeout_s:g} s",
                "the API server is overloaded or the network drops packets (--timeout allows more)",
            ) from None
        except (net.HTTPError, OSError) as error:
            raise self._unreachable(shown, error) from None

    def _unreachable(self, shown: str, error: object) -> KubeError:
        return KubeError(
            "unreachable",
            f"{shown}: the connection failed ({' '.join(str(error).split())[:200]})",
            "is the cluster up, is a VPN or tunnel missing, is it the right --context? "
            "(`kubectl cluster-info`)",
        )

    def _told(self, what: Access, name: str = "") -> str:
        place = f" in namespace {self.namespace}" if what.namespaced else ""
        return f"{what}{f' {name}' if name else ''}{place} on {self.server}"

    def _checked(self, what: Access, page: Object) -> list[Object]:
        if not isinstance(page.get("items"), list):
            raise self.malformed(what, "a list named items", page)
        items = objects(page, "items")
        for item in items:
            name_of(item)
        return items


def _fault(status: int, what: Access, namespace: str) -> tuple[Fault, str]:
    if status == 403:
        role, where = ("Role", f" in {namespace}") if what.namespaced else ("ClusterRole", "")
        return "forbidden", (
            f"needed: verb {what.verb} on {what.path or what.resource}; ask an administrator to "
            f"bind the chart's {role}{where} to you (its rules are helm/whalepod/files/rbac.yaml)"
        )
    known: dict[int, tuple[Fault, str]] = {
        401: ("unauthorized", "the credentials are wrong or have expired; log in again"),
        404: ("not found", "check --namespace and the names (`kubectl get` shows what there is)"),
        408: ("timeout", "try again, or allow more with --timeout"),
        409: ("conflict", "something else changes it at the same time; try again"),
        410: ("gone", "what was read is too old; run the command again"),
        429: ("refused", "the API server has too much to do; try again in a minute"),
        504: ("timeout", "the API server waited in vain for another one; try again"),
    }
    if status in known:
        return known[status]
    if status >= 500:
        return "server", "a fault of the API server or of what it asks; its administrator can tell"
    return "refused", "the API server does not take this request; is its version supported?"


def _unusable(source: str, error: object, context: str | None = None) -> KubeError:
    asked = f" (context {context})" if context else ""
    return KubeError(
        "configuration",
        f"{source}{asked} cannot be used: {' '.join(str(error).split())[:300]}",
        "name a kubeconfig with --kubeconfig or KUBECONFIG and a context with --context "
        "(`kubectl config get-contexts` lists them)",
    )
