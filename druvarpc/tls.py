"""TLS: its settings, and the contexts that follow from them.

`TLS` says which files; `Contexts` makes an `ssl.SSLContext` of them, and makes it anew when a file
has changed, which it looks at (a `stat` for each file) for every connection. Files that don't fit
each other, since somebody is half way through replacing them, change nothing: the context that
worked last stays in use, and the log says so, once. What encrypts is `druvarpc.tls_transport`.
"""

import logging
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["HTTP", "PROTOCOL", "TLS", "Contexts", "Role", "explain"]

logger = logging.getLogger("druvarpc")

# What is negotiated by ALPN: the bare protocol, or HTTP, which leads to it.
PROTOCOL: Final = "druvarpc/1"
HTTP: Final = "http/1.1"

Role = Literal["client", "server"]
_Stamp = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How to encrypt, for `tls=` of `connect` and `serve`: paths of PEM files.

    TLS 1.2 and newer are spoken. Files that change are read again: by a server before its next
    connection, by a client before it dials. Connections that are open go on as they began.

    Attributes:
        certificate: the chain that this end shows, its own certificate first; a server needs one, a
            client where the server asks for it.
        key: its private key, not encrypted; None if it is in the file of the certificate.
        authorities: by whom servers must have been certified, for clients; None for those that the
            system trusts.
        client_authorities: by whom clients must have been certified, for servers; None to ask for
            no certificate.
        require_client_certificate: refuse clients that show none, where they are asked for one.
        server_name: the name that a server must prove to have, for clients; None for the host in
            the address.
    """

    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    authorities: str | os.PathLike[str] | None = None
    client_authorities: str | os.PathLike[str] | None = None
    require_client_certificate: bool = True
    server_name: str | None = None

    def context(self, role: Role, protocols: Sequence[str]) -> ssl.SSLContext:
        """Return a new context.

        Raises:
            OSError: a file can't be read.
            ssl.SSLError: or doesn't hold what it should; a subclass of OSError.
        """
        if role == "server":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if self.client_authorities is not None:
                context.load_verify_locations(self.client_authorities)
                required = self.require_client_certificate
                context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if self.authorities is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(self.authorities)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Nothing of ours begins a second handshake (TLS 1.2), which costs a server much; and
        # compression before encryption tells secrets.
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(list(protocols))
        if self.certificate is not None:
            # Never ask a terminal for a passphrase.
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        return context

    def stamp(self) -> _Stamp:
        """Return what changes when a file does."""
        return tuple(
            None if path is None else _stamp_of(path)
            for path in (
                self.certificate,
                self.key,
                self.authorities,
                self.client_authorities,
            )
        )


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted")


def _stamp_of(path: str | os.PathLike[str]) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Contexts:
    """The context for the next connection.

    Args:
        tls: where it comes from; a context is used as it is, ALPN included.
        role: of this end.
        protocols: what to negotiate by ALPN.

    Raises:
        OSError: a file can't be read, or doesn't hold what it should.
        ValueError: a server has no certificate.
    """

    def __init__(self, tls: TLS | ssl.SSLContext, role: Role, protocols: Sequence[str]) -> None:
        if role == "server" and isinstance(tls, TLS) and tls.certificate is None:
            raise ValueError("tls=: a server needs a certificate")
        self._tls = tls
        self._role: Role = role
        self._protocols = protocols
        if isinstance(tls, TLS):
            self._stamp = tls.stamp()  # before the files are read: what changes after is seen
            self._context = tls.context(role, protocols)
        else:
            self._context = tls

    def current(self) -> ssl.SSLContext:
        """Return the context, of the files as they are now."""
        tls = self._tls
        if isinstance(tls, TLS) and (stamp := tls.stamp()) != self._stamp:
            self._stamp = stamp
            try:
                self._context = tls.context(self._role, self._protocols)
            except OSError as error:
                logger.error(  # noqa: TRY400 - what it was is all that there is to know
                    "the TLS files have changed and can't be used, those before stay in use: %s",
                    explain(error),
                )
        return self._context


def explain(error: OSError) -> str:
    """Return what an error of OpenSSL's, or of a file's, means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLEOFError):
        return "the peer closed the connection without TLS's end"
    reason: str | None = getattr(error, "reason", None)
    if isinstance(error, ssl.SSLError) and reason:
        return reason.lower().replace("_", " ")
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
