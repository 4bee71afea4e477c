"""The Kubernetes API, through the official client: every call that whalepod makes of it.

Calls return plain objects as the server sent them. Each has a time limit, and each failure is a
`KubeError` that names the call, what was expected and what to do. Which permission a call needs is
written beside it, as data (`cluster/kube_access.py`).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from kubernetes import client

from whalepod.cluster import kube_access as access
from whalepod.cluster.kube_access import Access
from whalepod.cluster.kube_objects import KubeError, Object, dig, objects
from whalepod.cluster.kube_transport import Call, Transport


class Kube(Transport):
    """What whalepod asks of one namespace of one cluster. Every method raises KubeError."""

    def __init__(
        self, configuration: client.Configuration, namespace: str, timeout_s: float = 15.0
    ) -> None:
        super().__init__(configuration, namespace, timeout_s)
        self._core = client.CoreV1Api(self.api)
        self._custom = client.CustomObjectsApi(self.api)

    # -- the server ------------------------------------------------------------------------------

    def version(self) -> str:
        """The server's version, such as `v1.33.4`."""
        found = self.read(access.GET_VERSION, client.VersionApi(self.api).get_code)
        version = dig(found, "gitVersion", kind=str)
        if not version:
            raise self.malformed(access.GET_VERSION, "gitVersion", found)
        return version

    def kinds(self, group_version: str) -> dict[str, tuple[str, bool]] | None:
        """Kinds of an API such as `ray.io/v1` or `v1`: plural, and whether in a namespace.

        None where the API is not served.
        """
        group, _, version = group_version.rpartition("/")
        try:
            if group:
                call = self._custom.get_api_resources
                found = self.read(access.GET_GROUPS, call, group, version, name=group_version)
            else:
                found = self.read(access.GET_CORE, self._core.get_api_resources)
        except KubeError as error:
            if error.fault == "not found":
                return None
            raise
        served: dict[str, tuple[str, bool]] = {}
        for resource in objects(found, "resources"):
            kind, plural = (dig(resource, key, kind=str) for key in ("kind", "name"))
            if kind and plural and "/" not in plural:
                served[kind] = plural, dig(resource, "namespaced", kind=bool, default=True)
        return served

    def allowed(self, asked: Sequence[Access]) -> list[bool]:
        """Whether this user may do each of these (those with a `path` ask for the path)."""
        with ThreadPoolExecutor(8, thread_name_prefix="access") as pool:
            return list(pool.map(self._may, asked))

    def _may(self, asked: Access) -> bool:
        if asked.path:
            spec: Object = {
                "nonResourceAttributes": {"verb": asked.verb, "path": asked.path.rstrip("*")}
            }
        else:
            resource, _, part = asked.resource.partition("/")
            wanted = {"verb": asked.verb, "group": asked.group, "resource": resource}
            wanted |= {"subresource": part} if part else {}
            wanted |= {"namespace": self.namespace} if asked.namespaced else {}
            wanted |= {"name": asked.names[0]} if asked.names else {}
            spec = {"resourceAttributes": wanted}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": spec,
        }
        ask = client.AuthorizationV1Api(self.api).create_self_subject_access_review
        answer = self.read(access.ASK_ACCESS, ask, body)
        verdict = dig(answer, "status", "allowed", kind=bool)
        if verdict is None:
            raise self.malformed(access.ASK_ACCESS, "status.allowed", answer)
        return verdict

    # -- the cluster -----------------------------------------------------------------------------

    def crd(self, name: str) -> Object | None:
        """A custom resource definition, None where there is none."""
        read = client.ApiextensionsV1Api(self.api).read_custom_resource_definition
        try:
            return self.read(access.GET_CRD, read, name, name=name)
        except KubeError as error:
            if error.fault == "not found":
                return None
            raise

    def nodes(self) -> list[Object]:
        """All nodes."""
        return self.items(access.LIST_NODES, self._core.list_node)

    def storage_classes(self) -> list[Object]:
        """All storage classes."""
        found = client.StorageV1Api(self.api).list_storage_class
        return self.items(access.LIST_CLASSES, found)

    def deployments(self, selector: str, namespace: str | None = None) -> list[Object]:
        """Deployments with these labels, in one namespace or in all."""
        apps = client.AppsV1Api(self.api)
        if namespace:
            call: Call = apps.list_namespaced_deployment
            return self.items(access.LIST_DEPLOYMENTS, call, namespace, label_selector=selector)
        call = apps.list_deployment_for_all_namespaces
        return self.items(access.LIST_DEPLOYMENTS, call, label_selector=selector)

    # -- the namespace ---------------------------------------------------------------------------

    def namespace_object(self) -> Object | None:
        """The namespace itself, None where there is none."""
        try:
            read = self._core.read_namespace
            return self.read(access.GET_NAMESPACE, read, self.namespace, name=self.namespace)
        except KubeError as error:
            if error.fault == "not found":
                return None
            raise

    def claims(self) -> list[Object]:
        """Persistent volume claims."""
        call = self._core.list_namespaced_persistent_volume_claim
        return self.items(access.LIST_CLAIMS, call, self.namespace)

    def quotas(self) -> list[Object]:
        """Resource quotas."""
        call = self._core.list_namespaced_resource_quota
        return self.items(access.LIST_QUOTAS, call, self.namespace)

    def limit_ranges(self) -> list[Object]:
        """Limit ranges."""
        return self.items(
            access.LIST_LIMITS, self._core.list_namespaced_limit_range, self.namespace
        )

    def ray(self, plural: str) -> list[Object]:
        """RayServices or RayClusters (`rayservices`, `rayclusters`)."""
        which = access.LIST_SERVICES if plural == "rayservices" else access.LIST_CLUSTERS
        call = self._custom.list_namespaced_custom_object
        try:
            return self.items(which, call, "ray.io", "v1", self.namespace, plural)
        except KubeError as error:
            if error.fault != "not found":
                raise
        raise KubeError(
            "not found",
            f"{self.server} does not serve {plural}.ray.io/v1: KubeRay is not there, or too old",
            "`whalepod k8s preflight` says more",
        )

    def pods(self, selector: str) -> tuple[list[Object], str]:
        """Pods with these labels, and the resource version to watch from."""
        found: dict[str, str] = {}
        call = self._core.list_namespaced_pod
        pods = self.items(
            access.LIST_PODS, call, self.namespace, label_selector=selector, state=found
        )
        return pods, found.get("resourceVersion", "")

    def watch_pods(self, selector: str, since: str, window_s: int = 240) -> Iterator[Object]:
        """Events (`type`, `object`) after resource version `since`, for at most `window_s`.

        Raises KubeError; `gone` (410) when `since` is too old, so that pods must be listed anew.
        """
        lines = self.lines(
            access.WATCH_PODS,
            self._core.list_namespaced_pod,
            self.namespace,
            idle_s=window_s + self.timeout_s,
            label_selector=selector,
            resource_version=since,
            watch=True,
            allow_watch_bookmarks=True,
            timeout_seconds=window_s,
        )
        with closing(lines):  # at once, whatever keeps a failure's frames alive
            for line in lines:
                yield self._event(line)

    def _event(self, line: str) -> Object:
        event = self.parse(access.WATCH_PODS, line.encode())
        kind, found = dig(event, "type", kind=str), dig(event, "object", kind=dict)
        if kind is None or found is None:
            raise self.malformed(access.WATCH_PODS, "type and object", event)
        if kind == "ERROR":
            status = dig(found, "code", kind=int, default=500)
            raise self.refusal(access.WATCH_PODS, "", status, json.dumps(found))
        return {"type": kind, "object": found}

    def log(
        self,
        pod: str,
        container: str,
        *,
        follow: bool = False,
        previous: bool = False,
        since_s: int | None = None,
        tail: int | None = None,
        idle_s: float | None = None,
    ) -> Generator[str, None, None]:
        """Lines of a container's log, each `TIME TEXT`.

        Args:
            idle_s: longest silence while following, after which a KubeError (timeout) is raised.
        """
        options = {"since_seconds": since_s, "tail_lines": tail}
        return self.lines(
            access.GET_LOG,
            self._core.read_namespaced_pod_log,
            pod,
            self.namespace,
            name=pod,
            idle_s=idle_s or self.timeout_s,
            container=container,
            follow=follow,
            previous=previous,
            timestamps=True,
            **{key: value for key, value in options.items() if value is not None},
        )

    def service(self, name: str, port: str, path: str) -> Object:
        """What a service of the namespace answers with to GET, through the API server's proxy."""
        call = self._core.connect_get_namespaced_service_proxy_with_path
        return self.read(
            access.GET_PROXY, call, f"http:{name}:{port}", self.namespace, path, name=name
        )
