"""Which paths ask for which key.

Open to everybody: /health, /ready, and the pages at /docs, for probes and people have no keys. /metrics tells
of everybody's traffic and /admin changes what is served, so an API key opens neither.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from enum import Enum
from ipaddress import ip_address

from gateway.errors import Forbidden, Unauthorized
from gateway.keys import Key, Keys, check_key, digest_of
from gateway.settings import Settings

_OPEN = frozenset({"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
# The scripts of /docs.
_OPEN_FOLDER = "/static-offline-docs/"


class Door(Enum):
    """What a path asks for."""

    OPEN = "open"
    API = "api"
    METRICS = "metrics"
    ADMIN = "admin"


def door_of(method: str, path: str) -> Door:
    """The door that a request stands before."""
    # POST / is an endpoint, GET / leads to /docs.
    if path in _OPEN or path.startswith(_OPEN_FOLDER) or (path == "/" and method in ("GET", "HEAD")):
        return Door.OPEN
    if path == "/metrics" or path.startswith("/metrics/"):
        return Door.METRICS
    if path == "/admin" or path.startswith("/admin/"):
        return Door.ADMIN
    return Door.API


class Access:
    """Lets requests in, or refuses them. One for each application."""

    def __init__(self, settings: Settings) -> None:
        """Raises UnusableKeys."""
        fixed = []
        if settings.api_key is not None:
            plain = check_key(settings.api_key.get_secret_value(), "GATEWAY_API_KEY")
            fixed.append(Key("default", digest_of(plain)))
        self.keys = Keys(fixed, settings.api_keys_file)
        self._admin = self._starter = None
        if settings.admin_key is not None:
            self._admin = digest_of(check_key(settings.admin_key.get_secret_value(), "GATEWAY_ADMIN_KEY"))
        if settings.starter_key is not None:
            self._starter = digest_of(settings.starter_key.get_secret_value())
        self.has_metrics = _has_metrics(settings)

    @property
    def asks_for_keys(self) -> bool:
        """Whether the endpoints ask for an API key."""
        return self.keys.are_asked_for

    def admit(self, method: str, path: str, given: Sequence[str]) -> Key | None:
        """The API key of a request that may come in, None where none is asked for. `given` are the keys that
        it brings.

        Raises Unauthorized, or Forbidden for what is switched off.
        """
        door = door_of(method, path)
        if door is Door.ADMIN:
            self.check_admin(given)
        elif door is Door.METRICS:
            self.check_metrics(given)
        elif door is Door.API and self.asks_for_keys and not self._is_starter(method, path, given):
            return self._find(given)
        return None

    def check_admin(self, given: Sequence[str]) -> None:
        """Raises Forbidden where there is no admin key, Unauthorized for any other key."""
        if self._admin is None:
            raise Forbidden(
                "the admin routes are switched off here; the operator can switch them on with a key in "
                "GATEWAY_ADMIN_KEY",
                code="switched_off",
            )
        if not _is_among(self._admin, given):
            raise Unauthorized(
                f"{'another key' if given else 'a key'} is asked for here: the operator's own, the one in "
                "GATEWAY_ADMIN_KEY, as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def check_metrics(self, given: Sequence[str]) -> None:
        """Raises Forbidden where they are switched off, Unauthorized where they have a key and it is not
        there.
        """
        if not self.has_metrics:
            raise Forbidden(
                "the metrics are switched off here; the operator can give them a key in GATEWAY_ADMIN_KEY, "
                "or show them to everybody with GATEWAY_METRICS=true",
                code="switched_off",
            )
        if self._admin is not None:
            self.check_admin(given)

    def _find(self, given: Sequence[str]) -> Key:
        if not given:
            raise Unauthorized(
                "an API key is asked for here: send it as Authorization: Bearer KEY, or as api-key or "
                "x-api-key; the operator of this server gives them out",
                code="missing_api_key",
            )
        found = self.keys.find(given)
        if found is None:
            raise Unauthorized(
                "the API key of this request is not known here; the operator of this server gives them out",
                code="invalid_api_key",
            )
        return found

    def _is_starter(self, method: str, path: str, given: Sequence[str]) -> bool:
        """Whether it is the command that has started this gateway, which lists the models."""
        return (
            self._starter is not None
            and (method, path) == ("GET", "/v1/models")
            and _is_among(self._starter, given)
        )


def _is_among(digest: bytes, given: Sequence[str]) -> bool:
    return any(hmac.compare_digest(digest, digest_of(key)) for key in given)


def _has_metrics(settings: Settings) -> bool:
    """What GATEWAY_METRICS says; without it, where nobody but this machine and who has the key reads them."""
    if settings.metrics is not None:
        return settings.metrics
    return settings.admin_key is not None or is_loopback(settings.host)


def is_loopback(host: str) -> bool:
    """Whether nobody beyond this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
