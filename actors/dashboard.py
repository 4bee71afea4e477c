"""Ray's REST API on the dashboard: deploy, inspect, scale and remove the application."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx

from whalepod.config import Config
from whalepod.errors import ConfigError, WhalepodError

APPLICATION = "whalepod"
IMPORT_PATH = "whalepod.ingress.serve:build"
DEFAULT_URL = "http://127.0.0.1:8265"


class DashboardError(WhalepodError):
    """Ray's dashboard refused or did not answer; the message says which call and why."""


def serve_config(config: Config) -> dict[str, Any]:
    """The declarative Serve configuration of a whalepod cluster (also RayService's serveConfigV2)."""
    return {
        "proxy_location": "EveryNode" if config.server.http == "proxy" else "Disabled",
        "http_options": {"host": config.server.host, "port": config.server.http_port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                # Pools are scaled by hand or by an external scaler, never by Serve itself.
                "external_scaler_enabled": True,
                "args": {"config": config.model_dump(mode="json")},
            }
        ],
    }


def token() -> str | None:
    """Ray's authentication token, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.exists() else None


class Dashboard:
    """One cluster's dashboard.

    Args:
        url: `http://host:port`.
        secret: Ray's token, or None where authentication is off.
    """

    def __init__(self, url: str = DEFAULT_URL, secret: str | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}

    def deploy(self, config: Config) -> None:
        """Set the cluster's Serve state to this configuration."""
        self._call("PUT", "/api/serve/applications/", serve_config(config))

    def remove(self) -> None:
        """Shut Serve down: the application and its members."""
        self._call("DELETE", "/api/serve/applications/")

    def scale(self, pool: str, replicas: int) -> None:
        """Set a pool's size. Raises ConfigError for an unknown pool or a size below 1."""
        if replicas < 1:
            raise ConfigError(f"{pool}={replicas}: a pool needs at least 1 member")
        path = f"/api/v1/applications/{APPLICATION}/deployments/{pool}/scale"
        self._call("POST", path, {"target_num_replicas": replicas})

    def application(self) -> dict[str, Any] | None:
        """Serve's view of the application, None when it is not deployed."""
        found = self._call("GET", "/api/serve/applications/").get("applications", {})
        application: dict[str, Any] | None = found.get(APPLICATION)
        return application

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            reply = httpx.request(
                method,
                f"{self.url}{path}",
                json=body,
                headers=self._headers,
                timeout=30,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            raise DashboardError(
                f"{method} {self.url}{path}: {error or type(error).__name__}; is a Ray cluster "
                "with a dashboard running there? (`whalepod up` starts one)"
            ) from None
        if reply.status_code in (401, 403):
            raise DashboardError(
                f"{self.url} refuses the token ({reply.status_code}); set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's (`ray get-auth-token` prints it)"
            )
        if reply.status_code >= 400:
            raise DashboardError(
                f"{method} {self.url}{path} answered {reply.status_code}: {reply.text[:500]}"
            )
        found: dict[str, Any] = reply.json() if reply.content and _is_json(reply) else {}
        return found


def _is_json(reply: httpx.Response) -> bool:
    return "json" in reply.headers.get("content-type", "")
