# Declarations have no bodies, which mypy accepts only from protocols and abstract methods.
# mypy: disable-error-code="empty-body"
"""What type checkers see of a service: exactly the types that its author wrote."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, assert_type

from druvarpc.service import (
    Cardinality,
    Method,
    Service,
    implementation_of,
    methods_of,
    rpc,
    wire_name_of,
)


@dataclass(frozen=True)
class Chunk:
    digest: bytes
    data: bytes


class Vault(Service, name="backup.Vault"):
    @rpc(idempotent=True)
    async def missing(self, digests: list[bytes], limit: int = 10) -> list[int]: ...

    @rpc
    async def put(self, chunk: Chunk) -> int: ...

    @rpc
    async def upload(self, pieces: AsyncIterator[bytes]) -> int: ...

    @rpc
    def download(self, digests: list[bytes]) -> AsyncGenerator[bytes, None]: ...

    @rpc()
    def sync(self, have: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]: ...


class MyVault(Vault):
    async def put(self, chunk: Chunk) -> int:
        return len(chunk.data)

    async def download(self, digests: list[bytes]) -> AsyncGenerator[bytes, None]:
        for digest in digests:
            yield digest


async def calls_have_the_declared_types(vault: Vault, pieces: AsyncIterator[bytes]) -> None:
    assert_type(await vault.missing([b""]), list[int])
    assert_type(await vault.missing([b""], limit=3), list[int])
    assert_type(await vault.put(Chunk(b"", b"")), int)
    assert_type(await vault.upload(pieces), int)
    assert_type(vault.download([b""]), AsyncGenerator[bytes, None])
    assert_type(vault.sync(pieces), AsyncGenerator[bytes, None])
    unawaited: Coroutine[Any, Any, int] = vault.put(Chunk(b"", b""))
    await unawaited


async def wrong_calls_are_found(vault: Vault) -> None:
    # mypy reports an ignore that nothing needs, so each of these is an error that was found.
    await vault.put(b"")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await vault.put()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await vault.missing([], size=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def tables_have_types(vault: Vault, method: Method) -> None:
    assert_type(methods_of(Vault), Mapping[str, Method])
    assert_type(methods_of(MyVault), Mapping[str, Method])
    assert_type(wire_name_of(MyVault), str)
    assert_type(implementation_of(vault, method), Callable[..., Any] | None)
    assert_type(method.cardinality, Cardinality)
    assert_type(method.cardinality.client_streaming, bool)
    assert_type(method.decode_call(b""), list[Any])
    assert_type(method.encode_response(0), bytes)


def test_rpc_gives_back_the_function_itself() -> None:
    async def put(self: Service, chunk: Chunk) -> int:
        return 0

    assert rpc(put) is put
    assert rpc(idempotent=True)(put) is put
