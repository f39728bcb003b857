"""What a connection passes before a server speaks druvarpc's protocol with it.

In this order: the header of the PROXY protocol, where one is demanded; TLS, likewise; and then the
first byte, by which the bare protocol is told apart from HTTP, which may lead to it. A server waits
for that byte before it says anything. The client sends it without waiting, so nothing is lost.

All of this has the time of a handshake, and little when the server drains.
"""

import logging
from contextlib import suppress

import trio

from druvarpc.arrivals import Arrivals
from druvarpc.codec import printable
from druvarpc.errors import CloseCode
from druvarpc.http import Site, answer, part, respond_plainly
from druvarpc.peers import Peer
from druvarpc.protocol import Connection, Limits
from druvarpc.protocol.frames import MAGIC
from druvarpc.proxy_protocol import parse
from druvarpc.tls import Contexts
from druvarpc.tls_transport import TLSTransport
from druvarpc.transports import SocketTransport, Transport, accepted_transport

__all__ = ["Entrance"]

logger = logging.getLogger("druvarpc")

_TLS = 0x16  # a record of a handshake
_BARE = MAGIC[0]
_DEMANDS = "TLS is demanded here"


class Entrance:
    """The way in of one address.

    Args:
        site: what is told by HTTP.
        limits: of the server.
        arrivals: how long all this may take.
        contexts: of TLS, if that is demanded.
        proxied: every connection begins with a header of the PROXY protocol.
    """

    def __init__(
        self,
        site: Site,
        limits: Limits,
        arrivals: Arrivals,
        contexts: Contexts | None,
        *,
        proxied: bool,
    ) -> None:
        self._site = site
        self._limits = limits
        self._arrivals = arrivals
        self._contexts = contexts
        self._proxied = proxied

    async def admit(self, stream: trio.SocketStream) -> tuple[Transport, float] | None:
        """Return the transport to speak the protocol on, and when its handshake began.

        None if there is none: the connection has been closed. One that stays silent is admitted
        when its time is up, so that it is told so in the protocol's words.
        """
        connected = accepted_transport(stream)
        admitted = None
        try:
            admitted = await self._admit(connected)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError) as error:
            logger.debug("%s: not admitted: %s", connected.peer, printable(str(error)))
        finally:
            if admitted is None:
                connected.close()
        return admitted

    async def _admit(self, connected: SocketTransport) -> tuple[Transport, float] | None:
        began = trio.current_time()
        transport: SocketTransport | TLSTransport = connected
        ready = not (self._proxied or self._contexts)
        first = b""
        with self._arrivals.limit() as scope:
            if self._proxied:
                await _read_header(connected)
            if self._contexts is not None:
                if not await self._wants_tls(connected):
                    return None
                transport = await _secure(connected, self._contexts)
            ready = True
            first = await transport.receive()
            transport.unread(first)
        if scope.cancelled_caught:
            return (transport, began) if ready else None
        if not first:
            return None
        if _is_http(first):
            if not await answer(transport, self._site, self._arrivals):
                return None
            began = trio.current_time()  # whatever was asked before the upgrade
        return transport, began

    async def _wants_tls(self, connected: SocketTransport) -> bool:
        """Whether a connection begins with TLS; one that doesn't is told that it should."""
        first = await connected.receive()
        if first and first[0] == _TLS:
            connected.unread(first)
            return True
        if first and _is_http(first):
            await respond_plainly(connected, 400, _DEMANDS)
        elif first and first[0] == _BARE:
            now = trio.current_time()
            core = Connection("server", now=now, limits=self._limits)
            core.close(CloseCode.PROTOCOL_ERROR, _DEMANDS)
            connected.send_nowait(core.data_to_send(now))
            core.release()
            await part(connected)
        return False


async def _secure(connected: SocketTransport, contexts: Contexts) -> TLSTransport:
    secured = TLSTransport(connected, contexts.current(), "server")
    try:
        await secured.handshake()
    except trio.BrokenResourceError:
        with suppress(trio.BrokenResourceError):
            await part(connected)  # let the client read why
        raise
    return secured


def _is_http(first: bytes) -> bool:
    """Whether this is the beginning of a request: a method is in capitals."""
    return b"A" <= first[:1] <= b"Z"


async def _read_header(connected: SocketTransport) -> None:
    """Read the header of the PROXY protocol, and name the peer as it says."""
    data = b""
    while (header := parse(data)) is None:
        more = await connected.receive()
        if not more:
            raise ValueError("closed within the header of the PROXY protocol")
        data += more
    connected.unread(data[header.size :])
    if header.source is not None:
        connected.name_peer(Peer(header.source))
