"""What is asked of the kernel's TCP: the policy, by numbers, and what comes of it on sockets."""

import fcntl
import math
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import druvarpc
from druvarpc.tcp import (
    CAP,
    CAPPED_ROUNDS,
    GENTLE_CAP,
    LEAST_CAP,
    LEAST_UNSENT,
    MOST_UNSENT,
    NO_CAP,
    STALE_ROUNDS,
    TUNE_EVERY,
    Pacing,
    SendBuffer,
    send_buffer,
)
from druvarpc.transports import SocketTransport

RTT = 0.08
MB = 1000 * 1000
# Of Linux: bytes that are in the send buffer and haven't been sent.
SIOCOUTQNSD = 0x894B


def test_what_is_unsent_follows_the_rate():
    pacing = Pacing(bbr=False)
    for rate, unsent in (
        (0, LEAST_UNSENT),
        (MB, LEAST_UNSENT),
        (12 * MB, 24_000),
        (125 * MB, 250_000),
        (2**40, MOST_UNSENT),
    ):
        pacing.follow(0, RTT, rate, rate, queued=True, gentle=False)
        assert pacing.unsent == unsent
        assert pacing.cap == NO_CAP


def test_more_may_be_unsent_while_it_probes():
    pacing = Pacing(bbr=True)
    pacing.follow(0, RTT, 12 * MB, 6 * MB, queued=True, gentle=False)
    assert pacing.unsent == 240_000


def test_more_may_be_unsent_in_a_process_that_is_late():
    pacing = Pacing(bbr=True)

    def unsent(dry: bool) -> int:
        pacing.follow(0, RTT, 12 * MB, 12 * MB, queued=False, gentle=False, dry=dry)
        return pacing.unsent

    assert [unsent(True) for _ in range(6)] == [48_000, 96_000, 192_000, 384_000, 384_000, 384_000]
    assert unsent(False) < 384_000
    for _ in range(200):
        unsent(False)
    assert unsent(False) == 24_000


def test_a_socket_that_ran_dry_is_noticed(connection, monkeypatch):
    near, far = connection
    near.setblocking(False)
    noticed: list[bool] = []
    monkeypatch.setattr(Pacing, "follow", lambda *_, dry, **__: noticed.append(dry))
    buffer = SendBuffer(near, long=0)

    def tune() -> None:
        for _ in range(TUNE_EVERY):
            buffer.tune()

    def fill() -> None:
        with suppress(BlockingIOError):
            while True:
                near.send(bytes(64 * 1024))

    def drain() -> None:
        while unsent(near):
            far.recv(1 << 20)

    fill()
    tune()  # learns that the way is long enough
    tune()
    drain()
    buffer.tune()
    fill()
    tune()  # once of eight times
    tune()
    assert noticed[1:4] == [False, True, False]


def test_a_start_up_that_does_not_end_is_held_back():
    pacing = Pacing(bbr=True)
    capped = []
    for trip in range(40):
        now = trip * RTT
        # What arrives falls while less is sent.
        arriving = 10 * MB if pacing.cap == NO_CAP else pacing.cap
        pacing.follow(now, RTT, min(29 * MB, pacing.cap), int(arriving), queued=True, gentle=False)
        capped.append(pacing.cap)
    first = capped.index(CAP * 10 * MB)
    assert STALE_ROUNDS <= first <= STALE_ROUNDS + 2
    held = capped[first : first + CAPPED_ROUNDS]
    assert set(held) == {CAP * 10 * MB}, "one cap for all of that time"
    assert capped[first + CAPPED_ROUNDS + 1] == NO_CAP


def test_a_start_up_that_grows_is_let_go_on():
    pacing = Pacing(bbr=True)
    arriving = 1.0 * MB
    for trip in range(40):
        pacing.follow(trip * RTT, RTT, int(2.9 * arriving), int(arriving), queued=True, gentle=True)
        assert pacing.cap == NO_CAP
        arriving *= 1.3


@pytest.mark.parametrize(
    ("bbr", "arriving", "queued"), [(False, MB, True), (True, 0, True), (True, MB, False)]
)
def test_nothing_else_is_held_back(bbr, arriving, queued):
    """Neither another congestion control, nor a rate that isn't known, nor where no queue is."""
    pacing = Pacing(bbr=bbr)
    for trip in range(100):
        pacing.follow(trip * RTT, RTT, 29 * MB, arriving, queued=queued, gentle=False)
        assert pacing.cap == NO_CAP


def test_the_gentle_send_little_more_than_arrives():
    pacing = Pacing(bbr=True)
    pacing.follow(0, RTT, 12 * MB, 10 * MB, queued=True, gentle=True)
    assert pacing.cap == int(GENTLE_CAP * 10 * MB)
    pacing.follow(1, RTT, 11 * MB, 9 * MB, queued=True, gentle=True)
    assert 1.09 * 10 * MB < pacing.cap < 1.1 * 10 * MB, "the greatest of late counts"
    pacing.follow(2, RTT, 11 * MB, 9 * MB, queued=True, gentle=False)
    assert pacing.cap == NO_CAP


rates = st.one_of(st.integers(0, 1000), st.integers(0, 10**9), st.integers(0, 2**64 - 1))


@given(
    bbr=st.booleans(),
    steps=st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 5), rates, rates, st.booleans()), max_size=40
    ),
)
def test_limits_that_a_socket_takes(bbr, steps):
    pacing, now = Pacing(bbr=bbr), 0.0
    for seconds, rtt, sending, arriving, gentle in steps:
        now += seconds
        pacing.follow(now, rtt, sending, arriving, queued=True, gentle=gentle)
        assert LEAST_UNSENT <= pacing.unsent <= MOST_UNSENT
        assert LEAST_CAP <= pacing.cap <= NO_CAP
        assert len(struct.pack("=I", pacing.cap)) == 4


# --- sockets ---


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    with near, far:
        yield near, far


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells and takes rates")


def unsent(connected: socket.socket) -> int:
    value: int = struct.unpack("i", fcntl.ioctl(connected, SIOCOUTQNSD, bytes(4)))[0]
    return value


@linux_only
@pytest.mark.parametrize("gentle", [False, True])
async def test_little_lies_unsent(connection, gentle):
    """Before a peer that reads slowly, and one that stops."""
    near, far = connection
    far.setblocking(False)
    watched = near.dup()
    transport = SocketTransport(
        trio.SocketStream(trio.socket.from_stdlib_socket(near)), druvarpc.Peer("peer")
    )
    transport.hold_back(gentle)
    most = 0
    size = 0

    async def send() -> None:
        nonlocal most, size
        while True:
            offered = transport.write_size
            rest = transport.send_nowait([bytes(offered)])
            size += offered - sum(map(len, rest))
            most = max(most, unsent(watched))
            await transport.wait_writable()

    with watched:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            taken = 0
            while taken < 8 * MB:
                await trio.lowlevel.wait_readable(far)
                taken += len(far.recv(10_000))
            reading = most
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        transport.close()
    assert size >= 8 * MB
    # The kernel takes a whole segment of its own, up to 64 KiB, beyond the limit.
    assert 0 < most <= MOST_UNSENT + 64 * 1024
    assert reading <= MOST_UNSENT + 64 * 1024


def test_other_sockets_are_not_tuned():
    one, other = socket.socketpair()
    with one, other:
        assert send_buffer(one) is None


@pytest.mark.parametrize("kind", ["unix", "udp", "closed"])
def test_a_socket_that_takes_no_options_is_left_alone(kind):
    if kind == "unix":
        connected, other = socket.socketpair()
        other.close()
    elif kind == "udp":
        connected = socket.socket(type=socket.SOCK_DGRAM)
    else:
        connected = socket.socket()
        connected.close()
    with connected:
        buffer = SendBuffer(connected)
        for _ in range(3 * TUNE_EVERY):
            assert not buffer.tune()
        assert buffer.unsent == LEAST_UNSENT


@linux_only
def test_the_limit_is_set(connection):
    near, far = connection
    near.setblocking(False)
    buffer = SendBuffer(near, long=0)
    changed = False
    for _ in range(200 * TUNE_EVERY):
        near.send(bytes(64 * 1024))
        far.recv(1 << 20)
        changed = buffer.tune() or changed
    assert changed
    assert buffer.unsent > LEAST_UNSENT
    assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == buffer.unsent
    assert math.isfinite(buffer.unsent)


@linux_only
def test_on_a_short_way_nothing_is_changed(connection):
    near, far = connection
    near.setblocking(False)
    buffer = send_buffer(near)
    assert buffer is not None
    for _ in range(20 * TUNE_EVERY):
        near.send(bytes(64 * 1024))
        far.recv(1 << 20)
        assert not buffer.tune()
        assert buffer.has_room()
    assert buffer.unsent == LEAST_UNSENT
    assert buffer.patience == math.inf


@linux_only
def test_there_is_room_while_little_is_unsent(connection):
    near, far = connection
    near.setblocking(False)
    buffer = SendBuffer(near, long=0)
    for _ in range(2 * TUNE_EVERY):
        near.send(bytes(64 * 1024))
        far.recv(1 << 20)
        buffer.tune()
    assert 0 < buffer.patience < 0.005
    with suppress(BlockingIOError):
        while True:
            near.send(bytes(64 * 1024))
    assert unsent(near) > buffer.unsent // 2
    assert not buffer.has_room()
    while unsent(near):
        far.recv(1 << 20)
    assert buffer.has_room()
