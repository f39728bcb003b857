"""Tenants: who may use a server, and for what.

A tenant's devices share one store, in which what they have in common is kept once; the stores of
two tenants share nothing, so that neither what is stored for one nor how long it takes tells
another anything. Each device has a token of its own, with a role. The file of tenants has no token,
but the hash of each: it is enough to check one, and no use to whoever reads it.

A token is `ID.SECRET`. The id finds the line, and is no secret; the secret has 256 random bits, so
that one pass of a hash is enough. Whatever is wrong with a token, the same steps are taken and the
same is said.
"""

import hmac
import os
import re
import secrets
import tomllib
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path

from .errors import TenantsError
from .files import FILES

# A tenant's name is that of a directory.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_HEADER = "# Tokens of the reference backup: made by its command `tenants add`.\n"

# Stands for the hash of a token that is not known: no token has it.
_NOBODY = "0" * 64


class Role(Enum):
    """What a token allows."""

    FULL = "full"
    APPEND_ONLY = "append-only"


@dataclass(frozen=True, slots=True)
class Device:
    """Whose token it is.

    Attributes:
        tenant: The tenant's name.
        role: What the token allows.
    """

    tenant: str
    role: Role


# Who everybody is, where there is no file of tenants.
ANYBODY = Device("default", Role.FULL)


class Tenants:
    """A file of tenants. It is read again when it has changed.

    Args:
        path: The file.

    Raises:
        TenantsError: It cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] = ()
        self._tokens: dict[str, tuple[str, Device]] = {}
        self._read()

    def device(self, token: str | None) -> Device | None:
        """Returns whose token it is, or None if it is nobody's.

        Raises:
            TenantsError: The file has changed, and is none any more.
        """
        self._read()
        id = (token or "").partition(".")[0]
        known, device = self._tokens.get(id, (_NOBODY, ANYBODY))
        return device if hmac.compare_digest(_hash(token or ""), known) else None

    def _read(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            entries = tomllib.loads(self._path.read_text("utf-8")).get("token", [])
            self._tokens = {entry["id"]: _entry(entry) for entry in entries}
            self._stamp = stamp
        except OSError as error:
            raise TenantsError(f"{self._path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TenantsError(f"{self._path} is no file of tenants: {error}") from error


def add_token(path: Path, tenant: str, role: Role) -> str:
    """Makes a token for one more device of a tenant, who may be new; returns it.

    It is in no file: this is the only time it can be seen. The file is replaced whole.

    Args:
        path: The file of tenants, made if it does not exist.
        tenant: The tenant's name: up to 63 of a-z, 0-9, dots, underscores and dashes.
        role: What the token allows.

    Raises:
        TenantsError: The name is none, or the file cannot be used.
    """
    if not _NAME.fullmatch(tenant):
        raise TenantsError(f"{tenant!r} is no name for a tenant: a-z, 0-9, '.', '_' and '-'")
    if path.exists():
        Tenants(path)
    id = secrets.token_hex(8)
    token = f"{id}.{secrets.token_urlsafe(32)}"
    lines = f'\n[[token]]\nid = "{id}"\ntenant = "{tenant}"\nrole = "{role.value}"\n'
    try:
        text = path.read_text("utf-8") if path.exists() else _HEADER
        FILES.replace(path, f'{text}{lines}hash = "{_hash(token)}"\n'.encode())
    except OSError as error:
        raise TenantsError(f"{os.fspath(path)}: {error.strerror}") from error
    return token


def _entry(entry: dict[str, str]) -> tuple[str, Device]:
    tenant, known = entry["tenant"], entry["hash"]
    if not _NAME.fullmatch(tenant) or not re.fullmatch("[0-9a-f]{64}", known) or known == _NOBODY:
        raise ValueError(f"the token {entry['id']} has no tenant or no hash")
    return known, Device(tenant, Role(entry["role"]))


def _hash(token: str) -> str:
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
