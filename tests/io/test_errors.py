# mypy: disable-error-code="empty-body"
import logging

import pytest
import trio

import druvarpc
from druvarpc import RpcError, Status
from druvarpc.testing import connected
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault


class Fault(druvarpc.Service):
    @druvarpc.rpc
    async def fail(self) -> int: ...


def failing(error: BaseException) -> Fault:
    """Return a service whose handler raises `error`."""

    class MyFault(Fault):
        async def fail(self) -> int:
            raise error

    return MyFault()


async def error_of(service: druvarpc.Service) -> RpcError:
    async with connected([service]) as client:
        with pytest.raises(RpcError) as caught:
            await client.stub(Fault).fail()
    return caught.value


def records(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "druvarpc"]


@pytest.mark.parametrize("status", [status for status in Status if status != Status.OK])
async def test_the_handlers_rpc_error_arrives_as_it_is(status, caplog):
    error = await error_of(
        failing(RpcError(status, "what happened", {"code": 7, "path": [1, b"x"]}))
    )
    assert error.status is status
    assert error.message == "what happened"
    assert error.details == {"code": 7, "path": [1, b"x"]}
    assert type(error) is RpcError
    assert not records(caplog)


class Bare(RpcError):
    """Leaves out what its base sets."""

    def __init__(self) -> None:
        Exception.__init__(self, "bare")


class Odd(RpcError):
    """Has no status that there is."""

    def __init__(self) -> None:
        super().__init__(Status.ABORTED)
        self.status = "odd"  # type: ignore[assignment]


class Fine(RpcError):
    """Says that all is well."""

    def __init__(self) -> None:
        super().__init__(Status.ABORTED)
        self.status = Status.OK


@pytest.mark.parametrize("error", [Bare(), Odd(), Fine()])
async def test_a_malformed_rpc_error_is_internal_and_logged(error, caplog):
    found = await error_of(failing(error))
    assert found.status is Status.INTERNAL
    assert len(records(caplog)) == 1


async def test_an_exception_given_as_message_is_its_text():
    error = await error_of(failing(RpcError(Status.NOT_FOUND, KeyError("key"))))  # type: ignore[arg-type]
    assert error.status is Status.NOT_FOUND
    assert error.message == "'key'"


async def test_a_handler_that_ran_was_started_whatever_its_own_calls_say():
    error = await error_of(failing(RpcError(Status.UNAVAILABLE, "elsewhere", not_started=True)))
    assert error.status is Status.UNAVAILABLE
    assert not error.not_started


@pytest.mark.parametrize("details", [None, 0, "", [], {}, False, 1.5, b"bytes", [None]])
async def test_details_arrive_as_the_values_they_are(details):
    error = await error_of(failing(RpcError(Status.ABORTED, "", details)))
    assert error.details == details
    assert type(error.details) is type(details)


async def test_an_rpc_error_is_never_ok():
    with pytest.raises(ValueError, match="OK"):
        RpcError(Status.OK)


async def test_another_exception_is_internal_and_tells_nothing(caplog):
    secret = "/etc/secret"
    error = await error_of(failing(ValueError(secret)))
    assert error.status is Status.INTERNAL
    assert error.details is None
    for part in (secret, "ValueError", "Traceback", ".py", "MyFault"):
        assert part not in str(error)
        assert part not in repr(error)


async def test_the_server_logs_another_exception_once_with_its_traceback(caplog):
    error = ValueError("what went wrong")
    await error_of(failing(error))
    (record,) = records(caplog)
    assert record.levelno == logging.ERROR
    assert "Fault.fail" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert record.exc_info[2] is not None


async def test_a_logged_exception_is_not_repeated_by_the_caller(caplog):
    class Relay(Fault):
        async def fail(self) -> int:
            raise ValueError("once")

    async with connected([Relay()]) as client:
        for _ in range(3):
            with pytest.raises(RpcError):
                await client.stub(Fault).fail()
    assert len(records(caplog)) == 3


async def test_an_rpc_error_alone_in_groups_is_found(caplog):
    class Nested(Fault):
        async def fail(self) -> int:
            async def refuse() -> None:
                async with trio.open_nursery() as inner:
                    inner.start_soon(raise_not_found)

            async def raise_not_found() -> None:
                raise RpcError(Status.NOT_FOUND, "nothing here", [1])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(refuse)
                nursery.start_soon(trio.sleep_forever)
            return 0

    error = await error_of(Nested())
    assert (error.status, error.message, error.details) == (Status.NOT_FOUND, "nothing here", [1])
    assert not records(caplog)


async def test_a_group_of_several_is_internal(caplog):
    several = ExceptionGroup("several", [RpcError(Status.NOT_FOUND), ValueError("other")])
    error = await error_of(failing(several))
    assert error.status is Status.INTERNAL
    assert len(records(caplog)) == 1


@pytest.mark.parametrize("error", [AssertionError("no"), StopIteration(3), StopAsyncIteration()])
async def test_exceptions_that_python_treats_specially_are_internal_too(error, caplog):
    assert (await error_of(failing(error))).status is Status.INTERNAL


async def test_a_result_that_cannot_be_encoded_is_internal(caplog):
    class Wrong(Fault):
        async def fail(self) -> int:
            return object()  # type: ignore[return-value]

    error = await error_of(Wrong())
    assert error.status is Status.INTERNAL
    assert "object" not in error.message
    assert len(records(caplog)) == 1


async def test_a_declared_method_without_implementation():
    async with connected([MemoryVault()]) as client:
        with pytest.raises(RpcError, match=r"Vault\.missing") as caught:
            await client.stub(Vault).missing()
    assert caught.value.status is Status.UNIMPLEMENTED


async def test_a_service_that_the_server_does_not_have():
    async with connected([MemoryVault()]) as client:
        with pytest.raises(RpcError, match=r"Fault\.fail") as caught:
            await client.stub(Fault).fail()
        assert caught.value.status is Status.UNIMPLEMENTED
        with pytest.raises(RpcError) as caught:
            await client.stub(Gate).watch("me").__anext__()
        assert caught.value.status is Status.UNIMPLEMENTED
        assert await client.stub(Vault).add(1, 2) == 3


@pytest.mark.parametrize("details", [object(), {1, "a"}.__iter__(), 2**100])
async def test_details_that_cannot_be_encoded_are_left_out(details, caplog):
    error = await error_of(failing(RpcError(Status.NOT_FOUND, "gone", details)))
    assert (error.status, error.message, error.details) == (Status.NOT_FOUND, "gone", None)
    assert len(records(caplog)) == 1


async def test_details_above_the_limit(caplog):
    error = await error_of(failing(RpcError(Status.NOT_FOUND, "gone", bytes(100_000))))
    assert error.status is Status.NOT_FOUND
    assert error.message == "gone"
    assert error.details is None
    assert len(records(caplog)) == 1


async def test_a_huge_message_is_shortened():
    error = await error_of(failing(RpcError(Status.NOT_FOUND, "é" * 100_000)))
    assert error.status is Status.NOT_FOUND
    assert error.message.startswith("ééé")
    assert len(error.message.encode()) <= 1024


async def test_a_message_that_is_not_unicode(caplog):
    error = await error_of(failing(RpcError(Status.NOT_FOUND, "file \udcff")))
    assert error.status is Status.NOT_FOUND
    assert error.message.startswith("file ")


async def test_errors_are_the_callers_own_objects():
    async with connected([failing(RpcError(Status.NOT_FOUND, "one"))]) as client:
        fault = client.stub(Fault)
        with pytest.raises(RpcError) as first:
            await fault.fail()
        with pytest.raises(RpcError) as second:
            await fault.fail()
    assert first.value is not second.value


async def test_the_error_of_a_handler_that_is_being_cancelled_is_logged(caplog, autojump_clock):
    class Stubborn(Fault):
        async def fail(self) -> int:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the cleanup")

    async with connected([Stubborn(), MemoryVault()]) as client:
        with trio.move_on_after(1) as scope:
            await client.stub(Fault).fail()
        assert scope.cancelled_caught
        await trio.sleep(1)
        assert await client.stub(Vault).add(1, 2) == 3
        assert client.statistics().calls_active == 0
    assert len(records(caplog)) == 1


async def test_the_error_of_a_task_beside_cancellation_ends_nothing_else(caplog, autojump_clock):
    class Stubborn(Fault):
        async def fail(self) -> int:
            async def clean_up_badly() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("in the cleanup")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(clean_up_badly)
                await trio.sleep_forever()
            return 0

    gate = ClosedGate()
    async with connected([Stubborn(), gate]) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.stub(Gate).enter)
        await gate.until_inside()
        with trio.move_on_after(1):
            await client.stub(Fault).fail()
        await trio.sleep(1)
        assert gate.cancelled == []
        gate.opened.set()
    assert len(records(caplog)) == 1


@pytest.mark.parametrize("nested", [False, True])
async def test_a_cleanup_that_fails_with_its_connection_does_not_end_the_server(nested, caplog):
    started = trio.Event()

    class Stubborn(Fault):
        async def fail(self) -> int:
            async def clean_up_badly() -> None:
                try:
                    started.set()
                    await trio.sleep_forever()
                finally:
                    raise ValueError("in the cleanup")

            if not nested:
                await clean_up_badly()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clean_up_badly)
                await trio.sleep_forever()
            return 0

    from tests.io.services import served

    async def lose_interest(client):
        with pytest.raises(druvarpc.ConnectionLost):
            await client.stub(Fault).fail()

    async with served([Stubborn(), MemoryVault()]) as server, trio.open_nursery() as nursery:
        async with druvarpc.connect(server.addresses[0]) as client:
            nursery.start_soon(lose_interest, client)
            await started.wait()
        async with druvarpc.connect(server.addresses[0]) as client:
            assert await client.stub(Vault).add(1, 2) == 3
    assert len(records(caplog)) == 1
