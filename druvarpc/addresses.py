"""Addresses: what users write to say where a server is."""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final, NoReturn
from urllib.parse import urlsplit

__all__ = ["Address", "host_and_port", "parse_address"]

# Schemes of a host and a port, with the port that is meant where none is named.
_DEFAULT_PORTS: Final[dict[str, int | None]] = {
    "tcp": None,
    "tls": None,
    "http": 80,
    "https": 443,
}
_FORM: Final = (
    "an address is tcp://host:port, tls://host:port, http://host, https://host, unix:///path, or "
    "for servers fd://number"
)
_DESCRIPTOR: Final = re.compile(r"[0-9]{1,9}")
# A host goes into heads of HTTP: nothing that could mean more than a name. Letters of all scripts:
# IDNA encodes them.
_NAME: Final = re.compile(r"\w[\w.-]*")
_PATH: Final = re.compile(r"/[!-~]*")
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        scheme: "tcp", "tls", "http", "https", or "unix".
        host: name or number, for all but unix.
        port: likewise; 0 to let the system choose one to listen on.
        path: of the socket, for unix; of the upgrade, for http and https, "" where none is named.
        fd: the descriptor of a socket that listens already, in the place of a host and a port. It
            can turn out to be a Unix socket, whatever the scheme.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int | None = None

    @property
    def secure(self) -> bool:
        """Whether TLS is demanded."""
        return self.scheme in ("tls", "https")

    @property
    def upgraded(self) -> bool:
        """Whether a client asks for the protocol by HTTP."""
        return self.scheme in ("http", "https")

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        if self.fd is not None:
            prefix = "fd" if self.scheme == "tcp" else f"fd+{self.scheme}"
            return f"{prefix}://{self.fd}{self.path}"
        return f"{self.scheme}://{host_and_port(self.host, self.port)}{self.path}"


def host_and_port(host: str, port: int) -> str:
    """Return both as URLs and HTTP write them: numbers of IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> Address:
    """Return the address that `text` is.

    Raises:
        ValueError: it is none: the message says what is wrong with it.
    """
    scheme, _, rest = text.partition("://")
    if scheme == "unix":
        if not rest.startswith("/") or "?" in rest or "#" in rest or "\0" in rest:
            _refuse(text, "a Unix address is unix:///path")
        return Address("unix", path=rest)
    if scheme == "fd" or scheme.startswith("fd+"):
        return _parse_descriptor(text, scheme[3:] or "tcp", rest)
    if scheme not in _DEFAULT_PORTS:
        _refuse(text, _FORM)
    if _UNSAFE.search(text):  # urlsplit leaves some of them out without a word
        _refuse(text, "an address has no spaces and control characters")
    return _parse_host(text, scheme)


def _parse_host(text: str, scheme: str) -> Address:
    try:
        parts = urlsplit(text)
        port = _DEFAULT_PORTS[scheme] if parts.port is None else parts.port
    except ValueError as error:
        _refuse(text, str(error))
    host, path = parts.hostname or "", parts.path
    kind = "a TCP address" if scheme == "tcp" else f"an address of {scheme}"
    form = f"{kind} is {scheme}://host:port"
    if scheme in ("http", "https"):
        form = f"{kind} is {scheme}://host, {scheme}://host:port or {scheme}://host:port/path"
        path = "" if path == "/" else path
        if path and not _PATH.fullmatch(path):
            _refuse(text, form)
    elif path:
        _refuse(text, form)
    if port is None or not host or "@" in parts.netloc or "?" in text or "#" in text:
        _refuse(text, form)
    if not (_is_number(host) if ":" in host else _NAME.fullmatch(host)):
        _refuse(text, form)
    return Address(scheme, host, port, path)


def _parse_descriptor(text: str, scheme: str, rest: str) -> Address:
    number, slash, path = rest.partition("/")
    http = scheme in ("http", "https")
    if scheme not in _DEFAULT_PORTS or not _DESCRIPTOR.fullmatch(number):
        _refuse(text, "an inherited socket is fd://number, fd+tls://number or fd+http://number")
    if slash and not (http and _PATH.fullmatch(f"/{path}")):
        _refuse(text, "only fd+http://number and fd+https://number have a path")
    return Address(scheme, path=f"/{path}" if path else "", fd=int(number))


def _is_number(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def _refuse(text: str, why: str) -> NoReturn:
    raise ValueError(f"{text!r}: {why}") from None
