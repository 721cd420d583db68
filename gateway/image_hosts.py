"""Which hosts of the internet images may be fetched from: the operator's list, and what a public address is.

An entry of the list is a name (cdn.example.com), the names below one (*.example.com), an address, or a
network (10.0.0.0/8); a port may stand behind it (cdn.example.com:8443, [fd00::/8]:9000). Names open public
addresses only: whoever has a name says where it leads. Other addresses are opened by themselves or by their
network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# What resolvers read as a number, though it is no plain address: 2130706433, 0x7f.1, 127.1.
_NUMBER_AT_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_WITH_PORT = re.compile(r"(?:\[(?P<inner>[^\]]+)\]|(?P<plain>[^:\[\]]+))(?::(?P<port>[0-9]+))?")

_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
# Some of these are global by Python's tables, or were until lately.
_NOT_PUBLIC = (
    ip_network("192.0.0.0/24"),  # the internet's own protocols; a cloud's metadata
    ip_network("192.88.99.0/24"),  # relays to 6to4
    ip_network("168.63.129.16/32"),  # a cloud's own services, on a public address
    ip_network("3fff::/20"),  # documentation
)


@dataclass(frozen=True)
class NameEntry:
    """A name, or all names below it."""

    name: str
    """In lower case. Of a wildcard it is what follows the star, with its dot."""
    is_wildcard: bool
    port: int | None
    """None is every port."""

    def opens(self, host: str, port: int) -> bool:
        """Whether the host has this name."""
        is_named = host.endswith(self.name) if self.is_wildcard else host == self.name
        return is_named and self.port in (None, port)


@dataclass(frozen=True)
class NetworkEntry:
    """A network, or one address as a network of its own."""

    network: Network
    port: int | None

    def opens(self, address: Address, port: int) -> bool:
        """Whether the address lies in the network."""
        return address in self.network and self.port in (None, port)


@dataclass(frozen=True)
class ImageHosts:
    """The operator's list. An empty one is every host with public addresses."""

    names: tuple[NameEntry, ...] = ()
    networks: tuple[NetworkEntry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ImageHosts:
        """Reads entries with commas between them. Raises ValueError, which names the bad one."""
        entries = [_read_entry(part) for part in map(str.strip, text.split(",")) if part]
        return cls(
            tuple(entry for entry in entries if isinstance(entry, NameEntry)),
            tuple(entry for entry in entries if isinstance(entry, NetworkEntry)),
        )

    def can_allow(self, host: str, port: int) -> bool:
        """False for a host that is refused wherever it leads: its addresses need not be looked up.

        `host` is as it stands in a URL, in lower case and without brackets.
        """
        literal = read_address(host)
        if literal is not None:
            return self.allow(host, port, [literal])
        host = host.removesuffix(".")
        if not _NAME.fullmatch(host) or _NUMBER_AT_END.fullmatch(host):
            return False
        return (
            self.is_empty
            or self.allows_name(host, port)
            or any(entry.port in (None, port) for entry in self.networks)
        )

    def allow(self, host: str, port: int, addresses: Sequence[Address]) -> bool:
        """Whether a host that leads to these addresses may be asked; a single bad one is enough to refuse."""
        if not addresses:
            return False
        if (self.is_empty or self.allows_name(host, port)) and all(map(is_public, addresses)):
            return True
        return all(
            any(entry.opens(_unmapped(address), port) for entry in self.networks) for address in addresses
        )

    def allows_name(self, host: str, port: int) -> bool:
        """Whether the host's name is in the list."""
        return any(entry.opens(host.removesuffix("."), port) for entry in self.names)

    def describe_allowed(self, host: str, port: int) -> str:
        """Where a URL with this host must lead. Says the same whether the host exists or not."""
        if self.is_empty or self.allows_name(host, port):
            return "a public address"
        return "a host that this server fetches images from"

    @property
    def is_empty(self) -> bool:
        """Whether the operator has named no host."""
        return not self.names and not self.networks


def read_address(host: str) -> Address | None:
    """The address that a host is; None where it is anything else."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether the whole internet reaches the address, and reaches the same machine by it."""
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    inner = address.ipv4_mapped or address.sixtofour or _unwrap_nat64(address)
    if inner is not None:
        return is_public(inner)
    # Teredo's addresses are not global to Python; what is not assigned yet lies outside of this network.
    return address.is_global and address in _GLOBAL_UNICAST


def _unmapped(address: Address) -> Address:
    """An IPv4 address in IPv6's spelling -> as it is: connections to both go to the same place."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _unwrap_nat64(address: IPv6Address) -> IPv4Address | None:
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None


def _read_entry(text: str) -> NameEntry | NetworkEntry:
    body, port = _split_port(text)
    try:
        return NetworkEntry(ip_network(body), port)
    except ValueError as error:
        if "/" in body:
            raise ValueError(f"{text!r} is not a network: {error}") from None
    is_wildcard = body.startswith("*.")
    name = body.lower().removeprefix("*.").removesuffix(".")
    if not _NAME.fullmatch(name) or _NUMBER_AT_END.fullmatch(name):
        raise ValueError(
            f"{text!r} is neither a name (cdn.example.com), names below one (*.example.com), an address "
            "nor a network (10.0.0.0/8)"
        )
    return NameEntry(f".{name}" if is_wildcard else name, is_wildcard, port)


def _split_port(text: str) -> tuple[str, int | None]:
    """Without brackets, an entry with several colons is an IPv6 address, all of it."""
    match = _WITH_PORT.fullmatch(text)
    if match is None:
        return text, None
    port = match["port"]
    if port is not None and not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} has the port {port}; ports are 1 to 65535")
    return match["inner"] or match["plain"], None if port is None else int(port)
