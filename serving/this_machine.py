"""Whether a request comes from this machine: who is let in where a server has no keys."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def is_asked_from_here(client: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a connection is from a loopback address and no proxy says that it asks for another.

    Args:
        client: the address that the connection is from.
        headers: the request's, names in small letters.

    Example:
        >>> is_asked_from_here("127.0.0.1", {}), is_asked_from_here("10.0.0.7", {})
        (True, False)
    """
    if any(name in headers for name in _FORWARDED):
        return False
    try:
        address = ip_address(client or "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
