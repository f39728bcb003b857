"""Who calls, and what they may: `authenticate`, `authorize`, tokens."""

import logging
import math
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import druvarpc
from druvarpc import (
    Caller,
    ConnectionLost,
    CurrentCall,
    Identity,
    Limits,
    RpcError,
    Status,
    Token,
    authorize,
    current_call,
)
from druvarpc.client import connect_to
from druvarpc.dialing import Target, Terms
from druvarpc.protocol import Connection, Reference, RepliesReceived, Stream
from druvarpc.protocol.frames import CALLS, encode_auth, frame, pack
from druvarpc.server import Server
from druvarpc.testing import Link, connected
from druvarpc.transports import Transport, memory_transports
from tests.io.services import ClosedGate, Gate, MemoryVault, Vault, served
from tests.io.test_interceptors import CALLS as MADE
from tests.io.test_interceptors import all_calls, download, exchange, upload

SECRET = "s3cret-t0ken"


class Door:
    """An `authenticate`: tokens are "name" or "name:seconds".

    Attributes:
        asked: what it was asked for.
        opened: until that is set, it waits.
    """

    def __init__(self, *, opened: bool = True) -> None:
        self.asked: list[str | None] = []
        self.callers: list[Caller] = []
        self.running = 0
        self.most = 0
        self.opened = trio.Event()
        if opened:
            self.opened.set()

    async def __call__(self, caller: Caller) -> object:
        self.asked.append(caller.token)
        self.callers.append(caller)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.opened.wait()
        finally:
            self.running -= 1
        if caller.token is None or caller.token.startswith("bad"):
            raise RpcError(Status.UNAUTHENTICATED, "who are you?", {"ask": "for a token"})
        name, _, seconds = caller.token.partition(":")
        return Identity(name, float(seconds)) if seconds else name


class Who(druvarpc.Service):
    @druvarpc.rpc
    async def am_i(self, note: str = "") -> str: ...

    @druvarpc.rpc
    async def administer(self) -> str: ...

    @druvarpc.rpc
    def watch(self, count: int) -> AsyncIterator[str]: ...

    @druvarpc.rpc
    async def bulk(self, data: bytes) -> str: ...


def is_admin(call: CurrentCall) -> bool:
    return call.identity == "admin"


class MyWho(Who):
    def __init__(self) -> None:
        self.ran: list[str] = []

    async def am_i(self, note: str = "") -> str:
        self.ran.append(note)
        return f"{current_call().identity}"

    @authorize(is_admin)
    async def administer(self) -> str:
        self.ran.append("administer")
        return "done"

    async def watch(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield f"{current_call().identity}"

    async def bulk(self, data: bytes) -> str:
        return f"{current_call().identity} {len(data)}"


# A client in bytes, to send AUTH and calls in any order.


class RawClient:
    """A client's core whose frames the test orders itself."""

    def __init__(self, transport: Transport) -> None:
        self.core = Connection("client", now=trio.current_time())
        self.transport = transport
        self.replies: dict[int, tuple[bytes | None, Status, bool]] = {}
        self.results: list[Any] = []

    def send(self) -> None:
        unsent = self.transport.send_nowait(self.core.data_to_send(trio.current_time(), 2**30))
        assert not unsent, "let the server read first"

    def authenticate(self, token: str) -> None:
        self.core.authenticate(token)
        self.send()

    def call(self, method: str, *arguments: Any, **options: Any) -> Stream:
        call = Stream(f"Who.{method}", pack(list(arguments)), **options)
        self.core.call(call, trio.current_time())
        self.send()
        return call

    async def settle(self) -> None:
        """Wait for the server's settings, before which few calls go out."""
        self.core.receive_data(await self.transport.receive(), trio.current_time())
        assert self.core.next_event() is not None

    async def end(self) -> None:
        """Wait until the server has closed the connection."""
        while await self.transport.receive():
            pass

    async def reply_to(self, call: Stream) -> tuple[Any, Status, bool]:
        while call.id not in self.replies:
            data = await self.transport.receive()
            assert data, "the server closed the connection"
            self.core.receive_data(data, trio.current_time())
            while (event := self.core.next_event()) is not None:
                if isinstance(event, RepliesReceived):
                    for stream, payload, outcome in event.replies:
                        status = Status.OK if outcome is None else outcome.status
                        started = outcome is not None and outcome.not_started
                        self.replies[stream.id] = (payload, status, started)
            self.send()
        return self.replies[call.id]

    async def text(self, call: Stream) -> str:
        payload, status, _ = await self.reply_to(call)
        assert status is Status.OK, status
        assert payload is not None
        return payload[1:].decode()


@pytest.fixture
async def raw(nursery: trio.Nursery) -> Callable[..., RawClient]:
    """Connect a raw client to a server with an `authenticate`."""

    def connect(door: Any, service: Any = None, limits: Limits = Limits()) -> RawClient:
        near, far = memory_transports()
        server = Server([service or MyWho()], limits, authenticate=door)
        nursery.start_soon(server.serve_transport, far)
        return RawClient(near)

    return connect


# The identity.


async def test_the_identity_is_what_authenticate_says_asked_once_a_connection():
    door = Door()
    async with connected([MyWho()], token="me", authenticate=door) as client:
        who = client.stub(Who)
        assert [await who.am_i() for _ in range(3)] == ["me"] * 3
        assert [name async for name in who.watch(2)] == ["me", "me"]
        assert await who.bulk(bytes(100_000)) == "me 100000"
        async with client.club() as club:
            replies = [club.call(who.am_i), club.call(who.am_i)]
        assert [reply.value for reply in replies] == ["me", "me"]
    assert door.asked == ["me"]
    assert door.callers[0].address == "memory"


@all_calls
async def test_over_real_sockets(make, answer, nursery):
    door = Door()

    async def serve(task_status: trio.TaskStatus[druvarpc.Server]) -> None:
        await druvarpc.serve(
            [MemoryVault()], "tcp://127.0.0.1:0", authenticate=door, task_status=task_status
        )

    server = await nursery.start(serve)
    async with druvarpc.connect(server.addresses[0], token="me", connections=2) as client:
        assert await make(client.stub(Vault)) == answer
    async with druvarpc.connect(server.addresses[0]) as client:
        with pytest.raises(RpcError, match="UNAUTHENTICATED: who are you"):
            await make(client.stub(Vault))
    assert door.asked == ["me", None]
    assert door.callers[0].address.startswith("tcp://127.0.0.1:")


@all_calls
async def test_without_a_good_token_no_call_is_begun(make, answer):
    class Watched(MemoryVault):
        async def add(self, a: int, b: int = 1) -> int:
            raise AssertionError("it was begun")

    door = Door()
    for token in (None, "bad"):
        async with connected([Watched()], token=token, authenticate=door) as client:
            for _ in range(3):
                with pytest.raises(RpcError, match="UNAUTHENTICATED: who are you") as caught:
                    await make(client.stub(Vault))
                assert caught.value.not_started
                assert caught.value.details == {"ask": "for a token"}
    assert door.asked == [None, "bad"], "a refusal is kept"


async def test_without_authenticate_there_is_no_identity():
    async with connected([MyWho()], token="me") as client:
        assert await client.stub(Who).am_i() == "None"


async def test_a_server_that_takes_less_metadata_than_go_with_the_token(autojump_clock, nursery):
    """Nothing is left of the attempts to connect to it."""
    server = Server([MyWho()], Limits(max_metadata=8192), authenticate=Door())
    dials = 0

    async def dial() -> Transport:
        nonlocal dials
        dials += 1
        near, far = memory_transports()
        nursery.start_soon(server.serve_transport, far)
        return near

    token = Token("me", metadata={"key": "v" * 12_000})
    targets, terms = [Target("memory", dial)], Terms()
    with pytest.raises(ConnectionLost, match="doesn't take the token"):
        async with connect_to(targets, terms, token=token):
            pass

    async def connect_for_ever() -> None:
        async with connect_to(targets, terms, token=token, wait_for_ready=True):
            raise AssertionError("it connected")

    async with trio.open_nursery() as connecting:
        connecting.start_soon(connect_for_ever)
        await trio.sleep(300)
        assert dials > 10
        assert server.statistics().connections <= 1
        connecting.cancel_scope.cancel()


async def test_what_the_client_sends_with_its_token():
    door = Door()
    token = Token("me", metadata={"device": "laptop", "raw": b"\0"})
    async with connected([MyWho()], token=token, authenticate=door) as client:
        await client.stub(Who).am_i()
    assert door.callers[0].metadata == {"device": "laptop", "raw": b"\0"}


async def test_many_calls_wait_for_one_run_in_their_order():
    door, service = Door(opened=False), MyWho()
    async with connected([service], token="me", authenticate=door) as client:
        who = client.stub(Who)
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(who.am_i, str(number))
                await trio.testing.wait_all_tasks_blocked()
            assert service.ran == []
            door.opened.set()
    assert door.asked == ["me"]
    assert service.ran == [str(number) for number in range(100)]


async def test_a_call_that_is_abandoned_while_it_waits_isnt_begun():
    door, service = Door(opened=False), MyWho()
    async with connected([service], token="me", authenticate=door) as client:
        with trio.move_on_after(0):
            await client.stub(Who).am_i("never sent")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Who).am_i, "abandoned")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Who).am_i, "one")
            await trio.testing.wait_all_tasks_blocked()
            door.opened.set()
    assert service.ran == ["one"]


async def test_large_arguments_that_wait_are_few_and_small_ones_many():
    door, limits = Door(opened=False), Limits(max_message=1_000_000)
    status: list[tuple[Status, bool]] = []
    answers: list[str] = []

    async def bulk() -> None:
        try:
            answers.append(await who.bulk(bytes(400_000)))
        except RpcError as error:
            status.append((error.status, error.not_started))

    async with connected(
        [MyWho()],
        token="me",
        authenticate=door,
        server_limits=limits,
        compression="zlib",
        retry=None,
    ) as client:
        who = client.stub(Who)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(bulk)
            for _ in range(100):
                nursery.start_soon(who.bulk, bytes(16_000))
            await trio.testing.wait_all_tasks_blocked()
            assert status == [(Status.RESOURCE_EXHAUSTED, True)] * 8
            door.opened.set()
        assert answers == ["me 400000"] * 2
        for _ in range(5):
            assert await who.bulk(bytes(900_000)) == "me 900000"


async def test_calls_abandoned_while_they_wait_take_no_memory():
    door, limits = Door(opened=False), Limits(max_message=1_000_000)
    async with connected(
        [MyWho()], token="me", authenticate=door, server_limits=limits, retry=None
    ) as client:
        who = client.stub(Who)
        tracemalloc.start()
        try:
            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(who.bulk, bytes(900_000))
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 3_000_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(who.bulk, bytes(900_000))
            await trio.testing.wait_all_tasks_blocked()
            door.opened.set()


async def test_authenticate_is_cancelled_with_the_connection():
    door = Door(opened=False)
    async with connected([MyWho()], token="me", authenticate=door) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Who).am_i)
            await trio.testing.wait_all_tasks_blocked()
            assert door.running == 1
            nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert door.running == 0


async def test_an_authenticate_that_takes_too_long_refuses(autojump_clock, caplog):
    door = Door(opened=False)
    async with connected([MyWho()], token=SECRET, authenticate=door, retry=None) as client:
        start = trio.current_time()
        with pytest.raises(RpcError, match="UNAVAILABLE: authentication took too long") as caught:
            await client.stub(Who).am_i()
        assert caught.value.not_started
        assert trio.current_time() - start == pytest.approx(10)
        # Asked again, but not for every call.
        with pytest.raises(RpcError, match="took too long"):
            await client.stub(Who).am_i()
        await trio.sleep(1)
        door.opened.set()
        assert await client.stub(Who).am_i() == SECRET
    assert len(door.asked) == 2
    assert "authenticate took too long" in caplog.text
    assert SECRET not in caplog.text


def by_token(caller: Caller) -> object:
    assert caller.token is not None
    return {"another": "me"}[caller.token]


def by_part_of_it(caller: Caller) -> object:
    assert caller.token is not None
    return {"another": "me"}[caller.token.removeprefix("s3")]


def by_metadata(caller: Caller) -> object:
    return {"another": "me"}[str(caller.metadata["key"])]


def with_a_cause(caller: Caller) -> object:
    try:
        return by_token(caller)
    except KeyError as error:
        raise ValueError(f"not {caller.token!r}") from error


def in_a_group(caller: Caller) -> object:
    error = ValueError(f"not {caller.token!r}")
    error.add_note(f"that is {caller.token}")
    raise ExceptionGroup(f"{caller.token}", [error, KeyError(caller.token)])


@pytest.mark.parametrize("token", [SECRET, "s3cret\\t0k'en\n"])
@pytest.mark.parametrize(
    ("look_up", "kinds"),
    [
        (by_token, ["KeyError"]),
        (by_part_of_it, ["KeyError"]),
        (by_metadata, ["KeyError"]),
        (with_a_cause, ["ValueError", "KeyError"]),
        (in_a_group, ["ExceptionGroup", "ValueError", "KeyError"]),
    ],
)
async def test_a_bug_in_authenticate_tells_the_caller_nothing_and_the_log_no_secret(
    token, look_up, kinds, caplog
):
    async def authenticate(caller: Caller) -> object:
        return look_up(caller)

    async with connected(
        [MyWho()], token=Token(token, metadata={"key": token}), authenticate=authenticate
    ) as client:
        with pytest.raises(RpcError) as caught:
            await client.stub(Who).am_i()
    assert str(caught.value) == "INTERNAL: the server failed"
    assert look_up.__name__ in caplog.text
    assert [line[:-5] for line in caplog.text.splitlines() if line.endswith(", at:")] == kinds
    assert "cret" not in caplog.text
    assert "t0k" not in caplog.text


async def test_the_log_has_not_what_is_wrong_with_a_malformed_refusal(caplog):
    async def authenticate(caller: Caller) -> object:
        error = RpcError(Status.UNAUTHENTICATED, "no")
        error.status = caller.token  # type: ignore[assignment]
        raise error

    async with connected([MyWho()], token=SECRET, authenticate=authenticate) as client:
        with pytest.raises(RpcError, match="INTERNAL: the server failed"):
            await client.stub(Who).am_i()
    assert "authenticate failed\nValueError, at:\n" in caplog.text
    assert SECRET not in caplog.text


async def test_an_error_out_of_a_nursery_of_authenticates_own_is_its_error():
    async def refuse() -> None:
        raise RpcError(Status.PERMISSION_DENIED, "not here")

    async def within(caller: Caller) -> object:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
        return "me"

    async with connected([MyWho()], token="me", authenticate=within) as client:
        with pytest.raises(RpcError, match="PERMISSION_DENIED: not here"):
            await client.stub(Who).am_i()


async def test_authenticate_that_fails_while_it_is_cancelled_ends_nothing_else(caplog):
    began = trio.Event()

    async def messy(caller: Caller) -> object:
        async def fail_at_the_end() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("cleanup")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_at_the_end)
            began.set()
            await trio.sleep_forever()

    async with served_with([MyWho()], messy) as server:
        async with druvarpc.connect(server.addresses[0], token="me") as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stub(Who).am_i)
                await began.wait()
                nursery.cancel_scope.cancel()
        async with druvarpc.connect(server.addresses[0]) as client:
            assert await client.ping() > 0


def served_with(services: Any, authenticate: Any) -> Any:
    @asynccontextmanager
    async def serve() -> Any:
        async with trio.open_nursery() as nursery:
            start = partial(
                druvarpc.serve, services, "tcp://127.0.0.1:0", authenticate=authenticate
            )
            yield await nursery.start(start)
            nursery.cancel_scope.cancel()

    return serve()


async def test_an_identity_that_has_expired_is_asked_for_again(autojump_clock):
    door = Door()
    async with connected([MyWho()], token="me:60", authenticate=door) as client:
        who = client.stub(Who)
        await who.am_i()
        await trio.sleep(59)
        await who.am_i()
        assert len(door.asked) == 1
        await trio.sleep(1)
        door.opened = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(who.am_i)
            await trio.sleep(1)
            assert door.running == 1
            door.opened.set()
        assert len(door.asked) == 2


# AUTH and calls in every order.


async def test_calls_ahead_of_auths_answer_wait_and_a_second_auth_is_for_later_calls(raw):
    door = Door(opened=False)
    client = raw(door)
    client.authenticate("first")
    one = client.call("am_i")
    client.authenticate("second")
    two = client.call("am_i")
    await trio.testing.wait_all_tasks_blocked()
    door.opened.set()
    assert await client.text(two) == "second"
    assert await client.text(one) == "first"
    assert door.asked == ["first", "second"]
    assert door.most == 1


async def test_a_call_before_the_first_auth_has_not_its_identity(raw):
    client = raw(Door())
    one = client.call("am_i")
    client.authenticate("me")
    two = client.call("am_i")
    assert (await client.reply_to(one))[1:] == (Status.UNAUTHENTICATED, True)
    assert await client.text(two) == "me"


async def test_a_call_that_needs_another_keeps_the_identity_it_came_under(raw):
    """Its turn comes after the next AUTH has."""
    gate = trio.Event()

    class Slow(MyWho):
        async def am_i(self, note: str = "") -> str:
            if not note:
                await gate.wait()
            return f"{note}{current_call().identity} "

    client = raw(Door(), Slow())
    client.authenticate("user")
    first = Stream("Who.am_i", pack([""]))
    second = Stream("Who.am_i", pack([None]), references=(Reference(0, 0),))
    denied = Stream("Who.administer", pack([]))
    client.core.club([first, second, denied], trio.current_time())
    client.send()
    await trio.testing.wait_all_tasks_blocked()
    client.authenticate("admin")
    allowed = client.call("administer")
    assert await client.text(allowed) == "done"
    gate.set()
    assert await client.text(second) == "user user "
    assert (await client.reply_to(denied))[1] is Status.PERMISSION_DENIED


async def test_a_call_whose_arguments_are_on_their_way_keeps_the_identity_it_came_under(raw):
    client = raw(Door())
    client.authenticate("user")
    started = Stream("Who.bulk", pack([b"x" * 100_000]))
    client.core.call(started, trio.current_time())
    # CALLS goes out, and the arguments as data behind the next AUTH.
    buffers = client.core.data_to_send(trio.current_time(), 1)
    client.transport.send_nowait(buffers)
    await trio.testing.wait_all_tasks_blocked()
    client.transport.send_nowait([encode_auth("admin")])
    client.send()
    later = client.call("am_i")
    assert await client.text(later) == "admin"
    assert (await client.text(started)).endswith("user 100000")


async def test_auths_that_no_call_follows_ask_for_nothing_and_a_flood_is_abuse(raw):
    door = Door()
    client = raw(door)
    for number in range(1000):
        client.authenticate(f"token {number}")
    assert await client.text(client.call("am_i")) == "token 999"
    assert door.asked == ["token 999"]
    client.transport.send_nowait([encode_auth("me") * 25_000])
    await client.end()


async def test_tokens_without_end_while_authenticate_hangs(raw, autojump_clock):
    """They aren't all kept: of most of the calls that come after them, none is begun."""
    door, service = Door(opened=False), MyWho()
    client = raw(door, service)
    client.send()
    await client.settle()
    calls = []
    for number in range(100):
        client.authenticate(f"{number} {'x' * 10_000}")
        calls.append(client.call("am_i"))
        await trio.testing.wait_all_tasks_blocked()
    door.opened.set()
    answers = [(await client.reply_to(call))[1:] for call in calls]
    assert answers == [(Status.OK, False)] * 16 + [(Status.RESOURCE_EXHAUSTED, True)] * 84
    assert (door.most, len(door.asked)) == (1, 16)


async def test_calls_without_end_while_authenticate_hangs(raw, autojump_clock):
    """No more than `max_calls` are kept, all are answered in time, and no handler has run."""
    door, service = Door(opened=False), MyWho()
    client = raw(door, service, Limits(max_calls=500))
    calls = []
    for _ in range(100):
        for _ in range(1000):
            call = Stream("Who.am_i", pack([]))
            client.core.call(call, trio.current_time())
            calls.append(call)
    client.send()
    await trio.testing.wait_all_tasks_blocked()
    start = trio.current_time()
    with trio.fail_after(3600):
        for call in calls:
            assert (await client.reply_to(call))[1:] == (Status.UNAVAILABLE, True)
    assert service.ran == []
    assert door.most == 1
    # Within one handshake timeout: the refusal is kept for a second, in which all others come.
    assert trio.current_time() - start <= 2 * Limits().handshake_timeout + 1


async def test_a_client_that_ignores_the_limit_of_calls_meanwhile_is_closed(raw):
    door = Door(opened=False)
    client = raw(door, limits=Limits(max_calls=100))
    for first in range(1, 2000):
        item = ["Who.am_i" if first == 1 else 0, 0, pack([])]
        client.transport.send_nowait([frame(CALLS, pack([item]), id=first)])
    await trio.testing.wait_all_tasks_blocked()
    await client.end()
    assert door.running == 0


# Authorisation.


class Guarded(druvarpc.Service):
    @druvarpc.rpc
    async def read(self, key: str) -> str: ...

    @authorize(lambda call: call.identity != "guest")
    @druvarpc.rpc
    async def write(self, key: str) -> str: ...

    @druvarpc.rpc
    def list(self) -> AsyncIterator[str]: ...

    @druvarpc.rpc
    async def load(self, keys: AsyncIterator[str]) -> int: ...


async def knows(call: CurrentCall) -> bool:
    await trio.lowlevel.checkpoint()
    return call.identity != "stranger"


@authorize(knows)
class MyGuarded(Guarded):
    def __init__(self) -> None:
        self.ran: list[str] = []

    async def read(self, key: str) -> str:
        self.ran.append(f"read {key}")
        return key

    @authorize(lambda call: call.arguments[0] != "forbidden")
    async def write(self, key: str) -> str:
        self.ran.append(f"write {key}")
        return key

    async def list(self) -> AsyncIterator[str]:
        self.ran.append("list")
        yield "key"

    async def load(self, keys: AsyncIterator[str]) -> int:
        self.ran.append("load")
        return len([key async for key in keys])


async def refused(awaitable: Any) -> bool:
    try:
        await awaitable
    except RpcError as error:
        if error.status is not Status.PERMISSION_DENIED:
            raise
        return True
    return False


async def keys() -> AsyncIterator[str]:
    yield "key"


async def first_of(items: Any) -> Any:
    async with aclosing(items):
        return await anext(items)


async def all_refused(guarded: Guarded) -> list[bool]:
    return [
        await refused(guarded.read("key")),
        await refused(guarded.write("key")),
        await refused(guarded.write("forbidden")),
        await refused(first_of(guarded.list())),
        await refused(guarded.load(keys())),
    ]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("stranger", [True] * 5),
        ("guest", [False, True, True, False, False]),
        ("friend", [False, False, True, False, False]),
    ],
)
async def test_predicates_on_methods_and_classes_must_all_hold(token, expected):
    service = MyGuarded()
    async with connected([service], token=token, authenticate=Door()) as client:
        guarded = client.stub(Guarded)
        assert await all_refused(guarded) == expected
        async with client.club(raise_errors=False) as club:
            replies = [
                club.call(guarded.read, "key"),
                club.call(guarded.write, "key"),
                club.call(guarded.write, "forbidden"),
            ]
        assert [reply.error is not None for reply in replies] == expected[:3]
        async with client.club(raise_errors=False) as club:
            one = club.call(guarded.read, "forbidden")
            uses = club.call(guarded.write, one)
        assert uses.error is not None
    allowed = expected.count(False)
    assert len(service.ran) == allowed + expected[:3].count(False) + (not expected[0])


async def test_overriding_takes_no_predicate_away():
    class Looser(MyGuarded):
        async def write(self, key: str) -> str:
            return key

    async with connected([Looser()], token="guest", authenticate=Door()) as client:
        assert await refused(client.stub(Guarded).write("key"))


async def test_arguments_that_dont_fit_are_none_of_the_business_of_who_may_not_call():
    async with connected([MyGuarded()], token="stranger", authenticate=Door()) as client:
        assert await refused(client.stub(Guarded).read(7))  # type: ignore[arg-type]


async def test_a_predicate_that_fails_refuses(caplog):
    class Broken(MyWho):
        @authorize(lambda call: call.identity.admin)  # type: ignore[attr-defined]
        async def am_i(self, note: str = "") -> str:
            raise AssertionError("it was begun")

    async with connected([Broken()]) as client:
        with pytest.raises(RpcError, match="INTERNAL"):
            await client.stub(Who).am_i()
    assert "AttributeError" in caplog.text


async def test_the_log_has_not_what_a_predicate_says(caplog):
    async def knows(call: CurrentCall) -> bool:
        return {"another": True}[str(call.metadata["key"])]

    class Keyed(MyWho):
        @authorize(knows)
        async def am_i(self, note: str = "") -> str:
            raise AssertionError("it was begun")

    async with connected([Keyed()]) as client:
        with pytest.raises(RpcError) as caught:
            await client.stub(Who, metadata={"key": SECRET}).am_i()
    assert str(caught.value) == "INTERNAL: the server failed"
    assert "Who.am_i: a predicate failed\nKeyError, at:\n" in caplog.text
    assert "in knows" in caplog.text
    assert SECRET not in caplog.text


async def test_interceptors_run_around_what_authorises():
    seen: list[str] = []

    async def look(call: CurrentCall, proceed: druvarpc.Proceed) -> Any:
        try:
            return await proceed()
        except RpcError as error:
            seen.append(f"{call.identity}: {error}")
            raise

    async with connected(
        [MyWho()], token="me", authenticate=Door(), server_interceptors=[look]
    ) as client:
        assert await refused(client.stub(Who).administer())
    assert seen == ["me: PERMISSION_DENIED: Who.administer: not allowed"]


# Tokens of a client.


class Source:
    """A token callable: "token 1", "token 2", each for `seconds`."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self.given = 0
        self.failure: Exception | None = None
        self.pause = 0.0
        self.running = 0
        self.most = 0

    async def __call__(self) -> Token:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.pause)
        finally:
            self.running -= 1
        if self.failure is not None:
            raise self.failure
        self.given += 1
        return Token(f"token {self.given}", self.seconds)


@pytest.mark.parametrize("source", ["me", Token("me"), lambda: "me", lambda: Token("me")])
async def test_a_token_is_a_text_or_what_returns_one(source):
    async with connected([MyWho()], token=source, authenticate=Door()) as client:
        assert await client.stub(Who).am_i() == "me"


async def test_a_token_is_refreshed_ahead_of_its_expiry_on_every_connection(autojump_clock):
    source, door = Source(100), Door()
    async with connected([MyWho()], token=source, authenticate=door, connections=3) as client:
        who = client.stub(Who)
        assert await who.am_i() == "token 1"
        await trio.sleep(79)
        assert source.given == 1
        await trio.sleep(2)
        assert source.given == 2
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(who.am_i)
        assert await who.am_i() == "token 2"
    assert set(door.asked) == {"token 1", "token 2"}
    assert door.asked.count("token 2") == 3


async def test_a_refresh_that_fails_is_tried_again(autojump_clock):
    source = Source(100)
    async with connected([MyWho()], token=source, authenticate=Door()) as client:
        await trio.sleep(79)
        source.failure = OSError("the issuer is away")
        await trio.sleep(10)
        # The old one still holds.
        assert await client.stub(Who).am_i() == "token 1"
        source.failure = None
        await trio.sleep(10)
        assert await client.stub(Who).am_i() == "token 2"


class Revoking(Door):
    """Takes only the token whose number is `good`."""

    good = 1

    async def __call__(self, caller: Caller) -> object:
        await super().__call__(caller)
        if caller.token != f"token {self.good}":
            raise RpcError(Status.UNAUTHENTICATED, "revoked")
        return Identity(caller.token, 10)


async def test_a_refused_token_is_fetched_anew_once_for_all_and_the_calls_made_again(
    autojump_clock,
):
    source, door, service = Source(), Revoking(), MyWho()
    async with connected([service], token=source, authenticate=door) as client:
        who = client.stub(Who)
        assert await who.am_i() == "token 1"
        await trio.sleep(11)
        door.good = 2
        source.pause = 1.0
        names: list[str] = []

        async def call() -> None:
            names.append(await who.am_i())

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(call)
        assert names == ["token 2"] * 200
        assert (source.given, source.most) == (2, 1)
        # And for the others.
        await trio.sleep(11)
        door.good = 3
        assert [name async for name in who.watch(2)] == ["token 3"] * 2
        await trio.sleep(11)
        door.good = 4
        assert [n async for n in druvarpc.windowed(who.am_i, ["a", "b", "c"])] == ["token 4"] * 3
    assert len(service.ran) == 1 + 200 + 3


async def test_a_token_that_is_refused_again_is_an_error_and_asked_for_rarely(autojump_clock):
    source, door = Source(), Revoking()
    door.good = 1000
    async with connected([MyWho()], token=source, authenticate=door) as client:
        for _ in range(50):
            with pytest.raises(RpcError, match="UNAUTHENTICATED: revoked"):
                await client.stub(Who).am_i()
        assert source.given <= 2


async def test_a_call_is_not_made_again_with_the_token_that_was_refused(autojump_clock):
    """Neither while no other is asked for, nor if that is no other."""
    source, door = Source(), Revoking()
    door.good = 1000
    for token, again in ((source, True), (lambda: "bad", False)):
        async with connected([MyWho()], token=token, authenticate=door) as client:
            who, start = client.stub(Who), trio.current_time()
            for _ in range(50):
                for call in (who.am_i, partial(first_of, who.watch(1))):
                    with pytest.raises(RpcError, match="UNAUTHENTICATED"):
                        await call()
                await trio.sleep(0.1)
            assert trio.current_time() - start < 6
            renewed = source.given - 1 if again else 0
            assert client.statistics().calls_retried == renewed
            assert client.statistics().calls_started == 100 + renewed
    assert 3 <= source.given <= 6


async def test_refused_calls_are_made_again_together_only_with_another_token(autojump_clock):
    source, door = Source(), Revoking()
    link = Link(rtt=0.2)
    async with connected([MyWho()], token=source, authenticate=door, link=link) as client:
        who = client.stub(Who)
        assert await who.am_i() == "token 1"
        door.good = 1000
        await trio.sleep(11)
        for count, sent in ((2, 2), (1, 1)):
            before = client.statistics().calls_started

            async def call() -> None:
                with pytest.raises(RpcError, match="UNAUTHENTICATED"):
                    await who.am_i()

            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(call)
            assert source.given == 2, count
            assert client.statistics().calls_started - before == 100 * sent


async def test_a_call_that_the_last_token_was_refused_for_has_the_one_that_came_meanwhile(
    autojump_clock,
):
    source, door = Source(100), Revoking()
    link = Link(rtt=0.4)
    async with connected([MyWho()], token=source, authenticate=door, link=link) as client:
        who = client.stub(Who)
        assert await who.am_i() == "token 1"
        door.good = 2
        await trio.sleep_until(79.9)
        assert source.given == 1
        assert await who.am_i() == "token 2"
        assert (source.given, client.statistics().calls_retried) == (2, 1)


async def test_a_fixed_token_that_expires_is_an_error_of_what_needs_it(autojump_clock):
    link = Link(rtt=0.01)
    token = Token("me", expires_in=5)
    async with connected([MyWho()], token=token, authenticate=Door(), link=link) as client:
        who = client.stub(Who)
        assert await who.am_i() == "me"
        await trio.sleep(6)
        link.cut()
        await trio.sleep(0.1)
        with trio.fail_after(5):
            with pytest.raises(ConnectionLost, match="the token has expired") as lost:
                await who.am_i()
        assert lost.value.not_started


async def test_a_fixed_token_that_is_refused_is_an_error():
    async with connected([MyWho()], token="bad", authenticate=Door()) as client:
        with pytest.raises(RpcError, match="who are you"):
            await client.stub(Who).am_i()


async def test_a_token_that_cant_be_had_when_it_is_to_be_renewed_is_why_the_call_fails(
    autojump_clock,
):
    source, door = Source(), Revoking()
    async with connected([MyWho()], token=source, authenticate=door) as client:
        await client.stub(Who).am_i()
        await trio.sleep(11)
        door.good = 2
        source.failure = RpcError(Status.PERMISSION_DENIED, "you are locked out")
        with pytest.raises(RpcError, match="PERMISSION_DENIED: you are locked out"):
            await client.stub(Who).am_i()
        await trio.sleep(2)
        source.failure = ValueError(SECRET)
        with pytest.raises(
            RpcError, match=r"UNAUTHENTICATED: no token can be had: ValueError was raised$"
        ) as caught:
            await client.stub(Who).am_i()
        assert caught.value.__cause__ is source.failure


@pytest.mark.parametrize("failure", [ValueError(SECRET), RpcError(Status.ABORTED, "not now")])
async def test_connecting_without_a_token_to_be_had_fails(failure, caplog):
    caplog.set_level(logging.DEBUG)
    source = Source()
    source.failure = failure
    with pytest.raises(ConnectionLost, match=r"can't connect to memory: .*(no token|not now)"):
        async with connected([MyWho()], token=source, authenticate=Door()):
            pass
    assert SECRET not in caplog.text


async def test_a_token_that_takes_too_long_is_not_waited_for(autojump_clock):
    source = Source()
    source.pause = 1000
    with pytest.raises(ConnectionLost, match=r"no answer within 10 s|no token"):
        async with connected([MyWho()], token=source, authenticate=Door()):
            pass
    assert source.running == 0


async def test_the_token_goes_ahead_of_calls_over_a_slow_link(autojump_clock):
    door = Door()
    link = Link(rtt=0.2, bandwidth=10_000)
    async with connected([MyWho()], token="me", authenticate=door, link=link) as client:
        assert await client.stub(Who).am_i() == "me"
    assert door.asked == ["me"]


async def test_every_new_connection_sends_the_token_that_holds_then(autojump_clock):
    source, door, link = Source(100), Door(), Link(rtt=0.01)
    async with connected([MyWho()], token=source, authenticate=door, link=link) as client:
        who = client.stub(Who)
        assert await who.am_i() == "token 1"
        link.cut()
        await trio.sleep(1)
        assert await who.am_i() == "token 1"
        await trio.sleep(90)
        link.cut()
        await trio.sleep(1)
        assert await who.am_i() == "token 2"
        assert client.statistics().reconnects == 2
    assert door.asked == ["token 1", "token 1", "token 2"]


async def test_uploads_and_clubs_are_made_again_with_a_new_token(autojump_clock):
    source, door = Source(), Revoking()
    async with connected([MyWho(), MemoryVault()], token=source, authenticate=door) as client:
        who, vault = client.stub(Who), client.stub(Vault)
        for number, make in enumerate((upload, exchange, download), 2):
            await who.am_i()
            await trio.sleep(11)
            door.good = number
            assert await make(vault) == dict(MADE)[make]
        await trio.sleep(11)
        door.good = 5
        async with client.club() as club:
            one = club.call(vault.begin, "me")
            two = club.call(vault.add, one.field("id"), 1)
            three = club.call(who.am_i)
        assert (one.value.owner, two.value, three.value) == ("me", 8, "token 5")
    assert source.given == 5


async def test_interceptors_know_nothing_of_a_new_token(autojump_clock):
    source, door = Source(), Revoking()
    attempts: list[int] = []

    async def count(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
        try:
            return await proceed()
        finally:
            attempts.append(call.attempt)

    async with connected(
        [MyWho()], token=source, authenticate=door, interceptors=[count]
    ) as client:
        await client.stub(Who).am_i()
        await trio.sleep(11)
        door.good = 2
        assert await client.stub(Who).am_i() == "token 2"
        await trio.sleep(11)
        door.good = 3
        assert [name async for name in client.stub(Who).watch(1)] == ["token 3"]
    assert attempts == [1, 1, 1]


async def test_a_unix_sockets_caller_is_known_by_the_kernel(tmp_path, nursery):
    door: list[Caller] = []

    async def authenticate(caller: Caller) -> object:
        door.append(caller)
        return None if caller.credentials is None else caller.credentials.uid

    serve = partial(
        druvarpc.serve, [MyWho()], f"unix://{tmp_path}/socket", authenticate=authenticate
    )
    server: druvarpc.Server = await nursery.start(serve)
    async with druvarpc.connect(server.addresses[0]) as client:
        assert await client.stub(Who).am_i() == str(os.getuid())
    assert door[0].token is None
    assert door[0].certificate is None


@pytest.mark.parametrize("token", ["x" * 16_385, 7, Token])
async def test_what_is_no_token(token):
    with pytest.raises((ValueError, TypeError, ConnectionLost)):
        async with connected([MyWho()], token=token, authenticate=Door()) as client:
            await client.stub(Who).am_i()


def test_lifetimes_are_positive():
    for kind in (Token, Identity):
        with pytest.raises(ValueError, match="more than 0"):
            kind("x", 0)
        with pytest.raises(ValueError, match="more than 0"):
            kind("x", math.nan)


async def test_secrets_are_in_no_repr_and_no_log(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    callers: list[Caller] = []
    calls: list[str] = []

    async def authenticate(caller: Caller) -> object:
        callers.append(caller)
        if len(callers) > 1:
            raise RpcError(Status.UNAUTHENTICATED, "no")
        return Identity("me", 1e-9)

    async def look(call: druvarpc.OutgoingCall, proceed: druvarpc.Proceed) -> Any:
        calls.append(repr(call))
        return await proceed()

    token = Token(SECRET, metadata={"password": SECRET})
    async with served_with([MyWho()], authenticate) as server:
        async with druvarpc.connect(
            server.addresses[0], token=lambda: token, interceptors=[look]
        ) as client:
            who = client.stub(Who)
            await who.am_i()
            with pytest.raises(RpcError) as caught:
                await who.am_i()
            shown = [repr(one) for one in (client, who, who.am_i, server, caught.value, token)]
            shown += [repr(callers[0]), str(callers[0]), str(caught.value), *calls]
    assert callers[0].token == SECRET
    everything = " ".join((*shown, caplog.text, *capfd.readouterr()))
    assert SECRET not in everything


# A gate, so that this page's services are all used over a real socket at least once.


async def test_long_calls_go_on_when_their_identity_has_expired(autojump_clock):
    gate, door = ClosedGate(), Door()
    async with connected([gate], token="me:5", authenticate=door) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stub(Gate).enter, "one")
            await gate.until_inside()
            await trio.sleep(100)
            gate.opened.set()
    assert gate.entered == ["one"]
    async with served([ClosedGate()]) as server:
        assert server.addresses
