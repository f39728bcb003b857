"""The table of a stream's states, here and in the specification."""

import re
from pathlib import Path

import pytest

from druvarpc.errors import LocalProtocolError
from druvarpc.protocol import State, Stream
from druvarpc.protocol.streams import TRANSITIONS, Input
from tests.protocol.pair import Pair

SPECIFICATION = Path(__file__).parents[2] / "docs" / "protocol.md"
COLUMNS = {
    "CALL": Input.CALL,
    "CALL with MORE": Input.CALL_MORE,
    "DATA ↑": Input.DATA_UP,
    "END ↑": Input.END_UP,
    "RESET ↑": Input.RESET_UP,
    "METADATA ↓": Input.METADATA_DOWN,
    "DATA ↓": Input.DATA_DOWN,
    "REPLY ↓": Input.REPLY_DOWN,
}


def test_the_specification_draws_the_table_that_the_code_follows() -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    section = re.search(r"^## 6\. Streams$(.*?)^### 6\.1", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section[1].splitlines()
        if line.startswith("|")
    ]
    header, _, *states = rows
    assert header == ["state", *COLUMNS]
    drawn = {
        (State[state], COLUMNS[column]): State[target]
        for state, *cells in states
        for column, target in zip(header[1:], cells, strict=True)
        if target
    }
    assert [state for state, *_ in states] == [state.name for state in State]
    assert drawn == TRANSITIONS


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("what", Input)
def test_a_stream_moves_as_the_table_says(state: State, what: Input) -> None:
    stream = Stream("Vault.put", b"\x90")
    stream.state = state
    allowed = (state, what) in TRANSITIONS
    assert stream.move(what) == allowed
    assert stream.state is TRANSITIONS.get((state, what), state)


def test_a_stream_says_what_it_is() -> None:
    two = Pair()
    mine, yours = two.accept("Vault.get")
    assert repr(mine) == "<Stream 1 Vault.get CALLED>"
    assert repr(yours) == "<Stream 1 Vault.get CALLED>"
    assert repr(two.client) == "<Connection client open, 1 calls>"
    two.client.close()
    assert repr(two.client) == "<Connection client closing, 1 calls>"
    two.run()
    assert repr(two.client) == "<Connection client closed, 1 calls>"


def test_a_stream_is_submitted_once() -> None:
    two = Pair()
    mine, _ = two.accept()
    with pytest.raises(LocalProtocolError, match="isn't a new call"):
        two.client.call(mine, two.now)
