"""Encryption by the client: the server stores what it cannot read.

A tenant has one random master key. The server keeps it wrapped: encrypted under a key that scrypt
(RFC 7914) makes from the passphrase. Three keys are derived from the master key, one for each use:

- chunks are named by BLAKE3 keyed with the first, so that nobody who lacks it can compare a name
  with that of a known file;
- their contents are sealed with AES-256-GCM under the second, with the id as associated data: a
  chunk cannot take another's place;
- pages likewise under the third, with the ids of their chunks as associated data.

Nonces are random, 96 bits: fine for 2^32 messages of a key (NIST SP 800-38D, 8.3), which are 300 TB
of chunks of 76 KiB. The server still sees how many chunks and pages there are, how large each is
after compression, which snapshots have which chunks, snapshots' names, and when things happen.
"""

import os

import msgspec
from blake3 import blake3

from .errors import KeyRefused, PageError

# scrypt's cost: N = 2^16, r = 8, p = 1 take 64 MiB and about 0.2 s, once for each command.
COST = 1 << 16
BLOCK = 8
# What a wrapped key may ask for, since it comes from the server: 1 GiB.
MAX_COST = 1 << 20

SALT_SIZE = 16
NONCE_SIZE = 12
TAG_SIZE = 16

# What sealing adds, in bytes.
OVERHEAD = NONCE_SIZE + TAG_SIZE

_WRAPPING = b"druvarpc backup: wrapped key 1"
_CONTEXT = "druvarpc 2026-11 backup "


class Box:
    """Seals and opens messages under one key, in any number of threads.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        # Here, since importing it takes 20 ms, which a plain backup need not spend.
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)
        self._invalid = InvalidTag

    def seal(self, message: bytes | memoryview, associated: bytes) -> bytes:
        """Returns the message, encrypted and authenticated together with the associated data."""
        nonce = os.urandom(NONCE_SIZE)
        return nonce + self._cipher.encrypt(nonce, message, associated)

    def open(self, sealed: bytes | memoryview, associated: bytes) -> bytes:
        """Returns what was sealed.

        Raises:
            PageError: It is damaged, belongs elsewhere, or was sealed under another key.
        """
        if len(sealed) < OVERHEAD:
            raise PageError("too short to be encrypted")
        try:
            return self._cipher.decrypt(bytes(sealed[:NONCE_SIZE]), sealed[NONCE_SIZE:], associated)
        except self._invalid as error:
            raise PageError("damaged, or encrypted with another key") from error


class Keys:
    """What a tenant's master key gives.

    Attributes:
        id: Returns the id of a chunk with this content.
        chunks: Seals chunks.
        pages: Seals pages.
    """

    def __init__(self, master: bytes) -> None:
        self._id_key = _derived(master, "chunk ids")
        self.chunks = Box(_derived(master, "chunks"))
        self.pages = Box(_derived(master, "pages"))
        self.fingerprint = _derived(master, "fingerprint")[:8]

    def id(self, content: bytes | memoryview) -> bytes:
        """Returns the id of a chunk with this content: 32 bytes."""
        return blake3(content, key=self._id_key).digest()


def page_box(keys: Keys | None) -> Box | None:
    """Returns what seals pages, if there are keys."""
    return None if keys is None else keys.pages


class Wrapped(msgspec.Struct, array_like=True, frozen=True):
    """A master key, encrypted, as the server keeps it.

    Attributes:
        cost: scrypt's N.
        block: scrypt's r.
        salt: scrypt's salt.
        sealed: The master key, sealed under what scrypt makes of the passphrase.
    """

    cost: int
    block: int
    salt: bytes
    sealed: bytes


def new_key(passphrase: bytes, *, cost: int = COST) -> tuple[bytes, bytes]:
    """Makes a master key; returns it, and the wrapped form that may be stored anywhere."""
    master, salt = os.urandom(32), os.urandom(SALT_SIZE)
    sealed = Box(_stretched(passphrase, salt, cost, BLOCK)).seal(master, _WRAPPING)
    return master, msgspec.msgpack.encode(Wrapped(cost, BLOCK, salt, sealed))


def unwrap(wrapped: bytes, passphrase: bytes) -> bytes:
    """Returns the master key.

    Raises:
        KeyRefused: The passphrase is another one, or the wrapped key is damaged.
    """
    try:
        found = msgspec.msgpack.decode(wrapped, type=Wrapped)
    except msgspec.MsgspecError as error:
        raise KeyRefused("the server's key blob is damaged") from error
    # A server that asks for too much memory, or for too little work on a guess.
    if not COST >> 4 <= found.cost <= MAX_COST or found.cost & (found.cost - 1):
        raise KeyRefused("the server's key blob has costs that are not allowed")
    if found.block != BLOCK:
        raise KeyRefused("the server's key blob has costs that are not allowed")
    try:
        box = Box(_stretched(passphrase, found.salt, found.cost, found.block))
        return box.open(found.sealed, _WRAPPING)
    except PageError as error:
        raise KeyRefused("the passphrase is not the one that the key was made with") from error


def _stretched(passphrase: bytes, salt: bytes, cost: int, block: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=32, n=cost, r=block, p=1).derive(passphrase)


def _derived(master: bytes, use: str) -> bytes:
    return blake3(master, derive_key_context=_CONTEXT + use).digest()
