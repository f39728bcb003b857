"""TLS over another transport.

`TLSTransport` is between a connection and another transport, with OpenSSL's memory buffers in
between (`ssl.SSLObject`), so that it keeps to the contract of `Transport`: it writes without
waiting. What the other transport doesn't take of a record that has been encrypted waits in
`_unsent` and goes before anything else; as long as something waits there nothing more is
encrypted, so that it is never more than two `CHUNK`s. Where all of the caller's bytes have been
encrypted and some of that waits, an empty buffer is what is "left" to send: so the caller comes
back.
"""

import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

from druvarpc.peers import Peer, certificate_of
from druvarpc.tls import Role, explain
from druvarpc.transports import Buffer, Transport

__all__ = ["TLSTransport"]

# A record holds at most so many bytes: one read of OpenSSL's yields no more.
RECORD: Final = 16 * 1024
# Buffers below this are joined before they are encrypted: a record of its own costs more.
SMALL: Final = 2048
# What is encrypted at once. It can't be overtaken any more, and is held until it has been sent.
CHUNK: Final = 64 * 1024
# A peer can make OpenSSL answer (keys to be renewed, alerts). More than this waits for no peer.
MAX_ANSWERS: Final = 64 * 1024
# What is left to send if nothing is but what was encrypted before.
_NOTHING: Final[Sequence[Buffer]] = (b"",)


class TLSTransport:
    """TLS over another transport, which is this one's from now on.

    `handshake` comes before anything else.

    Args:
        inner: carries what is encrypted.
        context: of this end.
        role: of this end.
        server_name: that the server must prove to have, for a client.

    Attributes:
        protocol: what was negotiated by ALPN, if anything.
    """

    __slots__ = (
        "_ended",
        "_ending",
        "_failure",
        "_incoming",
        "_inner",
        "_outgoing",
        "_secured",
        "_unread",
        "_unsent",
        "peer",
        "protocol",
        "who",
    )

    def __init__(
        self,
        inner: Transport,
        context: ssl.SSLContext,
        role: Role,
        server_name: str | None = None,
    ) -> None:
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._secured = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=role == "server",
            server_hostname=server_name,
        )
        self._unsent: Sequence[Buffer] = ()
        self._unread = b""
        self._ended = False
        self._ending = False
        self._failure: trio.BrokenResourceError | None = None
        self.peer = inner.peer
        self.who = inner.who
        self.protocol: str | None = None

    async def handshake(self) -> None:
        """Agree on keys and prove identities; cancelled, the connection is of no use.

        Raises:
            trio.BrokenResourceError: that failed; the message says why.
            trio.ClosedResourceError: this end was closed.
        """
        while True:
            try:
                self._secured.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush_all()
                await self._fill()
            except ssl.SSLError as error:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    self._flush()  # tell the peer, if it listens
                raise _broken(error) from error
            else:
                break
        await self._flush_all()
        self.protocol = self._secured.selected_alpn_protocol()
        self.who = Peer(
            self._inner.who.address, certificate_of(self._secured), self._inner.who.credentials
        )
        # What the peer has sent behind its handshake is not to wait for what comes next.
        self._unread = self._decrypt()

    @property
    def write_size(self) -> int:
        """See `Transport`."""
        return self._inner.write_size

    def hold_back(self, gentle: bool) -> None:
        """See `Transport`."""
        self._inner.hold_back(gentle)

    def unread(self, data: bytes) -> None:
        """Let the next `receive` return this, which an earlier one has read too much."""
        self._unread = data + self._unread

    # Reading.

    async def receive(self) -> bytes:
        """See `Transport`."""
        if self._unread:
            await trio.lowlevel.checkpoint()
            data, self._unread = self._unread, b""
            return data
        while not self._ended:
            # All that had come has been decrypted, so that there is nothing to read but from below.
            if self._failure is not None:
                raise self._failure  # what came before it has been handed on
            if self._ending:
                self._flush()
            await self._fill()
            if data := self._decrypt():
                return data
        await trio.lowlevel.checkpoint()
        return b""

    async def _fill(self) -> None:
        data = await self._inner.receive()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _decrypt(self) -> bytes:
        """Return what the records that have come hold, and note their end."""
        read, incoming = self._secured.read, self._incoming
        records: list[bytes] = []
        try:
            # OpenSSL takes from the buffer what a record needs; of an empty one nothing is left.
            while incoming.pending or incoming.eof:
                data = read(RECORD)
                if not data:
                    self._ended = True
                    break
                records.append(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True  # this end has sent its own
        except ssl.SSLError as error:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._flush()  # tell the peer, if it listens
            self._failure = _broken(error)
            self._failure.__cause__ = error
            if not records:
                raise self._failure from error
        if self._failure is None and self._outgoing.pending:
            self._answer()
        return records[0] if len(records) == 1 else b"".join(records)

    def _answer(self) -> None:
        """Send what OpenSSL has to say of its own accord."""
        self._flush()
        if sum(map(len, self._unsent)) > MAX_ANSWERS + CHUNK:
            raise trio.BrokenResourceError("the peer asks for much in TLS, and takes nothing")

    # Writing.

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Transport`."""
        if self._unsent and not self._flush():
            return buffers or _NOTHING
        if sum(map(len, buffers)) <= RECORD:
            self._write(b"".join(buffers))
            return () if self._flush() else _NOTHING
        rest = buffers
        while rest:
            rest = self._encrypt(rest)
            if not self._flush():
                return rest or _NOTHING
        return ()

    def _encrypt(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Encrypt `CHUNK` bytes or a little more; return the rest."""
        size = 0
        small: list[Buffer] = []
        rest: Sequence[Buffer] = ()
        for index, buffer in enumerate(buffers):
            taken = buffer
            if len(buffer) > CHUNK:
                view = memoryview(buffer)
                taken, rest = view[:CHUNK], [view[CHUNK:], *buffers[index + 1 :]]
            elif size + len(buffer) >= CHUNK:
                rest = buffers[index + 1 :]
            size += len(taken)
            if len(taken) <= SMALL:
                small.append(taken)
            else:
                if small:
                    self._write(b"".join(small))
                    small.clear()
                self._write(taken)
            if size >= CHUNK:
                break
        if small:
            self._write(b"".join(small))
        return rest

    def _write(self, data: Buffer) -> None:
        if data:
            try:
                self._secured.write(data)
            except ssl.SSLError as error:
                raise _broken(error) from error

    def _flush(self) -> bool:
        """Send what was encrypted; return whether all of it went."""
        unsent = self._unsent
        if self._outgoing.pending:
            unsent = [*unsent, self._outgoing.read()]
        self._unsent = unsent
        if unsent:
            self._unsent = self._inner.send_nowait(unsent)
        if self._ending and not self._unsent:
            self._ending = False
            self._inner.send_eof()
        return not self._unsent

    async def _flush_all(self) -> None:
        while not self._flush():
            await self._inner.wait_writable()

    async def wait_writable(self) -> None:
        """See `Transport`."""
        await self._inner.wait_writable()

    def has_room(self) -> bool:
        """See `Transport`."""
        return not self._unsent and self._inner.has_room()

    def send_eof(self) -> None:
        """See `Transport`."""
        try:
            self._secured.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's end is still to come
        except ssl.SSLError as error:
            raise _broken(error) from error
        self._ending = True
        self._flush()

    def close(self) -> None:
        """See `Transport`."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._flush()  # TLS's end, if there was no room for it
        self._inner.close()


def _broken(error: ssl.SSLError) -> trio.BrokenResourceError:
    return trio.BrokenResourceError(f"TLS: {explain(error)}")
