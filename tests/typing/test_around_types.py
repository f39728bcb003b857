# Declarations have no bodies, which mypy accepts only from protocols and abstract methods.
# mypy: disable-error-code="empty-body"
"""What type checkers see of what is around calls: interceptors, identity, metadata, details."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import druvarpc
from druvarpc.testing import connected


@dataclass(frozen=True)
class Quota:
    left: int


class Vault(druvarpc.Service):
    @druvarpc.rpc
    async def put(self, data: bytes) -> int: ...


async def of_both(call: druvarpc.InterceptedCall, proceed: druvarpc.Proceed) -> Any:
    assert_type(call.method, str)
    assert_type(call.cardinality, druvarpc.Cardinality)
    assert_type(call.idempotent, bool)
    assert_type(call.deadline, float)
    call.wrap_requests(counted)
    call.wrap_responses(counted)
    return await proceed()


async def counted(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for item in items:
        yield item


async def of_the_client(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
    assert_type(call.metadata, dict[str, str | bytes])
    assert_type(call.trailers, Mapping[str, str | bytes])
    assert_type(call.attempt, int)
    return await proceed()


async def of_the_server(call: druvarpc.CurrentCall, proceed: druvarpc.Proceed) -> Any:
    assert_type(call.identity, object)
    assert_type(call.metadata, Mapping[str, str | bytes])
    assert_type(call.trailers, dict[str, str | bytes])
    call.send_metadata({"key": b"value"})
    return await proceed()


async def authenticate(caller: druvarpc.Caller) -> druvarpc.Identity | str:
    assert_type(caller.token, str | None)
    assert_type(caller.certificate, druvarpc.Certificate | None)
    assert_type(caller.credentials, druvarpc.UnixCredentials | None)
    return druvarpc.Identity("me", expires_in=60)


async def fetch() -> druvarpc.Token:
    return druvarpc.Token("token", expires_in=60, metadata={"key": "value"})


async def knows(call: druvarpc.CurrentCall) -> bool:
    return call.identity is not None


@druvarpc.authorize(knows)
class MyVault(Vault):
    @druvarpc.authorize(lambda call: call.identity == "me")
    async def put(self, data: bytes) -> int:
        return len(data)


async def marking_changes_no_type(vault: MyVault) -> None:
    assert_type(await vault.put(b""), int)
    assert_type(MyVault(), MyVault)


async def they_fit_where_they_belong() -> None:
    await druvarpc.serve(
        [MyVault()],
        "tcp://127.0.0.1:0",
        authenticate=authenticate,
        interceptors=[of_both, of_the_server],
    )
    await druvarpc.serve([MyVault()], "", interceptors=[of_the_client])  # type: ignore[list-item]
    async with druvarpc.connect(
        "tcp://127.0.0.1:1", token=fetch, interceptors=[of_both, of_the_client]
    ) as client:
        vault = client.stub(Vault, interceptors=[of_the_client])
        assert_type(await vault.put(b""), int)
        client.stub(Vault, interceptors=[of_the_server])  # type: ignore[list-item]
    async with (
        druvarpc.connect("", token="token"),
        druvarpc.connect("", token=lambda: "token"),
        druvarpc.connect("", token=druvarpc.Token("token")),
        connected([MyVault()], authenticate=authenticate, server_interceptors=[of_the_server]),
    ):
        pass


async def replies_have_metadata(vault: Vault) -> None:
    with druvarpc.reply_metadata() as got:
        await vault.put(b"")
    assert_type(got.metadata, Mapping[str, str | bytes])
    assert_type(got.trailers, Mapping[str, str | bytes])


def details_are_typed(error: druvarpc.RpcError) -> None:
    assert_type(error.details_as(Quota), Quota)
    assert_type(error.details_as(list[Quota]), list[Quota])
    assert_type(error.trailers, dict[str, str | bytes])
