"""Calls and their replies, one at a time and many at once."""

import math

import pytest

from druvarpc.errors import LocalProtocolError, RemoteProtocolError, Status
from druvarpc.protocol import (
    AuthReceived,
    CallsReceived,
    Clubbing,
    Connection,
    Limits,
    MetadataReceived,
    Outcome,
    Priority,
    Readable,
    Reference,
    RepliesReceived,
    ResetReceived,
    SettingsReceived,
    State,
    Stream,
)
from tests.protocol.pair import Pair

LARGE = b"x" * 300_000
# A window that LARGE doesn't fit in.
NARROW = Limits(stream_window=128 * 1024, connection_window=1024 * 1024)


@pytest.mark.parametrize("piece", [None, 1, 7])
def test_calls_are_answered_in_any_order(piece: int | None) -> None:
    two = Pair(piece=piece)
    mine = [two.call(payload=b"\x91%c" % number) for number in range(10)]
    two.run()
    yours = two.arrived()
    assert [call.payload for call in yours] == [call.payload for call in mine]
    for call in reversed(yours):
        two.server.reply(call, two.now, call.payload[1:])
    two.run()
    assert two.replies() == [(call, call.payload[1:], None) for call in reversed(mine)]
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_large_call_has_a_large_reply() -> None:
    two = Pair({"limits": NARROW}, {"limits": NARROW})
    mine, yours = two.accept(payload=LARGE)
    assert (yours.payload, yours.state, yours.more) == (LARGE, State.CALLED, True)
    two.server.reply(yours, two.now, LARGE)
    two.run()
    assert two.replies() == [(mine, None, None)]
    assert two.client.take(mine, two.now) == LARGE
    assert two.client.take(mine, two.now) is None
    assert two.client.incoming(mine).ended


def test_a_call_carries_all_that_belongs_to_it() -> None:
    two = Pair()
    metadata = [("trace", b"\x00\xff"), ("trace", "äö")]
    _, yours = two.accept(
        "Vault.get",
        lane=Priority.BULK,
        deadline=two.now + 1.5,
        metadata=metadata,
        timings=True,
    )
    assert (yours.method, yours.lane, yours.timings) == ("Vault.get", Priority.BULK, True)
    assert yours.deadline == pytest.approx(two.now + 1.5)
    assert list(yours.metadata) == metadata
    assert two.server.open_calls == 1


@pytest.mark.parametrize("deadline", [-1.0, 0.0, math.inf])
def test_a_deadline_may_have_passed_or_be_far(deadline: float) -> None:
    _, yours = Pair(now=5.0).accept(deadline=deadline)
    assert yours.deadline == 5.0 or yours.deadline > 1e9


def test_a_reply_carries_all_that_belongs_to_it() -> None:
    two = Pair()
    mine, yours = two.accept()
    failure = Outcome(Status.NOT_FOUND, "no such chunk", b"\x07", False, [("k", "v")], (10, 20, 30))
    two.server.reply(yours, two.now, None, failure)
    two.run()
    assert two.replies() == [(mine, None, failure)]


def test_a_message_that_is_too_long_is_cut_between_characters() -> None:
    two = Pair()
    _, yours = two.accept()
    two.server.reply(yours, two.now, None, Outcome(Status.INTERNAL, "ä" * 1000 + "\ud800"))
    two.run()
    [(_, _, outcome)] = two.replies()
    assert outcome.message == "ä" * 512


def test_an_outcome_with_a_large_result_comes_after_it() -> None:
    two = Pair({"limits": NARROW})
    mine, yours = two.accept()
    outcome = Outcome(trailers=[], timings=(1, 2, 3))
    two.server.reply(yours, two.now, LARGE, outcome)
    two.run()
    assert two.replies() == [(mine, None, outcome)]
    assert two.client.take(mine, two.now) == LARGE


def test_nothing_is_a_result_too() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.reply(yours, two.now)
    two.run()
    assert two.replies() == [(mine, None, None)]


@pytest.mark.parametrize(
    ("payload", "outcome"),
    [
        (b"\x01", Outcome(Status.ABORTED)),
        (None, Outcome(not_started=True)),
        (None, Outcome(Status.ABORTED, details=bytes(20_000))),
        (None, Outcome(trailers=[("k", "v")] * 65)),
        (None, Outcome(trailers=[("k", "\ud800")])),
        (None, Outcome(trailers=[("", "v")])),
    ],
)
def test_a_reply_that_the_client_would_refuse_is_not_sent(
    payload: bytes | None, outcome: Outcome
) -> None:
    two = Pair()
    _, yours = two.accept()
    with pytest.raises(LocalProtocolError):
        two.server.reply(yours, two.now, payload, outcome)
    two.server.reply(yours, two.now, b"\x01")
    two.run()
    assert len(two.replies()) == 1


def test_a_call_is_replied_to_once() -> None:
    two = Pair()
    _, yours = two.accept()
    two.server.reply(yours, two.now)
    with pytest.raises(LocalProtocolError):
        two.server.reply(yours, two.now)


@pytest.mark.parametrize(
    "call",
    [
        Stream("Vault put", b"\x90"),
        Stream("", b"\x90"),
        Stream("Vault.put", None),
        Stream("Vault.put", b"\x90", metadata=[("k", bytes(9_000))]),
    ],
)
def test_a_call_that_the_server_would_refuse_is_not_sent(call: Stream) -> None:
    two = Pair()
    with pytest.raises(LocalProtocolError):
        two.client.call(call, two.now)
    two.accept()


def test_a_method_is_named_once() -> None:
    two = Pair()
    two.call("Vault.put")
    first = b"".join(two.client.data_to_send(two.now))
    two.call("Vault.put")
    second = b"".join(two.client.data_to_send(two.now))
    assert b"Vault.put" in first
    assert len(second) == 12 + 7


def test_more_methods_than_have_numbers_are_refused_here() -> None:
    two = Pair()
    for number in range(4096):
        two.call(f"m{number}")
    with pytest.raises(LocalProtocolError):
        two.call("one.too.many")


def test_each_role_keeps_to_its_own() -> None:
    two = Pair()
    stream = Stream("Vault.put", b"\x90")
    with pytest.raises(LocalProtocolError, match="only a client"):
        two.server.call(stream, two.now)
    with pytest.raises(LocalProtocolError, match="only a server"):
        two.client.reply(stream, two.now)


# Clubbing.


def test_calls_of_the_same_moment_share_a_frame_and_so_do_replies() -> None:
    two = Pair()
    for _ in range(5):
        two.call()
    two.run()
    assert two.client.clubs_sent == 1
    for call in two.arrived():
        two.server.reply(call, two.now)
    two.run()
    assert [len(event.replies) for event in two.client_events] == [5]
    assert two.server.clubs_sent == 1
    assert two.client.calls_clubbed == two.server.calls_clubbed == 5


def test_a_club_holds_no_more_calls_than_are_wanted() -> None:
    two = Pair({"clubbing": Clubbing(max_calls=2)})
    for _ in range(5):
        two.call()
    two.run()
    assert [len(event.calls) for event in two.server_events] == [2, 2, 1]


def test_a_club_holds_no_more_bytes_than_are_wanted_but_one_call() -> None:
    two = Pair({"clubbing": Clubbing(max_bytes=100)})
    for size in (10, 10, 3000, 10):
        two.call(payload=bytes(size))
    two.run()
    assert [len(event.calls) for event in two.server_events] == [2, 1, 1]


def test_replies_that_do_not_fit_in_one_frame_take_two() -> None:
    two = Pair()
    for _ in range(6):
        two.call()
    two.run()
    for call in two.arrived():
        two.server.reply(call, two.now, bytes(16_000))
    two.run()
    assert [len(event.replies) for event in two.client_events] == [4, 2]


def test_no_call_goes_out_beyond_what_the_server_takes() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=64, max_club=64)})
    for _ in range(100):
        two.call()
    two.run()
    arrived = two.arrived()
    assert len(arrived) == two.client.open_calls == 64
    for call in arrived[:10]:
        two.server.reply(call, two.now)
    two.run()
    assert len(two.arrived()) == 10
    assert two.client.open_calls == 64


def test_calls_before_the_settings_are_within_the_defaults() -> None:
    two = Pair(settled=False)
    for _ in range(100):
        two.call(payload=bytes(5_000))
    two.to_server()
    assert two.client.open_calls == 64
    two.run()
    assert len(two.arrived()) == 100


# Resets.


def test_a_reset_stops_the_handler_and_ends_in_silence() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.client.reset(mine, two.now, Status.DEADLINE_EXCEEDED, "too late")
    two.run()
    assert two.server_events == [ResetReceived(yours, Status.DEADLINE_EXCEEDED, "too late")]
    assert two.server.open_calls == 1
    two.server.reply(yours, two.now, b"\x01")
    two.run()
    assert two.replies() == []
    assert two.client.open_calls == two.server.open_calls == 0
    assert mine.state is State.CLOSED


def test_a_reset_that_crosses_the_reply_is_ignored() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.reply(yours, two.now)
    two.client.reset(mine, two.now)
    two.run()
    assert (two.server_events, two.replies()) == ([], [])
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_reset_of_a_call_that_was_not_sent_never_sends_it() -> None:
    two = Pair()
    mine = two.call()
    two.client.reset(mine, two.now)
    two.run()
    assert two.server_events == []
    assert two.client.open_calls == 0


def test_a_reset_takes_the_place_of_a_reply_that_waits_behind_data() -> None:
    two = Pair({"limits": NARROW})
    mine, yours = two.accept()
    two.server.reply(yours, two.now, LARGE)
    two.to_client()
    two.client.reset(mine, two.now)
    two.run()
    assert two.server_events == []
    assert two.replies() == []
    assert two.client.open_calls == two.server.open_calls == 0


def test_a_second_reset_does_nothing() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.client.reset(mine, two.now)
    two.client.reset(mine, two.now)
    two.run()
    two.server.reply(yours, two.now)
    two.run()
    two.client.reset(mine, two.now)
    two.run()
    assert len(two.server_events) == 1


def test_calls_that_gave_up_waiting_do_not_pile_up() -> None:
    """A server that never answers must not make its client hold calls that nobody waits for."""
    two = Pair(server_options={"limits": Limits(max_calls=64)})
    for _ in range(64):
        two.call()
    two.run()
    patient = [two.call() for _ in range(10)]
    two.client.club([Stream("Vault.put", b"\x90") for _ in range(2)], two.now)
    abandoned = Stream("Vault.put", b"\x90")
    two.client.club([abandoned, Stream("Vault.put", b"\x90")], two.now)
    two.client.reset(abandoned, two.now)
    for _ in range(1000):
        two.client.reset(two.call(), two.now)
    two.run()
    for call in two.arrived():
        two.server.reply(call, two.now)
    two.run()
    arrived = two.arrived()
    assert len(arrived) == len(patient) + 4
    two.server_events.clear()
    for call in arrived:
        two.server.reply(call, two.now)
    two.run()
    assert len(two.replies()) == 64 + len(patient) + 3


def test_a_club_that_nobody_waits_for_is_not_sent() -> None:
    two = Pair()
    club = [Stream("Vault.put", b"\x90") for _ in range(2)]
    for _ in range(20):
        two.call()
    two.client.club(club, two.now)
    for call in club:
        two.client.reset(call, two.now)
    two.run()
    assert len(two.arrived()) == 20


# Metadata and AUTH.


def test_metadata_come_ahead_of_everything() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.send_metadata(yours, [("k", b"v")])
    two.server.send(yours, b"data")
    two.server.reply(yours, two.now)
    two.run()
    assert two.client_events == [
        MetadataReceived(mine, [("k", b"v")]),
        Readable(mine),
        RepliesReceived([(mine, None, None)]),
    ]


def test_metadata_of_a_call_that_was_reset_are_not_told() -> None:
    two = Pair()
    mine, yours = two.accept()
    two.server.send_metadata(yours, [("k", "v")])
    two.client.reset(mine, two.now)
    two.run()
    assert two.client_events == []


def test_metadata_go_once_and_before_data() -> None:
    two = Pair()
    _, once = two.accept()
    two.server.send_metadata(once, [("k", "v")])
    _, sending = two.accept()
    two.server.send(sending, b"")
    _, replied = two.accept()
    two.server.reply(replied, two.now)
    for late in (once, sending, replied):
        with pytest.raises(LocalProtocolError, match="too late"):
            two.server.send_metadata(late, [("k", "v")])


def test_metadata_that_the_client_would_refuse_are_not_sent() -> None:
    two = Pair()
    _, yours = two.accept()
    with pytest.raises(LocalProtocolError, match="metadata above"):
        two.server.send_metadata(yours, [("k", bytes(9_000))])
    two.server.send_metadata(yours, [("k", "v")])


def test_a_token_goes_ahead_of_the_calls() -> None:
    two = Pair()
    two.call()
    two.client.authenticate("secret", [("tenant", "a")])
    two.run()
    assert two.server_events[0] == AuthReceived("secret", [("tenant", "a")])
    assert isinstance(two.server_events[1], CallsReceived)
    with pytest.raises(LocalProtocolError, match="token"):
        two.client.authenticate("x" * 16_385)


def test_a_call_knows_the_token_that_it_came_after() -> None:
    """Also one that is told of later, since it waited for another, or for its arguments."""
    two = Pair()
    two.call()
    two.run()
    two.client.authenticate("first")
    needed = Stream("Vault.begin", b"\x90")
    needs = Stream("Vault.write", b"\x91\xc0", references=(Reference(0, 0),))
    two.client.club([needed, needs], two.now)
    two.run()
    two.client.authenticate("second")
    two.call()
    two.run()
    without, one, other = (
        event.calls[0] for event in two.server_events if isinstance(event, CallsReceived)
    )
    first, second = (event for event in two.server_events if isinstance(event, AuthReceived))
    two.server_events.clear()
    two.server.reply(one, two.now, b"\x07")
    two.run()
    (ready,) = (event.calls[0] for event in two.server_events if isinstance(event, CallsReceived))
    assert [without.token, one.token, other.token, ready.token] == [None, first, second, first]
    assert repr(first) == "AuthReceived()", "a token isn't for logs"


def test_there_are_events_until_all_are_told_and_after_an_error_always() -> None:
    client, server = Connection("client", now=0.0), Connection("server", now=0.0)
    assert not server.has_events
    server.receive_data(b"".join(client.data_to_send(0.0)), 0.0)
    assert server.has_events
    assert isinstance(server.next_event(), SettingsReceived)
    assert not server.has_events
    server.receive_data(b"\x7f" * 12, 0.0)
    for _ in range(2):
        assert server.has_events
        with pytest.raises(RemoteProtocolError):
            server.next_event()
