"""What goes next: small calls behind one quantum at most, no lane starved, streams in turn."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.protocol import Connection, Limits, Priority, Stream
from druvarpc.protocol.frames import CALLS, DATA, HEADER_SIZE, unpack_header
from druvarpc.protocol.lanes import Lanes
from tests.protocol.dialogue import frames
from tests.protocol.pair import Pair

QUANTUM = 64 * 1024
WIDE = Limits(stream_window=2**30, connection_window=2**30)
NORMAL, INTERACTIVE, BULK = Priority
# The same messages over and over cost no memory.
MEBIBYTE = bytes(2**20)


def pair() -> Pair:
    return Pair(server_options={"limits": WIDE})


def pour(pair: Pair, lane: Priority, size: int, number: int) -> Stream:
    """Open a stream with more to send than the test will see go."""
    stream = pair.call(more=True, lane=lane)
    for _ in range(number):
        pair.client.send(stream, MEBIBYTE[:size])
    return stream


def spoken(core: Connection, most: int) -> list[tuple[int, int, int]]:
    """Return kind, id and length of the frames that go next, about `most` bytes of them."""
    told: list[tuple[int, int, int]] = []
    for _, data in frames(b"".join(core.data_to_send(0.0, most))):
        head, tail = unpack_header(data)
        told.append((head >> 24, tail & (2**56 - 1), len(data)))
    return told


@given(
    small=st.sampled_from([NORMAL, INTERACTIVE]),
    poured=st.lists(
        st.tuples(
            st.sampled_from([NORMAL, BULK]),
            st.sampled_from([100, 9_000, QUANTUM, 2**20]),
        ),
        min_size=1,
        max_size=6,
    ),
    before=st.lists(st.integers(1, 5 * QUANTUM), max_size=12),
)
def test_a_small_call_waits_for_one_quantum_at_most(
    small: Priority, poured: list[tuple[Priority, int]], before: list[int]
) -> None:
    two = pair()
    for lane, size in poured:
        pour(two, lane, size, max(3, 3 * 2**20 // size))
    for size in before:
        spoken(two.client, size)
    two.call(lane=small)
    sent = 0
    while True:
        [(kind, _, size)] = spoken(two.client, 1)
        if kind == CALLS:
            break
        sent += size
    # Tiny messages of a lane that is overdue may go ahead of its quantum, an eighth at most.
    assert sent <= (QUANTUM + HEADER_SIZE) * 9 / 8


@pytest.mark.parametrize("size", [100, 9_000, QUANTUM, 2**20])
@pytest.mark.parametrize("others", [[NORMAL], [INTERACTIVE], [NORMAL, INTERACTIVE]])
def test_no_lane_starves(size: int, others: list[Priority]) -> None:
    """Not even one whose messages are small, behind lanes whose messages are large."""
    two = pair()
    poured = {pour(two, lane, 2**20, 20): lane for lane in others}
    poured[pour(two, BULK, size, 3 * 2**20 // size)] = BULK
    sent: Counter[Priority] = Counter()
    lanes: dict[int, Priority] = {}
    while sum(sent.values()) < 12 * 2**20:
        for kind, id, length in spoken(two.client, QUANTUM):
            lanes.update((stream.id, lane) for stream, lane in poured.items())
            if kind == DATA:
                sent[lanes[id]] += length
    total = sum(sent.values())
    share = 9 if len(others) == 1 else 10
    assert sent[BULK] >= total / share - QUANTUM
    assert sent[BULK] <= total / share + 2 * QUANTUM, "nor does it take more than that"
    assert sent[others[0]] >= total / 10 - QUANTUM


@given(number=st.integers(2, 8), lane=st.sampled_from(Priority), rounds=st.integers(1, 6))
def test_streams_of_a_lane_take_turns(number: int, lane: Priority, rounds: int) -> None:
    two = pair()
    streams = [pour(two, lane, 2**20, 1) for _ in range(number)]
    told = spoken(two.client, 1)
    assert [kind for kind, _, _ in told] == [CALLS]
    for _ in range(rounds):
        turn = [spoken(two.client, QUANTUM)[0] for _ in range(number)]
        assert sorted(id for _, id, _ in turn) == sorted(stream.id for stream in streams)
        assert {length for _, _, length in turn} == {QUANTUM + HEADER_SIZE}


@given(
    small=st.sampled_from([NORMAL, INTERACTIVE]),
    poured=st.lists(st.sampled_from([100, 9_000, QUANTUM, 2**20]), min_size=1, max_size=4),
    before=st.lists(st.integers(1, 3 * QUANTUM), max_size=8),
    most=st.sampled_from([1, 16 * 1024, QUANTUM]),
)
def test_a_small_call_goes_out_with_the_very_next_write(
    small: Priority, poured: list[int], before: list[int], most: int
) -> None:
    """Before any bulk, whatever was sent until then."""
    two = pair()
    for size in poured:
        pour(two, BULK, size, max(2, 2 * 2**20 // size))
    for size in before:
        spoken(two.client, size)
    two.call(lane=small)
    kind, _, _ = spoken(two.client, most)[0]
    assert kind == CALLS


@given(
    poured=st.lists(
        st.tuples(st.sampled_from([NORMAL, BULK]), st.sampled_from([9_000, QUANTUM, 2**20])),
        min_size=1,
        max_size=4,
    ),
    before=st.lists(st.integers(1, 3 * QUANTUM), max_size=8),
)
def test_beside_data_of_its_own_lane_it_waits_for_one_write_at_most(
    poured: list[tuple[Priority, int]], before: list[int]
) -> None:
    """One small write; a lane that is overdue may take that, and no more."""
    two = pair()
    for lane, size in poured:
        pour(two, lane, size, max(2, 2 * 2**20 // size))
    for size in before:
        spoken(two.client, size)
    two.call(lane=NORMAL)
    sent, kinds = 0, set[int]()
    while CALLS not in kinds:
        told = spoken(two.client, 16 * 1024)
        kinds |= {kind for kind, _, _ in told}
        sent += sum(length for kind, _, length in told if kind == DATA)
    assert sent <= 9 / 8 * (QUANTUM + HEADER_SIZE) + 16 * 1024


@given(
    lane=st.sampled_from(Priority),
    number=st.integers(2, 5),
    sizes=st.lists(st.sampled_from([1000, 20_000, 100_000, 2**20]), min_size=5, max_size=5),
    writes=st.lists(st.integers(1, 256 * 1024), min_size=1, max_size=60),
)
def test_streams_of_a_lane_get_the_same(
    lane: Priority, number: int, sizes: list[int], writes: list[int]
) -> None:
    """Within two quanta, over any time in which they have data, whatever the messages."""
    two = pair()
    for size in sizes[:number]:
        pour(two, lane, size, 16 * 2**20 // size)
    spoken(two.client, 1)
    after: list[list[int]] = [[0] * number]
    for most in writes:
        now = list(after[-1])
        for _, id, length in spoken(two.client, most):
            now[id - 1] += length
        after.append(now)
    for one in range(1, number):
        ahead = [counts[one] - counts[0] for counts in after]
        assert max(ahead) - min(ahead) <= 2 * (QUANTUM + HEADER_SIZE)


def test_what_yields() -> None:
    """Bulk alone; and whatever small calls have gone ahead of lately."""
    two = pair()
    assert not two.client.yields(0.0)
    stream = pour(two, BULK, 2**20, 2)
    two.client.data_to_send(0.0, 1)
    assert two.client.yields(0.0)
    two.call()
    assert not two.client.yields(0.0), "the call itself goes first"
    two.client.data_to_send(0.0, 1)
    two.client.reset(stream, 0.0)
    pour(two, NORMAL, 2**20, 2)
    assert two.client.yields(0.9), "data of another lane does, so that others have it as well"
    assert not two.client.yields(1.1)
    two.call(lane=INTERACTIVE)
    two.client.data_to_send(2.0, 1)
    assert two.client.yields(2.9)
    assert not two.client.yields(3.1)


def test_what_waits_beside_other_lanes() -> None:
    lanes: Lanes[str] = Lanes()
    assert not lanes.only_bulk
    for lane in Priority:
        assert not lanes.waits_behind(lane)
    lanes.add("bulk", BULK)
    assert lanes.only_bulk
    assert lanes.waits_behind(INTERACTIVE)
    assert lanes.waits_behind(NORMAL)
    lanes.add("normal", NORMAL)
    assert not lanes.only_bulk
    lanes.remove("bulk", BULK)
    assert not lanes.only_bulk
    assert lanes.waits_behind(INTERACTIVE)
    assert not lanes.waits_behind(NORMAL)


def test_replies_overtake_data() -> None:
    two = pair()
    _, streaming = two.accept()
    _, quick = two.accept()
    for _ in range(3):
        two.server.send(streaming, MEBIBYTE)
    spoken(two.server, 1)
    two.server.reply(quick, 0.0, b"\x01")
    two.to_client()
    [(_, payload, _)] = two.replies()
    assert payload == b"\x01"


def test_calls_do_not_keep_data_of_their_own_lane_waiting() -> None:
    """A queue of calls takes turns with the streams when one frame doesn't hold it."""
    two = Pair(server_options={"limits": WIDE})
    stream = pour(two, NORMAL, 2**20, 1)
    spoken(two.client, 1)
    for _ in range(40):
        two.call(payload=bytes(9_000))
    kinds = [kind for kind, _, _ in spoken(two.client, 6 * QUANTUM)]
    assert CALLS in kinds
    assert DATA in kinds[: 2 * kinds.count(CALLS)]
    assert stream.id == 1


def test_nothing_waits_in_empty_lanes() -> None:
    lanes: Lanes[str] = Lanes()
    assert not lanes.waiting
    assert lanes.next() is None
    lanes.add("a", BULK)
    lanes.add("b", NORMAL)
    lanes.add_first("c", NORMAL)
    lanes.remove("b", NORMAL)
    assert lanes
    assert [lanes.next(), lanes.next(), lanes.next()] == [("c", NORMAL), ("a", BULK), None]
