"""Data both ways: messages, windows, and the memory that large messages may take."""

import pytest

from druvarpc.errors import CloseCode, LocalProtocolError, RemoteProtocolError, Status
from druvarpc.protocol import (
    Limits,
    Outcome,
    Priority,
    Readable,
    ResetReceived,
    State,
    Stream,
    Writable,
)
from druvarpc.protocol.frames import (
    CREDIT,
    DATA,
    HEADER_SIZE,
    MAX_WINDOW,
    decode_credits,
    frame,
    pack,
)
from druvarpc.protocol.windows import SendWindow
from tests.protocol.dialogue import frames
from tests.protocol.pair import Pair

WINDOW = 65_536
NARROW = Limits(stream_window=WINDOW, connection_window=WINDOW)


def narrow(**options: int) -> Pair:
    """Return a pair with the least windows, which have no memory to grow."""
    limits = Limits(stream_window=WINDOW, connection_window=WINDOW, memory=1, **options)
    return Pair({"limits": limits}, {"limits": limits})


def middling(**options: int) -> Pair:
    """Return a pair whose server has windows above the least, of 128 KiB and 1 MiB."""
    limits = Limits(stream_window=128 * 1024, connection_window=1024 * 1024, **options)
    return Pair(server_options={"limits": limits})


def take_all(two: Pair, stream: Stream) -> list[bytes]:
    """Take what comes on the server until nothing more does."""
    found: list[bytes] = []
    while True:
        message = two.server.take(stream, two.now)
        two.run()
        if message is not None:
            found.append(message)
        elif not stream.incoming.messages:
            return found


def is_whole(two: Pair) -> bool:
    """Whether all credit is back, but for less than a quarter, which isn't worth a frame."""
    return (
        4 * two.client.send_window > 3 * two.server.receive_window
        and 4 * two.server.send_window > 3 * two.client.receive_window
    )


# Messages.


@pytest.mark.parametrize("piece", [None, 1000, 7])
def test_messages_arrive_whole_and_in_order(piece: int | None) -> None:
    two = Pair(piece=piece)
    mine, yours = two.accept(more=True)
    messages = [b"", b"a", b"b" * 70_000, b"", b"c" * 200]
    for message in messages:
        two.client.send(mine, message)
    two.client.end(mine)
    two.run()
    assert take_all(two, yours) == messages
    assert two.server.incoming(yours).ended
    assert yours.state is mine.state is State.CALLED


def test_messages_are_sent_down_before_the_reply() -> None:
    two = Pair()
    mine, yours = two.accept()
    for number in range(3):
        two.server.send(yours, b"%d" % number)
    two.server.reply(yours, two.now, b"\x01")
    two.run()
    assert two.replies() == [(mine, b"\x01", None)]
    assert [two.client.take(mine, two.now) for _ in range(4)] == [b"0", b"1", b"2", None]


def test_any_buffer_can_be_sent() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    for message in (bytearray(b"a"), memoryview(b"b"), b"c"):
        two.client.send(mine, message)
    two.run()
    assert take_all(two, yours) == [b"a", b"b", b"c"]


def test_messages_may_be_queued_before_the_call_goes() -> None:
    two = Pair()
    mine = Stream("Vault.put", b"\x90", more=True)
    two.client.send(mine, b"early")
    two.client.end(mine)
    two.client.call(mine, two.now)
    two.run()
    [yours] = two.arrived()
    assert take_all(two, yours) == [b"early"]
    assert two.server.incoming(yours).ended


def test_large_arguments_go_ahead_of_messages_that_were_queued_before() -> None:
    two = Pair()
    mine = two.call(payload=b"\x91" + bytes(100_000), more=True)
    two.client.send(mine, b"message")
    two.run()
    [yours] = two.arrived()
    assert yours.payload == mine.payload
    assert take_all(two, yours) == [b"message"]


def test_an_end_alone_costs_nothing() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(WINDOW - 64))
    two.run()
    assert two.client.send_window == 0
    two.client.end(mine)
    two.run()
    assert yours.state is State.CALLED


def test_the_end_may_come_with_the_last_message_or_after_it() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.send(mine, b"a")
    two.run()
    two.client.end(mine)
    two.run()
    assert take_all(two, yours) == [b"a"]
    together, other = two.accept(more=True)
    two.client.send(together, b"a")
    two.client.end(together)
    said = b"".join(two.client.data_to_send(two.now))
    assert [kind for kind, _ in frames(said)] == [DATA]
    two.server.receive_data(said, two.now)
    assert take_all(two, other) == [b"a"]


def test_nothing_is_sent_after_the_end_or_without_more() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.end(mine)
    plain, _ = two.accept()
    for stream in (mine, plain):
        assert not two.client.can_send(stream)
        with pytest.raises(LocalProtocolError, match="nothing can be sent"):
            two.client.send(stream, b"late")
        with pytest.raises(LocalProtocolError, match="nothing can be sent"):
            two.client.end(stream)
    two.server.reply(yours, two.now)
    assert not two.server.can_send(yours)


# What the owner is told.


def test_readable_comes_once_for_each_time_that_nothing_was_found() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.send(mine, b"a")
    two.run()
    assert two.server_events == []
    assert two.server.take(yours, two.now) == b"a"
    assert two.server.take(yours, two.now) is None
    for message in (b"b", b"c"):
        two.client.send(mine, message)
        two.run()
    assert two.server_events == [Readable(yours)]
    assert take_all(two, yours) == [b"b", b"c"]
    two.client.end(mine)
    two.run()
    assert two.server_events == [Readable(yours)] * 2


def test_a_stream_has_ended_when_no_more_can_come() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.send(mine, b"a")
    two.run()
    assert not two.server.has_ended(yours)
    two.client.end(mine)
    two.run()
    assert two.server.has_ended(yours)
    assert not two.client.has_ended(mine)
    two.server.reply(yours, two.now)
    two.run()
    assert two.client.has_ended(mine)
    _, plain = two.accept()
    assert two.server.has_ended(plain)
    abandoned, _ = two.accept()
    two.client.reset(abandoned, two.now)
    assert two.client.has_ended(abandoned)


def test_a_call_without_more_has_nothing_to_read() -> None:
    two = Pair()
    _, yours = two.accept()
    assert two.server.take(yours, two.now) is None
    assert two.server.incoming(yours).ended


def test_a_call_with_an_inline_reply_has_nothing_to_read() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.reply(yours, two.now, b"\x01")
    two.run()
    assert two.client.take(mine, two.now) is None
    assert two.client.incoming(mine).ended


def test_a_sender_is_told_when_to_wait_and_when_to_go_on() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    assert two.client.has_room(mine)
    assert two.client.send(mine, bytes(200_000))
    assert two.client.has_room(mine)
    assert not two.client.send(mine, bytes(100_000))
    two.run()
    assert two.client_events == []
    assert not two.client.has_room(mine)
    take_all(two, yours)
    assert two.client_events == [Writable(mine)]
    assert two.client.has_room(mine)
    assert two.client.send(mine, b"more")


def test_a_sender_that_was_told_to_wait_waits_until_it_is_told_to_go_on() -> None:
    """A second message, small enough, must not make the first one's sender wait for ever."""
    two = narrow()
    mine, yours = two.accept(more=True)
    assert not two.client.send(mine, bytes(300_000))
    two.run()
    two.server.take(yours, two.now)
    two.to_client()
    two.to_server()
    assert not two.client.send(mine, b"small")
    take_all(two, yours)
    assert two.client_events == [Writable(mine)]


# Windows.


def test_a_sender_stops_when_the_window_is_empty() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    for _ in range(5):
        two.client.send(mine, bytes(20_000))
    two.run()
    assert len(yours.incoming.messages) == 3
    assert two.client.send_window < 8 * 1024
    assert len(take_all(two, yours)) == 5
    assert is_whole(two)


def test_a_message_is_not_cut_into_scraps() -> None:
    two = narrow()
    mine, _ = two.accept(more=True)
    two.client.send(mine, bytes(60_000))
    two.client.send(mine, bytes(20_000))
    two.run()
    sizes = [len(data) for kind, data in frames(b"".join(two.client.data_to_send(two.now)))]
    assert sizes == []
    assert two.client.send_window == WINDOW - 60_000 - 64


def test_credit_comes_back_as_messages_are_taken_not_as_they_arrive() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(50_000))
    two.run()
    assert two.client.send_window == WINDOW - 50_064
    two.server.take(yours, two.now)
    two.run()
    assert two.client.send_window == WINDOW


def test_a_message_larger_than_the_window_arrives_if_it_is_waited_for() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(1_000_000))
    two.run()
    assert two.server.incoming(yours).unfinished
    assert two.server.take(yours, two.now) is None
    two.run()
    assert two.server_events == [Readable(yours)]
    assert two.server.take(yours, two.now) == bytes(1_000_000)
    two.run()
    assert is_whole(two)


@pytest.mark.parametrize("memory", [1, 300_000, 1_700_000, 64 * 1024 * 1024])
def test_many_large_messages_arrive_whatever_the_memory(memory: int) -> None:
    """When it is short, one after another, since one may always go beyond."""
    two = middling(memory=memory, max_message=1_000_000)
    calls = [two.call(payload=bytes(900_000)) for _ in range(6)]
    two.run()
    arrived = two.arrived()
    assert sorted(call.id for call in arrived) == [call.id for call in calls]
    assert all(call.payload == bytes(900_000) for call in arrived)
    for call in arrived:
        two.server.reply(call, two.now)
    two.run()
    assert is_whole(two)


def test_who_waits_for_memory_goes_on_when_others_give_up() -> None:
    two = middling(memory=1, max_message=1_000_000)
    calls = [two.call(payload=bytes(900_000), more=True) for _ in range(3)]
    for _ in range(9):
        two.server.receive_data(b"".join(two.client.data_to_send(two.now, 1)), two.now)
        two.client.receive_data(b"".join(two.server.data_to_send(two.now, 1)), two.now)
    two.client.reset(calls[0], two.now)
    two.run()
    assert len(two.arrived()) == 2


@pytest.mark.parametrize("waiting", [0, 1, 2, 3])
def test_who_gives_up_waiting_for_memory_keeps_nobody_waiting(waiting: int) -> None:
    two = middling(memory=1, max_message=1_000_000)
    calls = [two.call(payload=bytes(900_000), more=True) for _ in range(4)]
    for _ in range(16):
        two.server.receive_data(b"".join(two.client.data_to_send(two.now, 1)), two.now)
        two.client.receive_data(b"".join(two.server.data_to_send(two.now, 1)), two.now)
    two.client.reset(calls[waiting], two.now)
    two.run()
    assert len(two.arrived()) == 3


def test_no_credit_is_given_to_who_has_ended() -> None:
    two = middling()
    _, yours = two.accept(payload=bytes(70_000))
    mine = two.call(payload=bytes(70_000))
    said = b"".join(two.client.data_to_send(two.now))
    two.server.receive_data(said, two.now)
    answer = b"".join(two.server.data_to_send(two.now))
    credits = [
        decode_credits(data[HEADER_SIZE:]) for kind, data in frames(answer) if kind == CREDIT
    ]
    assert [id for pairs in credits for id, _ in pairs if id] == []
    assert (yours.id, mine.id) == (1, 2)


def test_windows_grow_with_what_is_consumed_in_a_round_trip() -> None:
    two = middling()
    mine, yours = two.accept(more=True)
    before = two.server.receive_window
    for _ in range(20):
        two.client.send(mine, bytes(2_000_000))
        two.now += 0.001
        take_all(two, yours)
    assert two.server.receive_window > before
    assert two.client.send_window > before
    assert two.server.incoming(yours).window.size > 128 * 1024
    two.client.end(mine)
    two.run()
    assert two.server.incoming(yours).window.size == 128 * 1024


def test_windows_do_not_grow_beyond_the_budget() -> None:
    two = middling(memory=300_000)
    mine, yours = two.accept(more=True)
    for _ in range(100):
        two.client.send(mine, bytes(100_000))
        two.run()
        two.now += 0.001
        take_all(two, yours)
    assert two.server.receive_window <= 1024 * 1024 + 300_000


@pytest.mark.parametrize("id", [0, 1])
def test_credit_may_rise_to_the_most_and_no_further(id: int) -> None:
    two = narrow()
    mine, _ = two.accept(more=True)
    core = two.client
    core.receive_data(frame(CREDIT, pack([id, MAX_WINDOW - WINDOW])), two.now)
    assert core.next_event() is None
    core.receive_data(frame(CREDIT, pack([id, 1])), two.now)
    with pytest.raises(RemoteProtocolError, match="credit rises") as caught:
        core.next_event()
    assert caught.value.code is CloseCode.FLOW_CONTROL_ERROR
    assert mine.outgoing.window.available <= MAX_WINDOW


def test_credit_for_a_call_that_has_ended_is_ignored() -> None:
    two = Pair()
    _, yours = two.accept(more=True)
    two.server.reply(yours, two.now)
    two.run()
    before = two.client.send_window
    two.client.receive_data(frame(CREDIT, pack([1, 10, 1, 5000, 0, 100])), two.now)
    assert two.client.next_event() is None or two.replies()
    assert two.client.send_window == before + 100


def test_credit_used_before_the_settings_counts() -> None:
    two = Pair(settled=False)
    two.call()
    mine = two.call(more=True)
    two.client.send(mine, bytes(30_000))
    two.to_server()
    assert two.client.send_window == WINDOW - 30_064
    two.to_client()
    assert two.client.send_window == Limits().connection_window - 30_064
    assert mine.outgoing.window.available == Limits().stream_window - 30_064


def test_a_send_window_is_never_overspent() -> None:
    window = SendWindow(10)
    window.spend(10)
    with pytest.raises(AssertionError):
        window.spend(1)


# Streams that end with data under way.


def test_a_reply_while_the_client_still_sends() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(300_000))
    two.to_server()
    two.server.reply(yours, two.now, None, Outcome(Status.ABORTED))
    assert yours.state is State.REPLIED
    two.run()
    assert [call for call, _, _ in two.replies()] == [mine]
    assert not two.client.can_send(mine)
    assert two.client.open_calls == two.server.open_calls == 0
    assert is_whole(two)


def test_data_behind_a_reply_that_still_waits_are_discarded() -> None:
    """The reply has closed that direction, also while it waits for the client's credit."""
    two = narrow()
    mine, yours = two.accept(more=True)
    two.server.reply(yours, two.now, bytes(200_000))
    two.to_client()
    for _ in range(10):
        two.client.send(mine, bytes(20_000))
        two.to_server()
    two.client.end(mine)
    two.run()
    assert two.client.take(mine, two.now) == bytes(200_000)
    two.run()
    assert two.client.open_calls == two.server.open_calls == 0
    assert is_whole(two)


def test_a_reply_whose_caller_has_ended_meanwhile() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.end(mine)
    said = two.client.data_to_send(two.now)
    two.server.reply(yours, two.now)
    two.server.receive_data(b"".join(said), two.now)
    assert yours.state is State.CLOSED
    two.run()
    assert len(two.replies()) == 1
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_reset_gives_all_credit_back() -> None:
    two = narrow()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(300_000))
    two.server.send(yours, bytes(300_000))
    two.run()
    two.client.reset(mine, two.now)
    two.run()
    assert ResetReceived(yours, Status.CANCELLED, "") in two.server_events
    assert not two.server.can_send(yours)
    two.server.reply(yours, two.now)
    two.run()
    assert is_whole(two)


def test_a_reset_of_a_call_that_was_not_sent_keeps_the_connections_credit() -> None:
    two = narrow()
    mine, yours = two.accept()
    two.server.send(yours, bytes(40_000))
    two.run()
    unsent = two.call()
    assert two.client.take(unsent, two.now) is None
    assert two.client.take(mine, two.now) == bytes(40_000)
    two.client.reset(unsent, two.now)
    two.run()
    assert two.server.send_window == WINDOW


def test_data_of_a_call_that_was_reset_are_discarded() -> None:
    two = narrow()
    mine, yours = two.accept()
    two.client.reset(mine, two.now)
    for _ in range(3):
        two.server.send(yours, bytes(20_000))
    two.to_client()
    assert two.client.send_window == WINDOW
    two.run()
    assert two.client_events == []
    two.server.reply(yours, two.now)
    two.run()
    assert is_whole(two)


def test_what_can_still_be_read_after_the_reply_is_dropped_by_a_reset() -> None:
    two = narrow()
    mine, yours = two.accept()
    two.server.send(yours, bytes(30_000))
    two.server.reply(yours, two.now)
    two.run()
    assert mine.state is State.CLOSED
    assert not is_whole(two)
    two.client.reset(mine, two.now)
    two.run()
    assert is_whole(two)
    assert two.client.take(mine, two.now) is None


def test_a_failure_drops_what_waits_and_what_is_unfinished() -> None:
    two = narrow()
    mine, yours = two.accept()
    two.server.send(yours, b"first")
    two.server.send(yours, bytes(300_000))
    two.to_client()
    two.server.reply(yours, two.now, None, Outcome(Status.ABORTED))
    two.run()
    assert [outcome.status for _, _, outcome in two.replies()] == [Status.ABORTED]
    assert [two.client.take(mine, two.now) for _ in range(2)] == [b"first", None]
    two.run()
    assert is_whole(two)


def test_a_failure_may_come_after_the_data() -> None:
    two = narrow()
    mine, yours = two.accept()
    two.server.send(yours, bytes(300_000))
    two.server.reply(yours, two.now, None, Outcome(Status.ABORTED), after_data=True)
    two.run()
    assert two.client.take(mine, two.now) == bytes(300_000)
    assert [outcome.status for _, _, outcome in two.replies()] == [Status.ABORTED]


# Messages that are too long.


def test_a_message_that_is_too_long_is_told_of_and_dropped() -> None:
    two = narrow(max_message=100_000)
    mine, yours = two.accept(more=True)
    assert two.server.take(yours, two.now) is None
    two.client.send(mine, bytes(50_000))
    two.client.send(mine, bytes(200_000))
    two.run()
    assert two.server.take(yours, two.now) == bytes(50_000)
    assert two.server.take(yours, two.now) is None
    two.run()
    assert two.server.incoming(yours).too_long
    two.server.reply(yours, two.now, None, Outcome(Status.RESOURCE_EXHAUSTED))
    two.run()
    assert is_whole(two)
    assert two.server_events == [Readable(yours)] * 2


def test_the_rest_of_a_message_that_is_too_long_is_discarded() -> None:
    two = Pair(server_options={"limits": Limits(max_message=70_000)})
    mine, yours = two.accept(more=True)
    for size in (80_000, 10):
        two.client.send(mine, bytes(size))
    two.client.end(mine)
    two.run()
    assert two.server.take(yours, two.now) is None
    assert two.server.incoming(yours).too_long
    assert is_whole(two)


def test_a_result_that_is_too_long_is_told_of() -> None:
    two = Pair({"limits": Limits(max_message=70_000)})
    mine, yours = two.accept(lane=Priority.BULK)
    two.server.reply(yours, two.now, bytes(80_000))
    two.run()
    assert two.client.take(mine, two.now) is None
    assert two.client.incoming(mine).too_long
    assert is_whole(two)


# Many small things at once.


def test_more_credit_than_one_frame_holds() -> None:
    """Connections of more than 1,024 streams that all get credit at the same moment."""
    limits = Limits(
        max_calls=2000,
        stream_window=WINDOW,
        connection_window=2**27,
        memory=2**28,
    )
    two = Pair(server_options={"limits": limits})
    calls = [two.call(more=True) for _ in range(1100)]
    for call in calls:
        two.client.send(call, bytes(17_000))
    two.run()
    for call in two.arrived():
        two.server.take(call, two.now)
    two.run()
    assert {call.outgoing.window.available for call in calls} == {WINDOW}
