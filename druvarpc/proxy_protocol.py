"""The PROXY protocol, by which a proxy for TCP says whose connection it passes on: pure.

Source: Willy Tarreau, "The PROXY protocol, versions 1 & 2" (HAProxy, doc/proxy-protocol.txt). Both
versions are a header before all else: 1 a line of text, 2 binary. `parse` takes what has come.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

from druvarpc.addresses import host_and_port

__all__ = ["Header", "parse"]

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_START: Final = struct.Struct("!12sBBH")  # signature, version and command, family, length
_WORD: Final = b"PROXY "
# The longest line, with its end (section 2.1).
_MAX_LINE: Final = 107
# Version 2 allows 64 KiB of extensions, which nobody sends: those of TLS and of clouds are short.
_MAX_LENGTH: Final = 4096
_LOCAL, _PROXY = 0x20, 0x21
# Family and protocol of version 2: what the addresses are, and where the source's port is. With
# datagrams or unspecified, the address that is known stays.
_FAMILIES: Final = {
    0x11: (socket.AF_INET, struct.Struct("!4s4sHH")),
    0x21: (socket.AF_INET6, struct.Struct("!16s16sHH")),
}
_WITHOUT_ADDRESS: Final = {0x00, 0x12, 0x22, 0x31, 0x32}


@dataclass(frozen=True, slots=True)
class Header:
    """A header.

    Attributes:
        source: the address of who connected to the proxy, such as "tcp://192.0.2.1:4711"; None if
            the proxy speaks for itself, or doesn't know.
        size: its bytes.
    """

    source: str | None
    size: int


def parse(data: bytes) -> Header | None:
    """Return the header at the beginning of a connection; None if more of it must come.

    Raises:
        ValueError: it doesn't begin with one.
    """
    if _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        return _parse_binary(data)
    if _WORD.startswith(data[: len(_WORD)]):
        return _parse_line(data)
    raise ValueError("no header of the PROXY protocol")


def _parse_line(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, _MAX_LINE)
    if end < 0:
        if len(data) >= _MAX_LINE:
            raise ValueError("PROXY: the line is too long")
        return None
    words = data[:end].decode("ascii", "replace").split(" ")
    size = end + 2
    if words[1] == "UNKNOWN":
        return Header(None, size)
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise ValueError("PROXY: malformed")
    kind = IPv4Address if words[1] == "TCP4" else IPv6Address
    if "%" in words[2] + words[3]:
        raise ValueError("PROXY: an address with a scope")  # which may be any text
    try:
        source, _ = kind(words[2]), kind(words[3])
    except AddressValueError:
        raise ValueError("PROXY: malformed address") from None
    port, _ = _port(words[4]), _port(words[5])
    return Header(f"tcp://{host_and_port(str(source), port)}", size)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and str(int(text)) == text and len(text) <= 5):
        raise ValueError("PROXY: malformed port")
    port = int(text)
    if port > 65535:
        raise ValueError("PROXY: malformed port")
    return port


def _parse_binary(data: bytes) -> Header | None:
    if len(data) < _START.size:
        return None
    _, command, family, length = _START.unpack_from(data)
    if command not in (_LOCAL, _PROXY):
        raise ValueError("PROXY: unknown version or command")
    if length > _MAX_LENGTH:
        raise ValueError("PROXY: the header is too long")
    size = _START.size + length
    known = _FAMILIES.get(family)
    if command == _PROXY and known is None and family not in _WITHOUT_ADDRESS:
        raise ValueError("PROXY: unknown family")
    if len(data) < size:
        return None
    if command == _LOCAL or known is None:
        return Header(None, size)
    kind, addresses = known
    if length < addresses.size:
        raise ValueError("PROXY: the addresses are cut off")
    source, _, port, _ = addresses.unpack_from(data, _START.size)
    return Header(f"tcp://{host_and_port(socket.inet_ntop(kind, source), port)}", size)
