"""HTTP/1.1, by h11: how a connection becomes one of druvarpc's, and what else its port answers.

*Server.* `answer` takes a connection whose first byte is one of HTTP's, and answers requests until
one asks for `Upgrade: druvarpc/1` and gets a 101. From there on the connection is the protocol's.
What a client had sent behind that request, before it could know our answer, is no part of either
protocol: the request is refused, since whoever stands in between may take it for the next one.

*Client.* `upgrade` is the other end of that; `tunnel` asks a proxy for a connection (CONNECT).

A head is 16 KiB at most, a body nothing. Each request has the time of a handshake, or what of it a
drain leaves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Final, Protocol

import h11
import trio

from druvarpc.arrivals import Arrivals
from druvarpc.codec import printable
from druvarpc.statistics import Statistics
from druvarpc.transports import Buffer, Transport

__all__ = [
    "Rewindable",
    "Site",
    "answer",
    "metrics",
    "part",
    "respond_plainly",
    "tunnel",
    "upgrade",
]

PROTOCOL: Final = b"druvarpc/1"
MAX_HEAD: Final = 16 * 1024
# Answers before the one that counts (100, 103) that a client reads over.
MAX_INTERIM: Final = 8
# Seconds and reads that a client has to take the last answer.
GOODBYE: Final = 1.0
MAX_UNREAD: Final = 64
_TEXT: Final = "text/plain; charset=utf-8"
_METRICS: Final = "text/plain; version=0.0.4; charset=utf-8"

Headers = list[tuple[bytes, bytes]]


class Rewindable(Transport, Protocol):
    """A transport that takes back what was read too much."""

    def unread(self, data: bytes) -> None:
        """Let the next `receive` return this."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """What a server's port tells those who ask by HTTP.

    Attributes:
        name: of the server, with its version.
        path: where the upgrade is; "" for any path.
        serving: whether the server accepts calls.
        statistics: its figures.
    """

    name: str
    path: str
    serving: Callable[[], bool]
    statistics: Callable[[], Statistics]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    text: str
    kind: str = _TEXT
    headers: tuple[tuple[str, str], ...] = ()
    last: bool = False


# The server's side.


async def answer(transport: Rewindable, site: Site, arrivals: Arrivals) -> bool:
    """Answer requests; return whether one has turned the connection into one of druvarpc's.

    Otherwise it has ended, or is to be closed. From a server that drains every answer is the last:
    a connection that is kept would keep the server.

    Args:
        transport: nothing of what it carries has been read.
        site: what to tell.
        arrivals: how long each request, with its answer, may take.

    Raises:
        trio.BrokenResourceError: the connection is broken.
        trio.ClosedResourceError: this end was closed.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    upgraded = False
    while not upgraded and connection.our_state is h11.IDLE:
        # Requests that came together are no reason to let others wait.
        await trio.lowlevel.checkpoint()
        with arrivals.limit() as scope:
            upgraded = await _answer_one(connection, transport, site)
        if scope.cancelled_caught:
            return False
    if not upgraded:
        await part(transport)
    return upgraded


async def part(transport: Transport) -> None:
    """Let the last answer arrive: the kernel resets a socket that is closed with bytes unread."""
    transport.send_eof()
    with trio.move_on_after(GOODBYE):
        for _ in range(MAX_UNREAD):
            if not await transport.receive():
                return


async def respond_plainly(transport: Transport, status: int, text: str) -> None:
    """Refuse whatever is asked, without a look at it."""
    connection = h11.Connection(h11.SERVER)
    await _respond(connection, transport, _refusal(status, text), bare=False)
    await part(transport)


async def _answer_one(connection: h11.Connection, transport: Rewindable, site: Site) -> bool:
    try:
        request = await _next_event(connection, transport)
        if not isinstance(request, h11.Request):
            return False  # the end
        chosen = _choose(request, site)
        if chosen is not None and not site.serving():
            chosen = replace(chosen, last=True)
        # A body isn't read, so that nothing can follow it. Else this is the end of the request.
        if chosen is None or not chosen.last:
            await _next_event(connection, transport)
    except h11.RemoteProtocolError as error:
        request, chosen = None, _refusal(error.error_status_hint, "malformed request")
    if chosen is None:
        if not connection.trailing_data[0]:
            assert request is not None
            headers = [(b"Upgrade", PROTOCOL), (b"Connection", b"Upgrade")]
            await _send(
                connection,
                transport,
                h11.InformationalResponse(
                    status_code=101, headers=headers, reason=b"Switching Protocols"
                ),
            )
            return True
        chosen = _refusal(400, "bytes behind a request for an upgrade")
    await _respond(connection, transport, chosen, bare=request is not None and _is_head(request))
    if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
        connection.start_next_cycle()
    return False


def _is_head(request: h11.Request) -> bool:
    return request.method == b"HEAD"


def _refusal(status: int, text: str, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, text + "\n", headers=headers, last=True)


def _choose(request: h11.Request, site: Site) -> _Answer | None:
    """Return the answer to a request, None for the upgrade."""
    headers: Headers = list(request.headers)
    if request.http_version not in (b"1.0", b"1.1"):
        return _refusal(505, "only HTTP/1.1")
    if _values(headers, b"transfer-encoding") or _values(headers, b"content-length") not in (
        [],
        [b"0"],
    ):
        return _refusal(400, "requests have no body here")
    path = request.target.partition(b"?")[0].decode("ascii", "replace")
    upgrades = _values(headers, b"upgrade")
    if any(b"druvarpc" in value.lower() for value in upgrades):
        return _choose_upgrade(request, upgrades, site, path)
    if request.method not in (b"GET", b"HEAD"):
        return _Answer(405, "only GET and HEAD\n", headers=(("Allow", "GET, HEAD"),))
    if path == "/healthz":
        return _Answer(200, "ok\n") if site.serving() else _Answer(503, "draining\n")
    if path == "/metrics":
        return _Answer(200, metrics(site.statistics()), _METRICS)
    if path == site.path:
        return _refusal(426, "this is for druvarpc", ("Upgrade", PROTOCOL.decode()))
    if path == "/":
        return _Answer(200, f"{site.name}\n")
    return _Answer(404, "not found\n")


def _choose_upgrade(
    request: h11.Request, upgrades: list[bytes], site: Site, path: str
) -> _Answer | None:
    options = _values(list(request.headers), b"connection")
    if len(upgrades) > 1 or len(options) > 1:
        return _refusal(400, "one Upgrade and one Connection, please")
    if request.http_version != b"1.1" or b"upgrade" not in _tokens(options):
        return _refusal(400, "an upgrade needs HTTP/1.1 and Connection: Upgrade")
    if request.method != b"GET":
        return _refusal(405, "an upgrade is a GET", ("Allow", "GET"))
    if upgrades[0].lower() != PROTOCOL:
        return _refusal(426, f"only {PROTOCOL.decode()}", ("Upgrade", PROTOCOL.decode()))
    if site.path and path != site.path:
        return _refusal(404, "not here")
    return None


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _tokens(values: list[bytes]) -> list[bytes]:
    return [token.strip().lower() for value in values for token in value.split(b",")]


async def _respond(
    connection: h11.Connection, transport: Transport, answer: _Answer, *, bare: bool
) -> None:
    body = answer.text.encode()
    headers = [
        ("Content-Type", answer.kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        *answer.headers,
    ]
    if answer.last:
        headers.append(("Connection", "close"))
    reason = HTTPStatus(answer.status).phrase
    response = h11.Response(status_code=answer.status, headers=headers, reason=reason)
    await _send(connection, transport, response)
    if not bare:
        await _send(connection, transport, h11.Data(data=body))
    await _send(connection, transport, h11.EndOfMessage())


def metrics(figures: Statistics) -> str:
    """Return a server's figures in the text format of Prometheus, version 0.0.4."""
    rtt: dict[str, float] = {} if figures.rtt is None else {"rtt_seconds": figures.rtt}
    gauges: Mapping[str, float] = {
        "connections": figures.connections,
        "calls_active": figures.calls_active,
        "send_window_bytes": figures.send_window,
        "receive_window_bytes": figures.receive_window,
        **rtt,
    }
    counters: Mapping[str, float] = {
        "calls_started_total": figures.calls_started,
        "calls_failed_total": figures.calls_failed,
        "calls_refused_total": figures.calls_refused,
        "clubs_sent_total": figures.clubs_sent,
        "calls_clubbed_total": figures.calls_clubbed,
        "bytes_sent_total": figures.bytes_sent,
        "bytes_received_total": figures.bytes_received,
        "bytes_saved_sent_total": figures.bytes_saved_sent,
        "bytes_saved_received_total": figures.bytes_saved_received,
    }
    lines = [
        f"# TYPE druvarpc_{name} {kind}\ndruvarpc_{name} {value}\n"
        for kind, values in (("gauge", gauges), ("counter", counters))
        for name, value in values.items()
    ]
    return "".join(lines)


# The client's side.


async def upgrade(transport: Rewindable, host: str, path: str) -> None:
    """Ask for the protocol on a connection to a server of HTTP.

    Args:
        transport: the connection.
        host: as in the address, with the port.
        path: of the upgrade.

    Raises:
        trio.BrokenResourceError: the server doesn't do that, or the connection is broken.
        trio.ClosedResourceError: this end was closed.
    """
    request = h11.Request(
        method="GET",
        target=path,
        headers=[("Host", host), ("Connection", "Upgrade"), ("Upgrade", PROTOCOL.decode())],
    )
    response = await _ask(transport, request)
    if response.status_code != 101:
        raise trio.BrokenResourceError(f"answered {_status(response)} to the upgrade")
    chosen = _values(list(response.headers), b"upgrade")
    if [value.lower() for value in chosen] != [PROTOCOL]:
        raise trio.BrokenResourceError("answered with an upgrade to something else")


async def tunnel(transport: Rewindable, target: str, credentials: str | None) -> None:
    """Ask a proxy for a connection to `target`, host and port.

    Args:
        transport: the connection to the proxy.
        target: what it is to connect to.
        credentials: the value of Proxy-Authorization.

    Raises:
        trio.BrokenResourceError: the proxy doesn't do that, or the connection is broken.
        trio.ClosedResourceError: this end was closed.
    """
    headers = [("Host", target)]
    if credentials is not None:
        headers.append(("Proxy-Authorization", credentials))
    request = h11.Request(method="CONNECT", target=target, headers=headers)
    response = await _ask(transport, request)
    if not 200 <= response.status_code < 300:
        raise trio.BrokenResourceError(f"the proxy answered {_status(response)}")


async def _ask(
    transport: Rewindable, request: h11.Request
) -> h11.Response | h11.InformationalResponse:
    """Send a request and return the answer; what follows its head stays with the transport."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    await _send(connection, transport, request)
    await _send(connection, transport, h11.EndOfMessage())
    for _ in range(MAX_INTERIM):
        try:
            event = await _next_event(connection, transport)
        except h11.RemoteProtocolError as error:
            raise trio.BrokenResourceError("answered with something else than HTTP") from error
        if isinstance(event, h11.Response) or (
            isinstance(event, h11.InformationalResponse) and event.status_code == 101
        ):
            transport.unread(connection.trailing_data[0])
            return event
        if not isinstance(event, h11.InformationalResponse):
            raise trio.BrokenResourceError("closed the connection instead of an answer")
    raise trio.BrokenResourceError("answered without an end")


def _status(response: h11.Response | h11.InformationalResponse) -> str:
    reason = bytes(response.reason).decode("latin-1")
    return printable(f"{response.status_code} {reason}".strip())


# Both.


async def _next_event(connection: h11.Connection, transport: Transport) -> object:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await transport.receive())
        else:
            return event


async def _send(connection: h11.Connection, transport: Transport, event: h11.Event) -> None:
    data = connection.send(event)
    rest: list[Buffer] = [data] if data else []
    while rest := list(transport.send_nowait(rest)) if rest else []:
        await transport.wait_writable()
