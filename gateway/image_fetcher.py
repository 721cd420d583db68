"""Fetches images from the web, and from nowhere else.

Whoever sends a URL has this machine ask for it, which may stand in a network that the client is not in. So a
host's addresses are checked, and the connection goes to exactly those that were: aiohttp has no resolver but
the one that checks. Redirects are followed here, each like a new URL.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from ipaddress import ip_address

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from gateway.errors import BadRequest, shorten
from gateway.image_hosts import ImageHosts
from gateway.settings import Settings

logger = logging.getLogger(__name__)

Lookup = Callable[[str], Awaitable[Sequence[str]]]
"""A host's name -> its addresses. Raises OSError where it has none."""

_FETCHES_AT_ONCE = 32
_MAX_URL_LENGTH = 8192
_SHOWN_LENGTH = 100
_CHUNK_BYTES = 64 * 2**10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Of stores that do not know what they keep.
_UNKNOWN_TYPES = frozenset({"application/octet-stream", "binary/octet-stream"})
# yarl 1.25 trips over http://]%[@.
_UNREADABLE = (ValueError, IndexError)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HEADERS = {
    "User-Agent": f"triton-embeddings/{importlib.metadata.version('triton-embeddings')}",
    "Accept": "image/*",
    # A small compressed answer can be a huge one.
    "Accept-Encoding": "identity",
}
# Their own texts name addresses. The first that fits counts.
_REASONS: tuple[tuple[type[aiohttp.ClientError], str], ...] = (
    (aiohttp.ClientConnectorCertificateError, "has a certificate that is not trusted"),
    (aiohttp.ClientSSLError, "does not answer to a secure connection"),
    (aiohttp.ClientConnectorError, "cannot be reached"),
    (aiohttp.ServerDisconnectedError, "closed the connection without an answer"),
    (aiohttp.ClientPayloadError, "broke off its answer"),
    (aiohttp.ClientOSError, "broke the connection off"),
    (aiohttp.ClientResponseError, "did not answer in HTTP"),
)


class _Refusal(Exception):
    """Why an image was not fetched: what stands behind the URL's name in a sentence."""


def _elsewhere(hosts: ImageHosts, host: str, port: int) -> _Refusal:
    where = hosts.describe_allowed(host, port)
    return _Refusal(f"does not lead to {where}; send the image as a data URL")


async def look_up(host: str) -> list[str]:
    """The addresses that the system knows of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """A client of the web that knows where it may go. One for each application."""

    def __init__(self, settings: Settings, lookup: Lookup = look_up) -> None:
        self._hosts = ImageHosts.parse(settings.image_hosts)
        self._lookup = lookup
        self._max_bytes = settings.max_image_bytes
        self._max_redirects = settings.max_image_redirects
        self._timeout_s = settings.image_timeout_s
        self._turns = asyncio.Semaphore(_FETCHES_AT_ONCE)
        self._opened: aiohttp.ClientSession | None = None

    async def fetch(self, reference: str) -> bytes:
        """What stands at an http(s) URL. Raises BadRequest, which names the URL without its query."""
        url = _read_url(reference)
        # The time counts from a fetch's turn: none may run out of it while it waits for others.
        async with self._turns:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._follow(url)
            except TimeoutError:
                raise BadRequest(
                    f"{_show(url)} did not give the image within {self._timeout_s:g} s"
                ) from None

    async def close(self) -> None:
        """Closes all connections."""
        if self._opened is not None:
            await self._opened.close()

    async def _follow(self, first: URL) -> bytes:
        url, subject = first, _show(first)
        for _ in range(self._max_redirects + 1):
            try:
                answer = await self._ask(url)
            except _Refusal as refusal:
                raise BadRequest(f"{subject} {refusal}") from None
            # aiohttp raises a bare ValueError for some of what a host may answer.
            except (aiohttp.ClientError, ValueError) as error:
                raise BadRequest(f"{subject} {_explain(error)}") from None
            if isinstance(answer, bytes):
                return answer
            # Not named: what a redirect leads to can be a secret of the server that sent it.
            url, subject = answer, f"what {_show(first)} redirects to"
        raise BadRequest(f"{_show(first)} redirects more than {self._max_redirects} times")

    async def _ask(self, url: URL) -> bytes | URL:
        """One request: the image, or where it is."""
        host, port = url.raw_host, url.port
        if url.scheme not in ("http", "https") or not host or not port:
            raise _Refusal("is no http or https URL")
        if url.raw_user is not None or url.raw_password is not None:
            raise _Refusal("has a user's name or password in it, which is not sent on")
        # aiohttp does not ask the resolver for a host that is an address itself.
        if not self._hosts.can_allow(host, port):
            raise _elsewhere(self._hosts, host, port)
        async with self._session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location is not None:
                return _join(url, location)
            return await self._read(response)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != HTTPStatus.OK:
            raise _Refusal(f"answered with the status {response.status}")
        kind = response.content_type
        if not kind.startswith("image/") and kind not in _UNKNOWN_TYPES:
            raise _Refusal(f"sends {shorten(kind)}, which is no image")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise _Refusal(f"sends its answer compressed ({shorten(encoding)}), which is not read")
        too_large = _Refusal(f"is larger than {self._max_bytes} bytes (GATEWAY_MAX_IMAGE_BYTES)")
        if (response.content_length or 0) > self._max_bytes:
            raise too_large
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_bytes:
                raise too_large
        if not data:
            raise _Refusal("is empty")
        return bytes(data)

    @property
    def _session(self) -> aiohttp.ClientSession:
        # Not made before it is needed: it belongs to the event loop that runs then.
        if self._opened is None:
            resolver = _CheckedResolver(self._hosts, self._lookup)
            self._opened = aiohttp.ClientSession(
                # Addresses that are remembered by name would be checked once and used for long.
                connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None),
                # Else what is refused for being compressed would be unpacked first.
                auto_decompress=False,
                trust_env=False,
            )
        return self._opened


class _CheckedResolver(AbstractResolver):
    """Gives aiohttp the addresses of a host, all of which may be asked, or none."""

    def __init__(self, hosts: ImageHosts, lookup: Lookup) -> None:
        self._hosts = hosts
        self._lookup = lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        refusal = _elsewhere(self._hosts, host, port)
        try:
            addresses = [ip_address(address) for address in await self._lookup(host)]
        except OSError as error:
            # Refused like the others, so that nobody learns which names a private network has.
            logger.debug("%s has no address: %s", host, error)
            raise refusal from None
        if not self._hosts.allow(host, port, addresses):
            logger.debug("images are not fetched from %s, which is at %s", host, addresses)
            raise refusal
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


def _read_url(text: str) -> URL:
    if len(text) > _MAX_URL_LENGTH:
        raise BadRequest(f"a URL of {len(text)} characters is too long; at most {_MAX_URL_LENGTH} are taken")
    # The parser would leave some of them out in silence.
    if _CONTROL.search(text):
        raise BadRequest(f"the URL {shorten(text, _SHOWN_LENGTH)} has control characters in it")
    try:
        url = URL(text)
    except _UNREADABLE:
        url = URL()
    if not url.raw_host:
        raise BadRequest(f"{shorten(text, _SHOWN_LENGTH)} is not a valid URL")
    return url


def _join(url: URL, location: str) -> URL:
    refusal = _Refusal("redirects to what is not a valid URL")
    if _CONTROL.search(location):
        raise refusal
    try:
        return url.join(URL(location))
    except _UNREADABLE:
        raise refusal from None


def _show(url: URL) -> str:
    """A URL as clients and logs see it: a query may hold keys."""
    shown = str(url.with_user(None).with_query(None).with_fragment(None)) if url.raw_host else "the URL"
    return shown if len(shown) <= _SHOWN_LENGTH else f"{shown[: _SHOWN_LENGTH - 3]}..."


def _explain(error: aiohttp.ClientError | ValueError) -> str:
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "cannot be fetched")
