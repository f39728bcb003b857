"""What waits to be sent is bounded for all streams of a connection together."""

from druvarpc.protocol import Stream, Writable
from tests.protocol.pair import Pair

PIECE = bytes(200 * 1024)
MARK = 16 * 1024 * 1024


def crowded(size: int) -> tuple[Pair, list[Stream], list[Stream]]:
    """Return a pair with `size` calls, and their streams on the client and on the server."""
    pair = Pair()
    near = [pair.call() for _ in range(size)]
    pair.run()
    return pair, near, pair.arrived()


def fill(pair: Pair, calls: list[Stream]) -> int:
    """Let each call send until it is told to wait; return what they queued, in bytes."""
    queued = 0
    for call in calls:
        has_room = True
        while has_room:
            has_room = pair.server.send(call, PIECE)
            queued += len(PIECE)
    return queued


def test_a_peer_that_takes_nothing_pins_little_more_than_the_mark() -> None:
    pair, _, far = crowded(500)
    assert fill(pair, far) <= MARK + 500 * len(PIECE)


def test_each_goes_on_when_its_own_messages_have_gone() -> None:
    pair, near, far = crowded(200)
    fill(pair, far)
    waiting = set(far)
    for _ in range(10_000):
        pair.run()
        waiting -= {event.stream for event in pair.server_events if isinstance(event, Writable)}
        if not waiting:
            break
        for stream in near:
            while pair.client.take(stream, pair.now) is not None:
                pass
    assert not waiting


def test_what_was_dropped_no_longer_counts() -> None:
    pair, near, far = crowded(200)
    fill(pair, far)
    for stream in near:
        pair.client.reset(stream, pair.now)
    pair.run()
    for call in far:
        pair.server.reply(call, pair.now)
    _, fresh = pair.accept()
    assert pair.server.send(fresh, b"x")


def test_a_call_given_up_before_it_was_sent_no_longer_counts() -> None:
    pair = Pair()
    for _ in range(100):
        stream = pair.call(more=True)
        pair.client.send(stream, PIECE)
        pair.client.reset(stream, pair.now)
    stream = pair.call(more=True)
    assert pair.client.send(stream, PIECE)
