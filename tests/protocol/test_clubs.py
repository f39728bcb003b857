"""Explicit clubs: calls in one frame, and arguments that are results of other calls of it."""

from typing import Any

import msgpack
import pytest

from druvarpc.errors import LocalProtocolError, Status
from druvarpc.protocol import Clubbing, Limits, Outcome, Priority, Reference, Stream
from tests.protocol.pair import Pair

pack = msgpack.packb


def needs(*references: tuple[Any, ...], arguments: object = (None, None), **options: Any) -> Stream:
    """Return a call with references."""
    found = tuple(Reference(*reference) for reference in references)
    return Stream("Vault.write", pack(arguments), references=found, **options)


def begin(**options: Any) -> Stream:
    """Return a call without any."""
    return Stream("Vault.begin", b"\x90", **options)


def club(two: Pair, *calls: Stream) -> list[Stream]:
    """Submit a club and carry it over; return what arrived."""
    two.client.club(calls, two.now)
    two.run()
    return two.arrived()


def statuses(two: Pair) -> list[tuple[Stream, Status, bool]]:
    return [(call, outcome.status, outcome.not_started) for call, _, outcome in two.replies()]


def test_calls_of_a_club_run_at_once_if_nothing_keeps_them() -> None:
    two = Pair()
    arrived = club(two, begin(), begin(), begin())
    assert [call.method for call in arrived] == ["Vault.begin"] * 3
    assert two.client.clubs_sent == 1


def test_a_club_is_not_taken_apart_nor_joined() -> None:
    two = Pair({"clubbing": Clubbing(max_calls=2)})
    two.call()
    two.client.club([begin() for _ in range(4)], two.now)
    two.call()
    two.run()
    assert [len(event.calls) for event in two.server_events] == [1, 4, 1]


def test_calls_that_need_each_other_wait_until_there_is_room_for_all() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64)})
    for _ in range(60):
        two.call()
    two.run()
    first = two.arrived()
    assert club(two, begin(), *(needs((0, 0)) for _ in range(4))) == []
    two.server.reply(first[0], two.now)
    two.run()
    [begun] = two.arrived()
    two.server.reply(begun, two.now, pack(7))
    two.run()
    assert len(two.arrived()) == 4


def test_an_argument_is_the_result_of_another_call() -> None:
    two = Pair()
    [first] = club(two, begin(), needs((0, 0)))
    two.server.reply(first, two.now, pack({"id": 7}))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload) == [{"id": 7}, None]


def test_arguments_are_parts_of_one_result() -> None:
    two = Pair()
    [first] = club(two, begin(), needs((0, 0, ("ids", 1)), (1, 0, ("name",))))
    two.server.reply(first, two.now, pack({"ids": [7, 8], "name": None}))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload) == [8, None]


def test_a_call_waits_for_all_that_it_refers_to() -> None:
    two = Pair()
    first, second = club(two, begin(), begin(), needs((0, 0), (1, 1)))
    two.server.reply(second, two.now, pack(2))
    two.run()
    assert two.arrived() == []
    two.server.reply(first, two.now, pack(1))
    two.run()
    [third] = two.arrived()
    assert msgpack.unpackb(third.payload) == [1, 2]


def test_a_large_result_is_an_argument_too() -> None:
    limits = Limits(stream_window=128 * 1024, connection_window=1024 * 1024)
    two = Pair({"limits": limits}, {"limits": limits})
    [first] = club(two, begin(), needs((1, 0)))
    two.server.reply(first, two.now, pack(b"x" * 200_000))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload) == [None, b"x" * 200_000]


def test_arguments_that_come_as_data_take_references_too() -> None:
    two = Pair()
    [first] = club(two, begin(), needs((0, 0), arguments=(None, b"x" * 100_000)))
    two.server.reply(first, two.now, pack(7))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload) == [7, b"x" * 100_000]


def test_results_may_come_before_arguments() -> None:
    two = Pair()
    two.client.club([begin(), needs((0, 0), arguments=(None, b"x" * 100_000))], two.now)
    two.server.receive_data(b"".join(two.client.data_to_send(two.now, 1)), two.now)
    [first] = two.server.next_event().calls
    two.server.reply(first, two.now, pack(7))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload) == [7, b"x" * 100_000]


def test_a_call_that_needs_a_failed_one_never_runs_nor_do_those_that_need_it() -> None:
    two = Pair()
    calls = [begin(), needs((0, 0)), needs((0, 1)), begin()]
    first, last = club(two, *calls)
    two.server.reply(first, two.now, None, Outcome(Status.NOT_FOUND))
    two.run()
    assert two.arrived() == []
    assert statuses(two) == [
        (calls[0], Status.NOT_FOUND, False),
        (calls[1], Status.FAILED_PRECONDITION, True),
        (calls[2], Status.FAILED_PRECONDITION, True),
    ]
    two.server.reply(last, two.now)
    assert two.server.open_calls == 0


@pytest.mark.parametrize("result", [None, pack([1]), pack({"id": [1]}), pack({"id": {}}), b"\xc1"])
def test_a_result_without_the_part_is_as_good_as_none(result: bytes | None) -> None:
    two = Pair()
    calls = [begin(), needs((0, 0, ("id", "name")))]
    [first] = club(two, *calls)
    two.server.reply(first, two.now, result)
    two.run()
    assert statuses_of_failed(two) == [(calls[1], Status.FAILED_PRECONDITION, True)]


def statuses_of_failed(two: Pair) -> list[tuple[Stream, Status, bool]]:
    return [
        (call, outcome.status, outcome.not_started)
        for call, _, outcome in two.replies()
        if outcome is not None
    ]


def test_a_result_that_is_not_messagepack_is_no_argument() -> None:
    two = Pair()
    calls = [begin(), needs((0, 0))]
    [first] = club(two, *calls)
    two.server.reply(first, two.now, b"\xc1")
    two.run()
    assert statuses_of_failed(two) == [(calls[1], Status.FAILED_PRECONDITION, True)]


@pytest.mark.parametrize(
    "payload",
    [pack([]), pack([7]), pack(7), b"\xc1", pack([None, {}])[:-1] + b"\x82\x01\x01\x01\x02"],
)
def test_arguments_without_the_place_are_invalid(payload: bytes) -> None:
    two = Pair()
    calls = [begin(), Stream("Vault.write", payload, references=(Reference(0, 0),))]
    [first] = club(two, *calls)
    two.server.reply(first, two.now, pack(7))
    two.run()
    assert statuses_of_failed(two) == [(calls[1], Status.INVALID_ARGUMENT, True)]


def test_arguments_keep_what_is_beside_the_place() -> None:
    two = Pair()
    arguments = [None, {"a": [1, {}], 2: b"x"}]
    [first] = club(two, begin(), needs((0, 0), arguments=arguments))
    two.server.reply(first, two.now, pack(7))
    two.run()
    [second] = two.arrived()
    assert msgpack.unpackb(second.payload, strict_map_key=False) == [7, arguments[1]]


def test_a_result_nested_as_deep_as_can_be_read_is_an_argument_or_fails_its_call() -> None:
    """As an argument it is a level deeper, which may be too deep to write."""
    two = Pair()

    def ending(depth: int) -> Status | None:
        calls = [begin(), needs((0, 0))]
        [first] = club(two, *calls)
        two.server.reply(first, two.now, b"\x91" * depth + b"\xc0")
        two.run()
        for second in two.arrived():
            two.server.reply(second, two.now)
        two.run()
        two.client.take(calls[0], two.now)
        two.run()
        [outcome] = [outcome for call, _, outcome in two.replies() if call is calls[1]]
        return outcome.status if outcome is not None else None

    # How deep that is depends on Python, on the machine and on the stack of this test.
    readable, unreadable = 100, 1_000_000
    assert ending(unreadable) is Status.FAILED_PRECONDITION
    while unreadable - readable > 1:
        middle = (readable + unreadable) // 2
        if ending(middle) is Status.FAILED_PRECONDITION:
            unreadable = middle
        else:
            readable = middle
    assert ending(100) is None
    assert ending(readable) in (None, Status.INVALID_ARGUMENT)


def test_resolved_arguments_are_no_longer_than_a_message() -> None:
    two = Pair(server_options={"limits": Limits(max_message=10_000)})
    calls = [begin(), needs((0, 0), (1, 0))]
    [first] = club(two, *calls)
    two.server.reply(first, two.now, pack(b"x" * 6_000))
    two.run()
    assert statuses_of_failed(two) == [(calls[1], Status.RESOURCE_EXHAUSTED, True)]


def test_arguments_longer_than_a_message_take_the_calls_that_need_them_along() -> None:
    two = Pair(server_options={"limits": Limits(max_message=10_000)})
    calls = [Stream("Vault.begin", pack([b"x" * 20_000])), needs((0, 0))]
    assert club(two, *calls) == []
    assert statuses(two) == [
        (calls[0], Status.RESOURCE_EXHAUSTED, True),
        (calls[1], Status.FAILED_PRECONDITION, True),
    ]
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_reset_call_fails_those_that_need_it() -> None:
    two = Pair()
    calls = [begin(), needs((0, 0)), needs((0, 1))]
    [first] = club(two, *calls)
    two.client.reset(calls[1], two.now)
    two.run()
    assert statuses(two) == [(calls[2], Status.FAILED_PRECONDITION, True)]
    two.server.reply(first, two.now, pack(1))
    two.run()
    assert two.arrived() == []
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_call_of_a_club_that_is_reset_before_it_goes_leaves_the_others_in_place() -> None:
    two = Pair()
    calls = [begin(), begin(), needs((0, 1))]
    two.client.club(calls, two.now)
    two.client.reset(calls[0], two.now)
    two.run()
    first, second = two.arrived()
    two.server.reply(first, two.now)
    two.server.reply(second, two.now, pack(1))
    two.run()
    assert [call for call, _, _ in two.replies()] == [calls[1]]
    assert len(two.arrived()) == 1


def test_the_deadline_of_a_call_passes_while_it_waits() -> None:
    two = Pair()
    calls = [begin(), needs((0, 0), deadline=1.0), needs((0, 1), deadline=1.0), needs((0, 0))]
    [first] = club(two, *calls)
    assert two.server.next_deadline() == 1.0
    two.now = 1.0
    two.server.handle_timer(two.now)
    two.run()
    assert statuses(two) == [
        (calls[1], Status.DEADLINE_EXCEEDED, True),
        (calls[2], Status.FAILED_PRECONDITION, True),
    ]
    two.server.reply(first, two.now, pack(1))
    two.run()
    assert len(two.arrived()) == 1


def test_data_for_a_call_that_waits_keep_nothing_from_those_that_it_waits_for() -> None:
    """Else each would wait for the other: the one for a result, the other for the window."""
    window = 65_536
    two = Pair(
        server_options={"limits": Limits(stream_window=window, connection_window=window)},
    )
    calls = [
        Stream("Vault.begin", pack([b"x" * 200_000]), lane=Priority.BULK),
        needs((0, 0), more=True, lane=Priority.BULK),
    ]
    two.client.club(calls, two.now)
    for _ in range(3):
        two.client.send(calls[1], b"y" * 60_000)
    two.client.end(calls[1])
    two.run()
    [first] = two.arrived()
    two.server.reply(first, two.now, pack(1))
    two.run()
    [second] = two.arrived()
    assert [two.server.take(second, two.now) for _ in range(2)] == [b"y" * 60_000, None]
    two.run()
    assert two.server.take(second, two.now) == b"y" * 60_000


# What is refused on this side.


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [begin(), begin(lane=Priority.BULK)],
        [begin() for _ in range(65)],
        [needs((0, 0))],
        [begin(), needs((0, 1))],
        [begin(), needs((0, -1))],
        [begin(), needs((0, 0), (0, 0))],
        [begin(), needs((0, 0, ("a",) * 17))],
        [begin(), needs(*((position, 0) for position in range(65)))],
        [begin(), needs((0, 0, ("a" * 70_000,)))],
        [Stream("Vault begin", b"\x90")],
    ],
)
def test_a_club_that_the_server_would_refuse_is_not_sent(calls: list[Stream]) -> None:
    two = Pair(server_options={"limits": Limits(max_club=64)})
    with pytest.raises(LocalProtocolError):
        two.client.club(calls, two.now)
    two.run()
    assert two.arrived() == []
    assert len(club(two, begin())) == 1


def test_a_single_call_refers_to_nothing() -> None:
    two = Pair()
    two.call()
    with pytest.raises(LocalProtocolError, match="outside a club"):
        two.client.call(needs((0, 0)), two.now)


def test_arguments_that_do_not_fit_in_the_frame_follow_as_data() -> None:
    two = Pair()
    calls = [Stream("Vault.put", pack([bytes(15_000)])) for _ in range(8)]
    arrived = club(two, *calls)
    assert two.client.clubs_sent == 1
    assert len(arrived) == 8
    assert all(call.payload == calls[0].payload for call in arrived)


@pytest.mark.parametrize(
    "options", [{"max_calls": 0}, {"max_bytes": 0}, {"linger": -1.0}, {"linger": 60.0}]
)
def test_clubbing_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        Clubbing(**options)


def test_a_club_without_room_is_cut_where_no_call_needs_another() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64, max_club=64)})
    two.call("Vault.watch")
    two.run()
    two.arrived()
    # 64 calls and 63 places; the last two need each other.
    first = club(two, *(begin() for _ in range(62)), begin(), needs((0, 62)))
    assert len(first) == 62
    behind = two.call("Vault.put")
    two.server.reply(first[0], two.now, pack(None))
    two.run()
    [begun] = two.arrived()
    two.server.reply(begun, two.now, pack(7))
    two.run()
    [needing, later] = two.arrived()
    assert msgpack.unpackb(needing.payload) == [7, None]
    assert later.id == behind.id
