"""What happens when time passes: handshake, keepalive, unfinished frames, stalls, linger."""

import pytest

from druvarpc.errors import CloseCode, RemoteProtocolError, Status
from druvarpc.protocol import (
    Clubbing,
    Connection,
    Limits,
    Outcome,
    PongReceived,
    SettingsReceived,
    Stalled,
)
from druvarpc.protocol.limits import Patience
from druvarpc.protocol.outflow import QUANTUM
from tests.protocol.pair import Pair

WINDOW = 65_536


def ends(core: Connection) -> RemoteProtocolError:
    """Return the error that a core ends with."""
    with pytest.raises(RemoteProtocolError) as caught:
        list(iter(core.next_event, None))
    return caught.value


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_handshake_has_its_time(role: str) -> None:
    core = Connection(role, now=100.0, limits=Limits(handshake_timeout=3.0))
    assert core.next_deadline() == 103.0
    core.handle_timer(102.9)
    assert core.next_event() is None
    core.handle_timer(103.0)
    assert ends(core).code is CloseCode.TIMEOUT
    assert core.next_deadline() is None
    assert b"the handshake took more than 3 s" in b"".join(core.data_to_send(103.0))
    assert core.closed
    core.handle_timer(200.0)


def test_silence_is_broken_by_a_ping_and_a_pong() -> None:
    two = Pair()
    assert two.client.next_deadline() == 30.0
    two.now = 30.0
    two.client.handle_timer(two.now)
    assert two.client.wants_to_send
    two.run()
    [pong] = two.client_events
    assert isinstance(pong, PongReceived)
    assert two.client.next_deadline() == 60.0


def test_a_dead_peer_is_found() -> None:
    two = Pair()
    two.client.handle_timer(30.0)
    assert two.client.next_deadline() == 50.0
    two.client.handle_timer(49.9)
    assert two.client.next_event() is None
    two.client.handle_timer(50.0)
    assert ends(two.client).code is CloseCode.TIMEOUT


def test_a_peer_that_sends_lives() -> None:
    two = Pair()
    two.client.handle_timer(30.0)
    two.client.data_to_send(30.0)
    two.now = 49.0
    two.server.ping(two.now)
    two.to_client()
    assert two.client.next_deadline() == 69.0


def test_a_frame_has_its_time() -> None:
    two = Pair()
    two.call(payload=bytes(3000))
    data = b"".join(two.client.data_to_send(two.now))
    two.server.receive_data(data[:1], 0.1)
    assert two.server.next_deadline() == 30.1
    for second in range(20, 61, 20):
        two.server.receive_data(data[second : second + 1], second)
    assert two.server.next_deadline() == 60.1
    two.server.handle_timer(60.1)
    assert "a frame took more than 60 s" in str(ends(two.server))


def test_the_time_of_a_frame_begins_anew_with_the_next() -> None:
    two = Pair(server_options={"limits": Limits(frame_timeout=20.0)})
    two.call()
    first = b"".join(two.client.data_to_send(two.now))
    two.call()
    second = b"".join(two.client.data_to_send(two.now))
    two.server.receive_data(first[:3], 0.0)
    two.server.receive_data(first[3:] + second[:3], 15.0)
    assert two.server.next_deadline() == 35.0
    two.server.receive_data(second[3:], 34.0)
    assert two.server.next_deadline() > 35.0


def test_the_round_trip_is_the_least_of_the_latest() -> None:
    two = Pair()
    assert two.client.rtt == 0.0
    for trip in (0.03, 0.01, 0.02, 0.02, 0.02, 0.02, 0.02):
        two.client.ping(two.now)
        two.to_server()
        two.now += trip
        two.to_client()
    assert two.client.rtt == 0.0
    two.client.ping(two.now)
    two.to_server()
    two.now += 0.02
    two.to_client()
    assert two.client.rtt == pytest.approx(0.01)
    assert two.client_events[0].rtt == pytest.approx(0.03)


def test_the_round_trip_is_measured_again_while_data_arrive() -> None:
    two = Pair()
    for second in range(4):
        two.now = float(second)
        two.accept()
    two.client_events.clear()
    two.now = 6.0
    _, yours = two.accept()
    two.server.reply(yours, two.now)
    two.run()
    assert any(isinstance(event, PongReceived) for event in two.client_events)


def test_settings_tell_what_the_peer_takes() -> None:
    two = Pair(settled=False, server_options={"limits": Limits(max_calls=77)})
    assert not two.client.settled
    assert two.client.rtt is None
    assert two.client.peer.max_calls == 64
    two.run()
    assert two.client.settled
    assert two.client_events[0] == SettingsReceived(two.client.peer)
    assert two.client.peer.max_calls == 77
    assert two.client.receive_window == Limits().connection_window


# Stalls.


def stalled_pair() -> Pair:
    return Pair(
        {"limits": Limits(stream_window=WINDOW, connection_window=WINDOW)},
        {"limits": Limits(stream_window=WINDOW, connection_window=WINDOW)},
    )


def test_a_stream_without_credit_is_told_of_in_time() -> None:
    two = stalled_pair()
    mine, yours = two.accept(more=True)
    two.client.send(mine, bytes(60_000))
    two.client.send(mine, bytes(60_000))
    two.run()
    two.now = 20.0
    two.client.send(mine, bytes(60_000))
    two.client.ping(two.now)
    two.run()
    assert two.client.next_deadline() == 50.0
    for second in range(40, 300, 20):
        two.now = float(second)
        two.client.ping(two.now)
        two.run()
    two.client_events.clear()
    assert two.client.next_deadline() == 300.0
    two.now = 300.0
    two.client.handle_timer(two.now)
    assert two.client.next_event() == Stalled(mine)
    assert two.client.next_event() is None
    assert two.server.take(yours, two.now) == bytes(60_000)
    two.run()
    two.client.reset(mine, two.now)
    two.run()
    two.server.reply(yours, two.now)
    two.run()
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_stream_that_gets_credit_again_has_its_time_anew() -> None:
    limits = Limits(stream_window=WINDOW, connection_window=WINDOW, memory=1, stall_timeout=10.0)
    two = Pair({"limits": limits}, {"limits": limits})
    mine, yours = two.accept(more=True)
    for _ in range(3):
        two.client.send(mine, bytes(60_000))
    two.run()
    assert two.client.next_deadline() == 10.0
    two.now = 9.0
    assert two.server.take(yours, two.now) is not None
    two.run()
    assert two.client.next_deadline() == 19.0
    two.client.handle_timer(10.0)
    assert two.client.next_event() is None


def test_a_reply_without_credit_is_given_up_in_time() -> None:
    """The handler has ended, so that nobody but the core can do it."""
    two = stalled_pair()
    mine, yours = two.accept()
    two.server.send(yours, bytes(60_000))
    two.server.reply(yours, two.now, bytes(60_000))
    two.run()
    for second in range(20, 301, 20):
        assert two.server.open_calls == 1
        two.now = float(second)
        two.server.ping(two.now)
        two.server.handle_timer(two.now)
        two.run()
    assert two.server.open_calls == two.client.open_calls == 0
    assert [outcome.status for _, _, outcome in two.replies()] == [Status.ABORTED]
    assert [two.client.take(mine, two.now) for _ in range(2)] == [bytes(60_000), None]
    assert not any(isinstance(event, Stalled) for event in two.server_events)


# Linger.


def test_calls_that_linger_go_out_together_when_their_time_has_come() -> None:
    two = Pair({"clubbing": Clubbing(linger=0.01)})
    two.call()
    two.now = 0.005
    two.call()
    assert not two.client.wants_to_send
    assert two.client.next_deadline() == 0.01
    two.client.handle_timer(0.009)
    assert not two.client.wants_to_send
    two.now = 0.01
    two.client.handle_timer(two.now)
    two.run()
    assert two.client.clubs_sent == 1
    assert len(two.arrived()) == 2


def test_a_full_club_lingers_no_longer() -> None:
    two = Pair({"clubbing": Clubbing(linger=0.01, max_calls=3)})
    for _ in range(3):
        two.call()
    two.run()
    assert len(two.arrived()) == 3


def test_replies_do_not_hurry_calls_that_linger() -> None:
    two = Pair({"clubbing": Clubbing(linger=0.01, max_calls=2)})
    two.call()
    two.call()
    two.run()
    two.call()
    for call in two.arrived():
        two.server.reply(call, two.now, None, Outcome(Status.ABORTED))
    two.run()
    assert two.arrived() == []
    two.now = 0.01
    two.client.handle_timer(two.now)
    two.run()
    assert len(two.arrived()) == 1


# Patience.


def test_patience_takes_bursts_and_no_sustained_rate() -> None:
    patience = Patience(0.0)
    for _ in range(Patience.MOST):
        patience.charge(0.0)
    for _ in range(10):
        patience.charge(0.01)
    with pytest.raises(RemoteProtocolError) as caught:
        patience.charge(0.01)
    assert caught.value.code is CloseCode.ABUSE


def test_credit_that_crosses_the_end_of_data_is_no_abuse() -> None:
    """Calls of two frames each, at a rate at which each one's credit comes too late."""
    limits = Limits(stream_window=128 * 1024, connection_window=1024 * 1024)
    two = Pair(server_options={"limits": limits})
    for _ in range(Patience.MOST + 100):
        two.call(payload=bytes(66_000))
        first, second, third = (
            b"".join(two.client.data_to_send(two.now, most)) for most in (1, QUANTUM, QUANTUM)
        )
        two.server.receive_data(first + second, two.now)
        credit = b"".join(two.server.data_to_send(two.now))
        assert credit
        two.server.receive_data(third, two.now)
        two.client.receive_data(credit, two.now)
        two.server.reply(two.server.next_event().calls[0], two.now)
        two.client.receive_data(b"".join(two.server.data_to_send(two.now)), two.now)
        assert two.client.next_event() is not None
    assert two.client.open_calls == 0


@pytest.mark.parametrize("name", ["memory", "max_message", "stall_timeout", "frame_timeout"])
def test_limits_are_more_than_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


@pytest.mark.parametrize("options", [{"max_frame": 1}, {"max_inline": 100_000}])
def test_limits_are_such_as_settings_can_say(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Limits(**options)
