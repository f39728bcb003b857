"""Nothing is left behind after a million streams."""

import gc
import sys
from types import BuiltinFunctionType, FunctionType, ModuleType

from druvarpc.errors import Status
from druvarpc.protocol import (
    CallsReceived,
    Connection,
    Outcome,
    Reference,
    RepliesReceived,
    ResetReceived,
    Stream,
)
from tests.protocol.pair import Pair

CLUB = 1000
# Of each club so many are expensive: they send and receive data, are reset, fail or refer to
# others. A larger share tests no more and takes longer.
EXPENSIVE = 20
# Coverage's tracer would take a minute for a million, and learns no more from them.
MILLION = 1_000_000 if sys.gettrace() is None else 200_000


def deep_size(*roots: object) -> int:
    """Return the bytes of all objects that can be reached, classes and code left out."""
    seen: dict[int, object] = {}
    found = list(roots)
    while found:
        one = found.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen[id(one)] = one
        if not isinstance(one, BuiltinFunctionType):
            found += gc.get_referents(one)
    return sum(map(sys.getsizeof, seen.values()))


class Traffic:
    """A pair that calls and answers in rounds."""

    def __init__(self) -> None:
        self.pair = Pair()
        self.submitted = self.answered = 0

    def round(self) -> None:
        pair = self.pair
        client = pair.client
        methods = ["Vault.put", "Vault.put", "Vault.wait"]
        expensive = [pair.call(methods[i % 3], more=True) for i in range(EXPENSIVE)]
        for index, stream in enumerate(expensive):
            client.send(stream, b"u" * 100 * index)
            if index % 2:
                client.send(stream, b"u" * 9_000)
                client.end(stream)
        for _ in range(CLUB - EXPENSIVE - 5):
            client.call(Stream("Vault.get", b"\x91\x01"), pair.now)
        client.club(
            [
                Stream("Vault.get", b"\x91\xc0", references=(Reference(0, i - 1),) if i else ())
                for i in range(5)
            ],
            0.0,
        )
        abandoned = pair.call()
        client.reset(abandoned, pair.now)
        self.submitted += CLUB
        self.pass_on()
        # Some were replied to while they could still send; those that nobody answers are reset.
        for stream in expensive:
            if stream.method == "Vault.wait":
                client.reset(stream, pair.now)
                self.answered += 1
        pair.now += 0.01
        self.pass_on()
        assert self.answered == self.submitted

    def pass_on(self) -> None:
        pair = self.pair
        client, server = pair.client, pair.server
        while client.wants_to_send or server.wants_to_send:
            server.receive_data(b"".join(client.data_to_send(pair.now)), pair.now)
            self.serve(server)
            client.receive_data(b"".join(server.data_to_send(pair.now)), pair.now)
            while (event := client.next_event()) is not None:
                if isinstance(event, RepliesReceived):
                    self.answered += len(event.replies)
                    for stream, payload, _ in event.replies:
                        if payload is None:
                            while client.take(stream, pair.now) is not None:
                                pass

    def serve(self, server: Connection) -> None:
        now = self.pair.now
        while (event := server.next_event()) is not None:
            if isinstance(event, CallsReceived):
                for stream in event.calls:
                    if not stream.more:
                        server.reply(stream, now, b"\x01")
                    elif stream.method == "Vault.put":
                        server.take(stream, now)
                        server.send(stream, b"d" * 5_000)
                        server.reply(stream, now, None, None)
            elif isinstance(event, ResetReceived):
                server.reply(event.stream, now, None, Outcome(Status.CANCELLED))


def test_nothing_is_left_behind_after_a_million_streams() -> None:
    traffic = Traffic()
    sizes: list[tuple[int, int]] = []
    for done in range(CLUB, MILLION + 1, CLUB):
        traffic.round()
        if done in (100_000, MILLION):
            gc.collect()
            core = traffic.pair.client, traffic.pair.server
            sizes.append((deep_size(*core), sys.getallocatedblocks()))
    assert traffic.pair.client.open_calls == traffic.pair.server.open_calls == 0
    (core, blocks), (core_later, blocks_later) = sizes
    assert core_later <= core + 2_000, "the cores are no larger"
    assert blocks_later <= blocks + 1_000, "nor is anything else kept alive"
