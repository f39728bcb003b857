# Declarations have no bodies, which mypy accepts only from protocols and abstract methods.
# mypy: disable-error-code="empty-body"
"""What type checkers see of a client: stubs are services, replies and windows know their types."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import assert_type

import druvarpc
from druvarpc.testing import connected


@dataclass(frozen=True)
class Chunk:
    digest: bytes
    data: bytes


class Vault(druvarpc.Service):
    @druvarpc.rpc(idempotent=True)
    async def missing(self, digests: list[bytes], limit: int = 10) -> list[int]: ...

    @druvarpc.rpc
    async def put(self, chunk: Chunk) -> int: ...

    @druvarpc.rpc
    async def flush(self) -> None: ...

    @druvarpc.rpc
    async def upload(self, pieces: AsyncIterator[bytes]) -> int: ...

    @druvarpc.rpc
    def download(self, digests: list[bytes]) -> AsyncGenerator[bytes, None]: ...


async def a_stub_is_a_service() -> None:
    async with druvarpc.connect("tcp://127.0.0.1:7420") as client:
        assert_type(client, druvarpc.Client)
        vault = client.stub(Vault, metadata={"key": b"value"}, priority=druvarpc.Priority.BULK)
        assert_type(vault, Vault)
        assert_type(await vault.missing([b""]), list[int])
        assert_type(vault.download([b""]), AsyncGenerator[bytes, None])
        assert_type(client.statistics(), druvarpc.Statistics)
        assert_type(await client.ping(), float)
        client.stub(Vault, compress=False)
        client.stub(int)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    async with connected([Vault()], compression="auto") as client:
        assert_type(client.stub(Vault), Vault)
    druvarpc.connect("tcp://127.0.0.1:7420", compression=None)
    druvarpc.connect("", compression="gzip")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def a_reply_knows_its_type(client: druvarpc.Client, vault: Vault) -> None:
    async with client.club() as club:
        assert_type(club, druvarpc.Club)
        missing = club.call(vault.missing, [b""], limit=3)
        assert_type(missing, druvarpc.Reply[list[int]])
        put = club.call(vault.put, missing)
        assert_type(put, druvarpc.Reply[int])
        assert_type(club.call(vault.flush), druvarpc.Reply[None])
        assert_type(missing[0], druvarpc.Part)
        assert_type(missing.field("a")["b"], druvarpc.Part)
        club.call(vault.download, [b""])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(missing.value, list[int])
    assert_type(put.value, int)
    assert_type(put.error, Exception | None)


async def a_window_knows_its_type(
    vault: Vault, chunks: Iterable[Chunk], later: AsyncIterable[Chunk]
) -> None:
    assert_type(druvarpc.windowed(vault.put, chunks), AsyncGenerator[int, None])
    assert_type(druvarpc.windowed(vault.put, later, window=3), AsyncGenerator[int, None])
    assert_type(
        druvarpc.windowed(vault.missing, [[b""]], ordered=False), AsyncGenerator[list[int], None]
    )
    async for size in druvarpc.windowed(vault.put, [Chunk(b"", b"")]):
        assert_type(size, int)
    druvarpc.windowed(vault.put, [b""])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def what_survives_has_types() -> None:
    async with druvarpc.connect(
        ["tcp://one:7420", "tcp://two:7420"],
        balance=druvarpc.Balance.ROUND_ROBIN,
        retry=druvarpc.Retry(attempts=2),
        breaker=druvarpc.Breaker(failures=3),
        outliers=None,
        wait_for_ready=True,
    ) as client:
        vault = client.stub(Vault, retry=None, hedge=druvarpc.Hedge(0.05), wait_for_ready=False)
        assert_type(await vault.missing([b""]), list[int])
        assert_type(client.statistics().calls_retried, int)
    druvarpc.connect("tcp://one:7420", retry=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def errors_and_calls_have_types(error: druvarpc.RpcError) -> None:
    assert_type(error.status, druvarpc.Status)
    assert_type(error.message, str)
    assert_type(error.not_started, bool)
    assert_type(error.retry_after, float | None)
    assert_type(druvarpc.current_call(), druvarpc.CurrentCall)
    assert_type(druvarpc.current_call().deadline, float)
    assert_type(druvarpc.current_call().method, str)


async def times_have_types(client: druvarpc.Client, took: list[druvarpc.CallTimes]) -> None:
    client.stub(Vault, timings=True)
    client.stub(Vault, timings=took.append)
    client.stub(Vault, timings=lambda times: times.handler > 1)
    client.stub(Vault, timings=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with druvarpc.connect("tcp://127.0.0.1:7420", timings=took.append) as other:
        assert_type(other.statistics().times, Mapping[str, druvarpc.MethodTimes])
    times = client.statistics().times["Vault.put"]
    assert_type(times.count, int)
    assert_type(times.way, float)
    assert_type(times.mean, druvarpc.CallTimes)
    assert_type(times.mean.method, str)
    count = client.statistics().clubs["Vault.put", "Vault.missing"]
    assert_type(count, druvarpc.ClubCount)
    assert_type(count.frames, int)
