"""What each side notes of where a call's time goes, and what of it crosses the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.errors import Status
from druvarpc.protocol import (
    Clubbing,
    Limits,
    Outcome,
    Reference,
    Stream,
    Times,
)
from druvarpc.protocol.times import share
from tests.protocol.pair import Pair

LARGE = b"x" * 300_000


def noted(stream: Stream) -> Times:
    assert stream.times is not None
    return stream.times


def timings_of(two: Pair) -> tuple[int, int, int] | None:
    [(_, _, outcome)] = two.replies()
    assert outcome is not None
    return outcome.timings


def test_a_client_notes_when_a_call_goes_out() -> None:
    two = Pair({"clubbing": Clubbing(linger=2.0)}, now=10.0)
    call = two.call(timings=True)
    two.now = 12.0
    two.client.handle_timer(two.now)
    assert noted(call).start == 10.0
    assert noted(call).begun is None
    assert not two.client.timed
    two.client.data_to_send(two.now)
    assert noted(call).begun == 12.0
    assert noted(call).done is None
    assert two.client.timed
    two.client.written(15.0)
    assert noted(call).done == 15.0
    assert not two.client.timed


def test_only_what_was_returned_last_is_noted_as_written() -> None:
    two = Pair()
    first = two.call(timings=True)
    two.client.data_to_send(two.now)
    second = two.call(timings=True)
    two.client.data_to_send(two.now)
    two.client.written(1.0)
    assert noted(first).done is None
    assert noted(second).done == 1.0


def test_calls_that_do_not_ask_have_no_times() -> None:
    two = Pair()
    asking, other = two.call(timings=True), two.call()
    two.run()
    yours = two.arrived()
    for call in yours:
        two.server.reply(call, two.now, b"\xc0")
    two.run()
    assert other.times is None
    assert [call.times is None for call in yours] == [False, True]
    (first, second) = two.replies()
    assert first == (asking, b"\xc0", Outcome(trailers=(), timings=(0, 0, 0)))
    assert second == (other, b"\xc0", None)


def test_a_server_tells_its_queue_and_its_handler() -> None:
    two = Pair(now=5.0)
    _, yours = two.accept(timings=True)
    noted(yours).begun = 5.25
    two.server.reply(yours, 6.0, b"\xc0")
    two.run()
    assert timings_of(two) == (250_000, 750_000, 0)


def test_a_handler_that_waits_for_its_peer_does_not_work() -> None:
    two = Pair()
    _, yours = two.accept(timings=True)
    times = noted(yours)
    times.begun = 1.0
    times.pause(2.0)
    times.pause(3.0)  # another task's, at the same time
    times.resume(4.0)
    assert times.idle(4.5) == 2.5
    times.resume(5.0)
    times.pause(6.0)
    assert times.idle(6.5) == 3.5
    times.resume(7.0)
    two.server.reply(yours, 10.0, b"\xc0")
    two.run()
    assert timings_of(two) == (1_000_000, 5_000_000, 0)


def test_a_call_that_was_refused_was_only_in_the_queue() -> None:
    two = Pair()
    _, yours = two.accept(timings=True)
    two.server.reply(yours, 3.0, None, Outcome(Status.UNAVAILABLE, not_started=True))
    two.run()
    assert timings_of(two) == (3_000_000, 0, 0)


def test_what_the_owner_tells_by_itself_counts() -> None:
    two = Pair()
    _, yours = two.accept(timings=True)
    two.server.reply(yours, 3.0, b"\xc0", Outcome(timings=(1, 2, 3)))
    two.run()
    assert timings_of(two) == (1, 2, 3)


def test_the_queue_begins_when_the_arguments_are_complete() -> None:
    two = Pair()
    two.call(payload=LARGE, timings=True)
    two.run()
    two.client.data_to_send(two.now)
    [yours] = two.arrived()
    assert noted(yours).start == 0.0

    late = Pair(settled=False)
    call = late.call(payload=LARGE, timings=True)
    late.to_server()  # as far as the credit goes that all have
    late.now = 4.0
    late.run()
    [yours] = late.arrived()
    assert noted(yours).start == 4.0
    assert call.outgoing is not None
    assert call.outgoing.lacked_credit(9.0) == 4.0


def test_a_call_that_needs_others_waits_for_them_in_the_queue() -> None:
    two = Pair()
    calls = [
        Stream("Vault.begin", b"\x90", timings=True),
        Stream("Vault.write", b"\x91\xc0", references=(Reference(0, 0),), timings=True),
    ]
    two.client.club(calls, two.now)
    two.run()
    for started, ended in ((1.0, 3.0), (3.5, 4.0)):
        [yours] = two.arrived()
        noted(yours).begun = started
        two.server.reply(yours, ended, b"\x01")
        two.run()
    assert [outcome.timings for _, _, outcome in two.replies()] == [
        (1_000_000, 2_000_000, 0),
        (3_500_000, 500_000, 0),
    ]


def test_a_download_tells_how_long_it_lacked_credit() -> None:
    two = Pair()
    mine, yours = two.accept(timings=True)
    noted(yours).begun = 0.0
    for _ in range(5):
        two.server.send(yours, LARGE)
    two.run()
    two.server.reply(yours, 1.0, None)
    two.now = 7.0
    while two.client.take(mine, two.now):
        two.run()
    assert timings_of(two) == (0, 1_000_000, 7_000_000)


def test_waits_that_were_complained_of_count_as_well() -> None:
    two = Pair()
    mine = two.call(more=True)
    two.client.send(mine, b"x" * 10_000_000)
    two.run()
    two.now = two.client.limits.stall_timeout + 1
    two.client.handle_timer(two.now)
    assert mine.outgoing is not None
    assert mine.outgoing.lacked_credit(two.now + 5) == two.now + 5
    two.client.reset(mine, two.now)
    assert mine.outgoing.lacked_credit(0.0) == two.now


@given(st.floats(0, 100), st.lists(st.floats(-1, 100)))
def test_shares_add_up(total: float, parts: list[float]) -> None:
    shares, rest = share(total, parts)
    assert rest >= 0
    assert all(0 <= got <= max(0, part) for got, part in zip(shares, parts, strict=True))
    assert sum(shares) + rest == pytest.approx(total)
    assert rest == 0 or shares == [max(0, part) for part in parts]


# Which calls rode together.


def test_a_client_counts_what_rode_together() -> None:
    two = Pair()
    for methods in ("a", "b", "aab", "baa", "aa", "a"):
        for method in methods:
            two.call(f"Vault.{method}")
        two.run()
    assert two.client.clubs == {
        "Vault.a": [2, 2],
        "Vault.b": [1, 1],
        frozenset({"Vault.a"}): [1, 2],
        frozenset({"Vault.a", "Vault.b"}): [2, 6],
    }
    assert two.server.clubs == {}


def test_there_is_an_end_to_the_combinations() -> None:
    two = Pair(server_options={"limits": Limits(max_calls=10_000)})
    for number in range(300):
        two.call(f"Vault.m{number}")
        two.run()
    two.call("Vault.m7")
    two.run()
    assert len(two.client.clubs) == 257
    assert two.client.clubs[frozenset()] == [44, 44]
    assert two.client.clubs["Vault.m7"] == [2, 2]
