"""However the input is cut into pieces, the core makes the same of it, and for the same work."""

import sys
from collections.abc import Callable, Sequence
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.protocol import Algorithm, Connection, Limits, RemoteProtocolError, Stream
from druvarpc.protocol.frames import DATA, MAGIC, PREFACE
from tests.protocol.dialogue import (
    COMPRESSION,
    LIMITS,
    SCRIPTS,
    Say,
    answer,
    frames,
    heard,
    speak,
    split,
)

CUTS = st.lists(st.floats(0, 1), max_size=12)


def server(compression: Sequence[Algorithm] = ()) -> Connection:
    return Connection("server", now=0.0, limits=LIMITS, compression=compression)


@given(script=SCRIPTS, cuts=CUTS, by=COMPRESSION)
def test_a_server_hears_the_same_in_any_pieces(
    script: list[Say], cuts: list[float], by: Sequence[Algorithm]
) -> None:
    _, said = speak(script, by)
    assert heard(server(by), split(said, cuts)) == heard(server(by), [said])


@given(script=SCRIPTS, cuts=CUTS, by=COMPRESSION)
def test_a_client_hears_the_same_in_any_pieces(
    script: list[Say], cuts: list[float], by: Sequence[Algorithm]
) -> None:
    client, said = speak(script, by)
    other, _ = speak(script, by)
    answered = answer(script, said, by)
    assert heard(client, split(answered, cuts)) == heard(other, [answered])


@given(
    script=SCRIPTS,
    cuts=CUTS,
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    by=COMPRESSION,
)
def test_what_is_wrong_is_found_alike_in_any_pieces(
    script: list[Say], cuts: list[float], place: float, byte: int, by: Sequence[Algorithm]
) -> None:
    said = bytearray(speak(script, by)[1])
    said[int(place * len(said))] = byte
    whole = bytes(said)
    assert heard(server(by), split(whole, cuts)) == heard(server(by), [whole])


@given(script=SCRIPTS.filter(lambda script: sum(say.size for say in script) < 10_000))
def test_single_bytes_tell_the_same(script: list[Say]) -> None:
    _, said = speak(script)
    assert heard(server(), [bytes([byte]) for byte in said]) == heard(server(), [said])


@pytest.mark.parametrize("wrong", range(len(MAGIC)))
def test_a_wrong_preface_is_refused_from_the_first_byte_that_differs(wrong: int) -> None:
    core = server()
    for byte in MAGIC[:wrong]:
        core.receive_data(bytes([byte]), 0.0)
    assert core.next_event() is None
    core.receive_data(b"G", 0.0)
    with pytest.raises(RemoteProtocolError, match="preface"):
        core.next_event()


def calls_of(work: Callable[[], None]) -> int:
    """Count the calls, of functions in Python and in C, that some work makes."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("piece", [1, 1000, 5000])
def test_the_work_for_one_frame_grows_with_its_pieces_and_no_faster(piece: int) -> None:
    def work(size: int) -> int:
        client = Connection("client", now=0.0)
        core = Connection(
            "server",
            now=0.0,
            limits=Limits(max_frame=2**20, stream_window=2**20, connection_window=2**20),
        )
        core.receive_data(PREFACE, 0.0)
        client.call(Stream("Vault.put", b"\x90", more=True), 0.0)
        core.receive_data(b"".join(client.data_to_send(0.0))[len(PREFACE) :], 0.0)
        data = b"\x12" + size.to_bytes(3, "big") + b"\x01" + (1).to_bytes(7, "big") + b"x" * size
        pieces = [data[at : at + piece] for at in range(0, len(data), piece)]

        def feed() -> None:
            for one in pieces:
                core.receive_data(one, 0.0)

        return calls_of(feed)

    small, large = work(40_000), work(160_000)
    assert large <= 4.2 * small


def test_a_frame_within_one_piece_is_not_copied_until_its_message_is_whole() -> None:
    """Parts are views of the input, joined once."""
    core = Connection("server", now=0.0)
    client = Connection("client", now=0.0)
    stream = Stream("Vault.put", b"\x90", more=True)
    client.call(stream, 0.0)
    client.send(stream, b"x" * 60_000)
    said = b"".join(client.data_to_send(0.0))
    kinds = [kind for kind, _ in frames(said)]
    assert kinds[-1] == DATA
    core.receive_data(said, 0.0)
    events = []
    while (event := core.next_event()) is not None:
        events.append(event)
    [served] = events[-1].calls
    assert core.take(served, 0.0) == b"x" * 60_000
