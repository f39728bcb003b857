"""Who is at the other end of a connection, as far as its transport knows."""

import socket
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ssl import SSLObject, cert_time_to_seconds
from typing import Any, Final, cast

import trio

__all__ = ["Certificate", "Peer", "UnixCredentials", "certificate_of", "credentials_of"]

_CREDENTIALS: Final = struct.Struct("3i")  # Linux' `struct ucred`


@dataclass(frozen=True, slots=True)
class Certificate:
    """The certificate that a peer has shown, and proven to have the key of.

    Attributes:
        subject: its common name, "" without one.
        issuer: the common name of who signed it, "" without one.
        dns: names of hosts.
        uri: URIs, SPIFFE ids among them.
        email: addresses of people.
        ip: numbers of hosts.
        serial: in hexadecimal.
        not_before: from when on it is valid, in UTC.
        not_after: until when.
        der: all of it.
    """

    subject: str
    issuer: str
    dns: tuple[str, ...]
    uri: tuple[str, ...]
    email: tuple[str, ...]
    ip: tuple[str, ...]
    serial: str
    not_before: datetime
    not_after: datetime
    der: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class UnixCredentials:
    """The process that connected to a Unix socket, as the kernel vouches for it.

    Attributes:
        pid: its id, from which no more than a log should follow: ids are used again.
        uid: its user.
        gid: its group.
    """

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as the transport knows.

    Attributes:
        address: such as "tcp://192.0.2.1:4711" or "unix://".
        certificate: verified by TLS; None without one.
        credentials: of a Unix socket's; None elsewhere.
    """

    address: str
    certificate: Certificate | None = None
    credentials: UnixCredentials | None = None


def certificate_of(secured: SSLObject) -> Certificate | None:
    """Return what the peer has shown, None if it has shown nothing that was verified."""
    shown = cast("dict[str, Any] | None", secured.getpeercert())
    der = secured.getpeercert(binary_form=True)
    if not shown or der is None:
        return None
    names: dict[str, list[str]] = {}
    for kind, name in shown.get("subjectAltName", ()):
        names.setdefault(kind, []).append(name)
    return Certificate(
        subject=_common_name(shown.get("subject", ())),
        issuer=_common_name(shown.get("issuer", ())),
        dns=tuple(names.get("DNS", ())),
        uri=tuple(names.get("URI", ())),
        email=tuple(names.get("email", ())),
        ip=tuple(names.get("IP Address", ())),
        serial=shown["serialNumber"],
        not_before=datetime.fromtimestamp(cert_time_to_seconds(shown["notBefore"]), UTC),
        not_after=datetime.fromtimestamp(cert_time_to_seconds(shown["notAfter"]), UTC),
        der=der,
    )


def credentials_of(connected: trio.socket.SocketType) -> UnixCredentials | None:
    """Return who is at the other end of a Unix socket, None where the kernel doesn't tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None or connected.family != socket.AF_UNIX:
        return None
    packed = connected.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    return UnixCredentials(*_CREDENTIALS.unpack(packed))


def _common_name(name: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    return next((value for part in name for key, value in part if key == "commonName"), "")
