"""The golden vectors, which were composed from docs/protocol.md alone, against the core.

A vector says what bytes mean, in words that the file's "about" explains. Here the core hears the
bytes, whole and in pieces, and what it tells is put in those words. Some of it it tells in another
way: messages are taken at the end, since nothing consumes them before; arguments that come as a
stream's first message are the payload of a call that is told later; a call with references is told
when they are resolved; PONGs are among what it sends; and of credit it tells nothing.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any

import msgpack
import pytest

from druvarpc.compression import Zlib
from druvarpc.errors import CloseCode, Status
from druvarpc.protocol import (
    AuthReceived,
    CallsReceived,
    Connection,
    GoAwayReceived,
    Limits,
    MetadataReceived,
    PongReceived,
    RemoteProtocolError,
    RepliesReceived,
    ResetReceived,
    Settings,
    SettingsReceived,
    State,
    Stream,
)
from druvarpc.zstd import Zstd

HANDSHAKE = bytes.fromhex("8b44525556410a01 01 000001 00 00000000000000 90")
# The defaults of section 4, which are less than this implementation's.
LIMITS = Limits(
    **{name: getattr(Settings(), name) for name in Settings.__slots__ if name != "compression"}
)
HEADER = Struct("!IQ")
PING, PONG = 0x02, 0x03
# Longer vectors are cut into pieces of a prime size instead of single bytes.
LONG = 20_000

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())["vectors"]


def expand(text: str, pings: list[int]) -> bytes:
    text = re.sub(r"<ping (\d)>", lambda found: f"{pings[int(found[1]) - 1]:014x}", text)
    return b"".join(
        bytes.fromhex(repeated) * int(count) if repeated else bytes.fromhex(plain)
        for repeated, count, plain in re.findall(r"\(([^)]*)\)\*(\d+)|([^(]+)", text)
    )


def frames_of(data: bytes) -> list[tuple[int, int]]:
    """The type and the id of each frame in bytes without a preface."""
    found = []
    while data:
        head, tail = HEADER.unpack_from(data)
        found.append((head >> 24, tail & 2**56 - 1))
        data = data[HEADER.size + (head & 0xFFFFFF) :]
    return found


class Receiver:
    """The core in the role and the state that a vector asks for."""

    def __init__(self, vector: dict[str, Any]) -> None:
        announced = vector.get("compression", 0)
        self.connection = Connection(
            vector["receiver"],
            now=0,
            limits=LIMITS,
            compression=[one for one in (Zstd(), Zlib()) if one.number & announced],
        )
        self.streams: dict[int, Stream] = {}
        self.abandoned: set[int] = set()
        self.pings: list[int] = []
        self.pongs: list[int] = []
        self.flush(8)
        if "raw" in vector:
            return
        self.connection.receive_data(HANDSHAKE, 0)
        for ping in self.flush():
            self.connection.receive_data(HEADER.pack(PONG << 24, ping), 0)
        before = expand(vector["before"], [])
        if vector["receiver"] == "server":
            self.feed(before)
            self.flush()
        for step in vector["state"]:
            self.step(step)
            self.pings += self.flush()
        if vector["receiver"] == "client":
            self.feed(before)
            self.flush()

    def feed(self, data: bytes, piece: int | None = None) -> list[Any]:
        """Let the core hear bytes; return what it tells, in the file's words."""
        size = piece or max(1, len(data))
        for start in range(0, len(data), size):
            self.connection.receive_data(data[start : start + size], 0)
        told = []
        while (event := self.connection.next_event()) is not None:
            told += self.describe(event)
        return told

    def flush(self, skip: int = 0) -> list[int]:
        """Let the core send; note its PONGs and return the ids of its PINGs."""
        frames = frames_of(b"".join(self.connection.data_to_send(0))[skip:])
        self.pongs += [id for kind, id in frames if kind == PONG]
        return [id for kind, id in frames if kind == PING]

    def step(self, step: str) -> None:
        what, _, number = step.partition(" ")
        match what:
            case "call" | "call-more":
                stream = Stream("Vault.put", b"\x90", more=what == "call-more")
                self.streams[len(self.streams) + 1] = stream
                self.connection.call(stream, 0)
            case "end":
                self.connection.end(self.streams[int(number)])
            case "reset":
                self.abandoned.add(int(number))
                self.connection.reset(self.streams[int(number)], 0)
            case "reply":
                self.connection.reply(self.streams[int(number)], 0, b"\xc0")
            case "ping":
                self.connection.ping(0)
            case "goaway":
                self.connection.drain()

    def describe(self, event: object) -> list[dict[str, Any]]:
        match event:
            case SettingsReceived(settings):
                return [{"event": "settings", "values": settings}]
            case CallsReceived(calls):
                self.streams |= {call.id: call for call in calls}
                return [{"event": "call", **describe_call(call)} for call in calls]
            case RepliesReceived(replies):
                return [{"event": "reply", **describe_reply(*reply)} for reply in replies]
            case ResetReceived(stream, code, message):
                return [
                    {"event": "reset", "id": stream.id, "code": Status(code).name, **said(message)}
                ]
            case MetadataReceived(stream, metadata):
                return [{"event": "metadata", "id": stream.id, "metadata": list(metadata)}]
            case AuthReceived(token, metadata):
                return [{"event": "auth", "token": token, "metadata": list(metadata)}]
            case PongReceived():
                return [{"event": "pong"}]
            case GoAwayReceived(code, message):
                return [{"event": "goaway", "code": CloseCode(code).name, **said(message)}]
        return []

    def taken(self) -> dict[int, list[bytes]]:
        """Take all messages of all streams."""
        taken: dict[int, list[bytes]] = {}
        for id, stream in self.streams.items():
            while (message := self.connection.take(stream, 0)) is not None:
                taken.setdefault(id, []).append(message)
        return taken


def said(message: str | None) -> dict[str, str | None]:
    return {"message": message or None}


def describe_call(call: Stream) -> dict[str, Any]:
    return {
        "id": call.id,
        "method": call.method,
        "lane": call.lane.name.lower(),
        "more": call.more,
        "payload": call.payload,
        "deadline": call.deadline,
        "metadata": list(call.metadata),
        "timings": call.timings,
    }


def describe_reply(stream: Stream, payload: bytes | None, outcome: Any) -> dict[str, Any]:
    return {
        "id": stream.id,
        "payload": payload,
        "status": outcome.status.name if outcome else "OK",
        "message": (outcome.message or None) if outcome else None,
        "details": outcome.details if outcome else None,
        "not_started": bool(outcome and outcome.not_started),
        "trailers": list(outcome.trailers) if outcome else [],
        "timings": outcome.timings if outcome else None,
    }


class Expected:
    """What a vector expects, sorted by how the core tells it."""

    def __init__(self, events: list[dict[str, Any]], receiver: Receiver) -> None:
        self.told: list[dict[str, Any]] = []
        self.messages: dict[int, list[bytes]] = {}
        self.pongs: list[int] = []
        self.ends: list[int] = []
        self.late: dict[int, dict[str, Any]] = {}
        self.dependent: list[dict[str, Any]] = []
        for event in events:
            match event["event"]:
                case "calls":
                    for call in event["calls"]:
                        self.sort_call(dict(call))
                case "replies":
                    self.told += [
                        {
                            **reply,
                            "event": "reply",
                            "payload": unhex(reply["payload"]),
                            "details": unhex(reply["details"]),
                            "trailers": pairs(reply["trailers"]),
                            "timings": reply["timings"] and (*reply["timings"], 0)[:3],
                        }
                        for reply in event["replies"]
                        if reply["id"] not in receiver.abandoned
                    ]
                case "message":
                    self.messages.setdefault(event["id"], []).append(unhex(event["data"]) or b"")
                case "end":
                    self.ends.append(event["id"])
                case "ping":
                    self.pongs.append(event["id"])
                case "settings":
                    self.told.append({"event": "settings", "values": Settings(**event["values"])})
                case "metadata" | "auth":
                    self.told.append({**event, "metadata": pairs(event["metadata"])})
                case "goaway":
                    self.told.append({key: event[key] for key in ("event", "code", "message")})
                case "reset" if receiver.streams[event["id"]].state is State.REPLIED:
                    pass  # its handler has ended
                case "reset" | "pong":
                    self.told.append(event)

    def sort_call(self, call: dict[str, Any]) -> None:
        timeout = call.pop("timeout")
        call["deadline"] = None if timeout is None else timeout / 1e6
        call["payload"] = unhex(call["payload"])
        call["metadata"] = pairs(call["metadata"])
        call["event"] = "call"
        if call["references"]:
            self.dependent.append(call)
            return
        del call["references"]
        if call["payload"] is None:
            self.late[call["id"]] = call
        else:
            self.told.append(call)

    def check_late(self, told: list[dict[str, Any]]) -> None:
        """Take out the calls whose arguments were a message, and check them."""
        prompt = [event["id"] for event in self.told if event["event"] == "call"]
        for call in [event for event in told if event["event"] == "call"]:
            if (id := call["id"]) not in prompt:
                told.remove(call)
                assert call.pop("payload") == self.messages[id].pop(0)
                if id in self.late:
                    assert {**call, "payload": None} == self.late.pop(id)
        self.messages = {id: messages for id, messages in self.messages.items() if messages}


def unhex(text: str | None) -> bytes | None:
    return None if text is None else expand(text, [])


def pairs(metadata: list[Any]) -> list[Any]:
    return [
        (key, unhex(value["hex"]) if isinstance(value, dict) else value) for key, value in metadata
    ]


def result_with(path: Sequence[Any]) -> Any:
    """A result in which a path leads to "found"."""
    value: Any = "found"
    for step in reversed(path):
        value = {step: value} if isinstance(step, str) else [None] * step + [value]
    return value


@pytest.mark.parametrize("piece", [None, 1], ids=["whole", "in pieces"])
@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_bytes_mean_what_the_vector_says(vector: dict[str, Any], piece: int | None) -> None:
    receiver = Receiver(vector)
    data = b"".join(expand(text, receiver.pings) for text, _ in vector["hex"])
    if piece and len(data) > LONG:
        piece = 4_099
    if "error" in vector["expect"]:
        with pytest.raises(RemoteProtocolError) as caught:
            receiver.feed(data, piece)
        assert caught.value.code.name == vector["expect"]["error"]
        return

    receiver.pongs.clear()
    expected = Expected(vector["expect"]["events"], receiver)
    told = receiver.feed(data, piece)
    expected.check_late(told)
    assert told == expected.told
    receiver.flush()
    assert receiver.pongs == expected.pongs
    for id in expected.ends:
        assert receiver.streams[id].state in (State.CALLED, State.CLOSED)
    assert receiver.taken() == expected.messages
    check_references(receiver, expected.dependent)


def check_references(receiver: Receiver, dependent: list[dict[str, Any]]) -> None:
    """Reply to what calls refer to, and see that they get what they ask for, where they ask."""
    for call in dependent:
        arguments = msgpack.unpackb(call["payload"])
        references = call.pop("references")
        for position, _, _ in references:
            arguments[position] = "found"
        # The calls of a vector's club follow 1, and all of one call's references are alike.
        [(index, path)] = {(index, tuple(path)) for _, index, path in references}
        receiver.connection.reply(receiver.streams[1 + index], 0, msgpack.packb(result_with(path)))
        [told] = receiver.feed(b"")
        assert msgpack.unpackb(told.pop("payload")) == arguments
        assert told == {key: value for key, value in call.items() if key != "payload"}


def test_every_vector_has_a_name_of_its_own() -> None:
    names = [vector["name"] for vector in VECTORS]
    assert len(set(names)) == len(names)
