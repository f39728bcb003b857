"""Two cores and a fake wire between them: every event crosses it."""

from dataclasses import dataclass, field
from typing import Any

from druvarpc.protocol import CallsReceived, Connection, Event, RepliesReceived, Stream


@dataclass
class Pair:
    """A client and a server whose bytes go over when `run` is called.

    `piece` is how many bytes go in one receive_data, None for all that there is; `settled` whether
    the settings have been exchanged when the test begins.
    """

    client_options: dict[str, Any] = field(default_factory=dict)
    server_options: dict[str, Any] = field(default_factory=dict)
    piece: int | None = None
    now: float = 0.0
    settled: bool = True

    def __post_init__(self) -> None:
        self.client = Connection("client", now=self.now, **self.client_options)
        self.server = Connection("server", now=self.now, **self.server_options)
        self.client_events: list[Event] = []
        self.server_events: list[Event] = []
        if self.settled:
            self.run()
            self.client_events.clear()
            self.server_events.clear()

    def run(self) -> None:
        """Carry bytes both ways until neither end has anything to say."""
        while self.client.wants_to_send or self.server.wants_to_send:
            self.to_server()
            self.to_client()

    def to_server(self) -> None:
        self._carry(self.client, self.server, self.server_events)

    def to_client(self) -> None:
        self._carry(self.server, self.client, self.client_events)

    def _carry(self, source: Connection, target: Connection, events: list[Event]) -> None:
        data = b"".join(source.data_to_send(self.now))
        step = self.piece or max(1, len(data))
        for start in range(0, len(data), step):
            target.receive_data(data[start : start + step], self.now)
        while (event := target.next_event()) is not None:
            events.append(event)

    def call(self, method: str = "Vault.put", payload: bytes = b"\x90", **options: Any) -> Stream:
        """Submit a call; return the client's stream."""
        stream = Stream(method, payload, **options)
        self.client.call(stream, self.now)
        return stream

    def accept(self, method: str = "Vault.put", payload: bytes = b"\x90", **options: Any) -> Any:
        """Make a call and carry it over; return the streams of both ends."""
        stream = self.call(method, payload, **options)
        self.run()
        return stream, self.arrived()[-1]

    def arrived(self) -> list[Stream]:
        """Take the calls that the server was told of."""
        calls = [
            call
            for event in self.server_events
            if isinstance(event, CallsReceived)
            for call in event.calls
        ]
        self.server_events = [e for e in self.server_events if not isinstance(e, CallsReceived)]
        return calls

    def replies(self) -> list[Any]:
        """Take the replies that the client was told of."""
        replies = [
            reply
            for event in self.client_events
            if isinstance(event, RepliesReceived)
            for reply in event.replies
        ]
        self.client_events = [e for e in self.client_events if not isinstance(e, RepliesReceived)]
        return replies
