"""How a client comes to a transport: a socket, through a proxy, in TLS, by an upgrade of HTTP."""

import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import trio

from druvarpc import http
from druvarpc.addresses import Address, host_and_port
from druvarpc.errors import ConnectionLost
from druvarpc.peers import Peer
from druvarpc.proxies import Proxy, choose_proxy
from druvarpc.tls import HTTP, PROTOCOL, TLS, Contexts
from druvarpc.tls_transport import TLSTransport
from druvarpc.transports import SocketTransport, Transport, open_transport

__all__ = ["Route"]

_Bytes = SocketTransport | TLSTransport
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Route:
    """A way to an address, on which transports are opened.

    Args:
        address: where to.
        tls: how to encrypt, for tls and https; None for the authorities that the system trusts.
        proxy: see `choose_proxy`.
        congestion_control: that of TCP, see `check_congestion_control`; None for the default.

    Raises:
        ValueError: the arguments don't fit each other.
        OSError: a file of `tls` can't be read, or doesn't hold what it should.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: TLS | ssl.SSLContext | None = None,
        proxy: str | None = None,
        congestion_control: str | None = None,
    ) -> None:
        if address.fd is not None:
            raise ValueError(f"{address}: an inherited socket is for servers to listen on")
        if tls is not None and not address.secure:
            raise ValueError(f"tls= with {address}: TLS is for tls:// and https://")
        self._address = address
        self._congestion_control = congestion_control
        self._proxy = choose_proxy(address, proxy)
        named = tls.server_name if isinstance(tls, TLS) else None
        self._server_name = named or address.host
        self._host = _ascii(address.host) if address.scheme != "unix" else ""
        self._contexts = self._proxy_contexts = None
        if address.secure:
            protocol = HTTP if address.upgraded else PROTOCOL
            self._contexts = Contexts(tls or TLS(), "client", [protocol])
        if self._proxy is not None and self._proxy.address.secure:
            self._proxy_contexts = Contexts(TLS(), "client", [HTTP])

    async def __call__(self) -> Transport:
        """Open one; cancelled, nothing of it is left.

        Raises:
            ConnectionLost: that can't be done; no call has been started.
        """
        address, proxy = self._address, self._proxy
        reached = address if proxy is None else proxy.address
        connected = await open_transport(reached, self._congestion_control)
        transport: _Bytes = connected
        try:
            if proxy is not None:
                connected.name_peer(Peer(str(address)))
                with _failing(f"{address} by way of {proxy}"):
                    transport = await self._pass(proxy, connected)
            with _failing(str(address)):
                if self._contexts is not None:
                    transport = await _secure(transport, self._contexts, self._server_name)
                if address.upgraded:
                    default = address.port == _DEFAULT_PORTS[address.scheme]
                    host = self._host if default else host_and_port(self._host, address.port)
                    await http.upgrade(transport, host, address.path or "/")
        except BaseException:
            connected.close()
            raise
        return transport

    async def _pass(self, proxy: Proxy, connected: SocketTransport) -> _Bytes:
        """Ask a proxy to connect to the address."""
        transport: _Bytes = connected
        if self._proxy_contexts is not None:
            transport = await _secure(transport, self._proxy_contexts, proxy.address.host)
        target = host_and_port(self._host, self._address.port)
        await http.tunnel(transport, target, proxy.credentials)
        return transport


async def _secure(inner: Transport, contexts: Contexts, server_name: str) -> TLSTransport:
    secured = TLSTransport(inner, contexts.current(), "client", server_name)
    await secured.handshake()
    return secured


@contextmanager
def _failing(where: str) -> Generator[None, None, None]:
    try:
        yield
    except trio.BrokenResourceError as error:
        raise ConnectionLost(f"can't connect to {where}: {error}", not_started=True) from error


def _ascii(host: str) -> str:
    """Return a name as DNS and HTTP have it.

    Raises:
        ValueError: it can't be one.
    """
    return host if host.isascii() else host.encode("idna").decode("ascii")
