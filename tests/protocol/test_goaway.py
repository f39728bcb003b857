"""The end of a connection: drained by either side, or closed at once."""

import pytest

from druvarpc.errors import CloseCode, LocalProtocolError, RemoteProtocolError, Status
from druvarpc.protocol import (
    CallsReceived,
    GoAwayReceived,
    Limits,
    Outcome,
    PongReceived,
    Reference,
    State,
    Stream,
)
from druvarpc.protocol.frames import GOAWAY, frame, pack
from tests.protocol.dialogue import frames
from tests.protocol.pair import Pair


def goaways(two: Pair) -> tuple[list[GoAwayReceived], list[GoAwayReceived]]:
    return tuple(
        [event for event in events if isinstance(event, GoAwayReceived)]
        for events in (two.client_events, two.server_events)
    )


def test_a_server_drains_when_its_calls_have_ended() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.drain()
    two.server.drain()
    two.run()
    assert goaways(two) == ([GoAwayReceived(CloseCode.NO_ERROR, "draining", [])], [])
    assert not two.client.accepts_calls
    assert not two.client.drained
    two.server.reply(yours, two.now, b"\x01")
    assert not two.server.drained, "the reply hasn't been sent"
    two.run()
    assert two.replies() == [(mine, b"\x01", None)]
    assert two.client.drained
    assert two.server.drained


def test_calls_that_cross_a_drain_are_given_back() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64)})
    _, yours = two.accept()
    two.server.drain()
    crossing = [two.call(payload=bytes(100_000)) for _ in range(70)]
    abandoned = two.call()
    two.client.reset(abandoned, two.now)
    two.to_server()
    reset = crossing[0]
    two.client.reset(reset, two.now)
    two.to_server()
    two.run()
    [event], _ = goaways(two)
    assert event.refused == crossing[1:]
    assert all(call.state is State.CLOSED for call in crossing)
    assert two.arrived() == []
    two.server.reply(yours, two.now)
    two.run()
    assert two.client.drained
    assert two.server.drained
    assert 4 * two.client.send_window > 3 * two.server.receive_window


def test_no_call_is_made_after_a_drain() -> None:
    two = Pair()
    two.server.drain()
    two.run()
    with pytest.raises(LocalProtocolError, match="no more calls"):
        two.call()
    with pytest.raises(LocalProtocolError, match="no more calls"):
        two.client.club([Stream("Vault.put", b"\x90")], two.now)


def test_a_client_drains_when_its_calls_have_ended() -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    two.client.drain()
    assert not two.client.accepts_calls
    two.run()
    assert goaways(two) == ([], [GoAwayReceived(CloseCode.NO_ERROR, "draining", [])])
    two.client.send(mine, b"data")
    two.client.end(mine)
    two.run()
    assert two.server.take(yours, two.now) == b"data"
    two.server.reply(yours, two.now)
    two.run()
    assert len(two.replies()) == 1
    assert two.client.drained
    assert two.server.drained


def test_calls_that_wait_go_ahead_of_a_clients_goaway() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64)})
    for _ in range(100):
        two.call()
    two.client.drain()
    two.run()
    first = two.arrived()
    assert goaways(two) == ([], [])
    for call in first:
        two.server.reply(call, two.now)
    two.run()
    assert len(two.arrived()) == 36
    assert len(goaways(two)[1]) == 1


def test_calls_that_are_given_up_do_not_keep_a_goaway_waiting() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64)})
    calls = [two.call() for _ in range(65)]
    two.client.drain()
    two.run()
    assert not two.client.wants_to_send
    two.client.reset(calls[-1], two.now)
    assert two.client.wants_to_send
    two.run()
    assert len(goaways(two)[1]) == 1


def test_both_ends_may_drain() -> None:
    two = Pair()
    two.client.drain()
    two.server.drain()
    two.run()
    assert [len(told) for told in goaways(two)] == [1, 1]
    assert two.client.drained
    assert two.server.drained


def test_a_close_says_why_and_is_the_last_that_is_said() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.reply(yours, two.now, b"\x01")
    two.server.close(CloseCode.INTERNAL_ERROR, "out of disk")
    two.server.close(CloseCode.ABUSE, "never said")
    two.server.drain()
    said = b"".join(two.server.data_to_send(two.now))
    assert [kind for kind, _ in frames(said)] == [GOAWAY]
    assert two.server.closed
    assert not two.server.wants_to_send
    assert two.server.data_to_send(two.now) == []
    two.client.receive_data(said, two.now)
    assert two.client.next_event() == GoAwayReceived(CloseCode.INTERNAL_ERROR, "out of disk", [])
    two.run()
    assert two.client.closed
    assert mine.state is State.CALLED, "nobody knows whether it ran"


def test_an_error_of_the_peers_ends_the_connection() -> None:
    two = Pair()
    two.accept()
    waiting = two.call()
    two.client.receive_data(frame(GOAWAY, pack([99, "unheard of"]), id=1), two.now)
    event = two.client.next_event()
    assert event == GoAwayReceived(CloseCode.INTERNAL_ERROR, "unheard of", [waiting])
    assert two.client.next_event() is None
    two.client.receive_data(b"whatever", two.now)
    assert two.client.next_event() is None
    two.run()
    assert two.client.closed


@pytest.mark.parametrize("what", ["reply", "send", "take", "reset", "call", "timer", "drain"])
def test_the_owner_may_go_on_after_the_end(what: str) -> None:
    two = Pair()
    mine, yours = two.accept(more=True)
    for core in (two.client, two.server):
        core.receive_data(b"\xff" * 20 + b"\x01" * 20, two.now)
        with pytest.raises(RemoteProtocolError):
            core.next_event()
    match what:
        case "reply":
            two.server.reply(yours, two.now)
        case "send":
            assert not two.client.can_send(mine)
            assert not two.server.can_send(yours)
        case "take":
            assert two.client.take(mine, two.now) is None
            assert two.server.take(yours, two.now) is None
        case "reset":
            two.client.reset(mine, two.now)
        case "call":
            assert not two.client.accepts_calls
            with pytest.raises(LocalProtocolError):
                two.call()
        case "timer":
            two.client.handle_timer(1000.0)
        case "drain":
            two.client.drain()
            two.server.drain()
    for core in (two.client, two.server):
        said = b"".join(core.data_to_send(two.now))
        assert [kind for kind, _ in frames(said)] == [GOAWAY]
        assert core.closed
        with pytest.raises(RemoteProtocolError):
            core.next_event()


def test_no_call_begins_after_the_end() -> None:
    """Not even one that waited only for the reply that comes now."""
    two = Pair()
    two.client.club(
        [
            Stream("Vault.begin", b"\x90"),
            Stream("Vault.write", b"\x91\xc0", references=(Reference(0, 0),)),
        ],
        two.now,
    )
    two.run()
    [first] = two.arrived()
    two.server.close()
    two.server.reply(first, two.now, b"\x01")
    assert two.server.next_event() is None


def test_events_before_an_error_are_not_lost() -> None:
    two = Pair()
    two.call()
    two.client.ping(two.now)
    said = b"".join(two.client.data_to_send(two.now))
    two.server.receive_data(said + b"\x7f" + bytes(11), two.now)
    assert isinstance(two.server.next_event(), CallsReceived)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="unknown frame type"):
            two.server.next_event()


def test_the_last_goaway_counts() -> None:
    """A server may take back calls that its first GOAWAY had accepted, if it fails."""
    two = Pair()
    first, _ = two.accept()
    second, _ = two.accept()
    two.client.receive_data(frame(GOAWAY, b"\x91\x00", id=2), two.now)
    two.client.receive_data(frame(GOAWAY, b"\x91\x00", id=1), two.now)
    assert two.client.next_event().refused == []
    assert two.client.next_event().refused == [second]
    two.client.receive_data(frame(GOAWAY, b"\x91\x00", id=2), two.now)
    with pytest.raises(RemoteProtocolError, match="can't know"):
        two.client.next_event()
    assert first.state is State.CALLED


def test_a_reply_for_a_call_that_was_given_back_is_a_breach() -> None:
    two = Pair()
    _, yours = two.accept()
    two.client.receive_data(frame(GOAWAY, b"\x91\x00", id=0), two.now)
    assert len(two.client.next_event().refused) == 1
    two.server.reply(yours, two.now, None, Outcome(Status.ABORTED))
    two.client.receive_data(b"".join(two.server.data_to_send(two.now)), two.now)
    with pytest.raises(RemoteProtocolError, match="isn't open"):
        two.client.next_event()


def test_data_of_a_call_that_was_given_back_hold_no_credit() -> None:
    limits = Limits(connection_window=65_536, stream_window=65_536, memory=1)
    two = Pair({"limits": limits})
    _, yours = two.accept()
    two.server.send(yours, bytes(40_000))
    two.run()
    assert two.server.send_window == 65_536 - 40_064
    two.client.receive_data(frame(GOAWAY, b"\x91\x00", id=0), two.now)
    two.run()
    assert two.server.send_window == 65_536


def test_a_ping_is_answered_while_draining() -> None:
    two = Pair()
    two.accept()
    two.server.drain()
    two.run()
    two.client.ping(two.now)
    two.run()
    assert any(isinstance(event, PongReceived) for event in two.client_events)
