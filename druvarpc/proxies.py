"""HTTP proxies: which one is used for an address, and what it is told."""

import os
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import getproxies_environment

from druvarpc.addresses import Address, parse_address

__all__ = ["Proxy", "choose_proxy"]


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that makes connections (CONNECT).

    Attributes:
        address: where it is: "http", or "https" for one that is spoken to by TLS.
        credentials: for Proxy-Authorization; never shown.
    """

    address: Address
    credentials: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.address)


def choose_proxy(address: Address, proxy: str | None) -> Proxy | None:
    """Return the proxy for connections to an address, None for none.

    Args:
        address: where to.
        proxy: a URL; "" for none; None for what the environment says, as curl reads it:
            HTTPS_PROXY for tls and https, http_proxy for http, ALL_PROXY for these where that isn't
            set, and NO_PROXY for exceptions. For tcp and unix the environment says nothing.

    Raises:
        ValueError: it is no proxy that can be used, or there can be none for that address.
    """
    if proxy == "":
        return None
    if proxy is not None:
        if address.scheme == "unix":
            raise ValueError("proxy=: there is no proxy for a Unix socket")
        return _parse_proxy(proxy, "proxy=")
    if address.scheme not in ("tls", "https", "http"):
        return None
    known = getproxies_environment()
    # HTTP_PROXY in upper case is also what a CGI program gets from a header `Proxy` of its client.
    kind, found = (
        ("http", os.environ.get("http_proxy"))
        if address.scheme == "http"
        else ("https", known.get("https"))
    )
    found = found or known.get("all")
    if not found or _is_excepted(address, known.get("no", "")):
        return None
    return _parse_proxy(found, f"the environment's proxy for {kind}")


def _is_excepted(address: Address, exceptions: str) -> bool:
    """Whether NO_PROXY names the host: itself, a domain above it, or a network that it is in."""
    host = address.host.lower().rstrip(".")
    for entry in exceptions.lower().replace(",", " ").split():
        name = entry.removesuffix(f":{address.port}").removeprefix("*").strip(".[]")
        if entry == "*" or (name and (host == name or host.endswith(f".{name}"))):
            return True
        with suppress(ValueError):
            if ip_address(host) in ip_network(name, strict=False):
                return True
    return False


def _parse_proxy(text: str, origin: str) -> Proxy:
    # Its text, and what urlsplit says of it, may hold a password: neither is part of an error.
    if "://" not in text:
        text = f"http://{text}"
    scheme, _, rest = text.partition("://")
    if scheme not in ("http", "https"):
        raise ValueError(f"{origin}: only proxies of http:// and https:// can be used")
    user, _, place = rest.rpartition("@")
    try:
        address = parse_address(f"{scheme}://{place}")
        parts = urlsplit(f"{scheme}://{user}@host") if user else None
    except ValueError:
        address, parts = Address(""), None
    if address.scheme != scheme or address.path:
        raise ValueError(f"{origin}: a proxy is http://user:password@host:port")
    if parts is None or parts.username is None:
        return Proxy(address)
    name = unquote_to_bytes(parts.username)
    if b":" in name:
        raise ValueError(f"{origin}: the name of a user has no colon")
    secret = unquote_to_bytes(parts.password or "")
    return Proxy(address, f"Basic {b64encode(name + b':' + secret).decode()}")
