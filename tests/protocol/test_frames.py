"""What the core refuses in frames, each as its peer would have to send it."""

import pytest

from druvarpc.errors import CloseCode, RemoteProtocolError
from druvarpc.protocol.frames import AUTH, KINDS, REPLIES, Role, check_header, frame, pack
from tests.protocol.pair import Pair


def refused(two: Pair, data: bytes, *, by_server: bool) -> str:
    """Return why the core refuses bytes."""
    core = two.server if by_server else two.client
    core.receive_data(data, two.now)
    with pytest.raises(RemoteProtocolError) as caught:
        core.next_event()
    assert caught.value.code is CloseCode.PROTOCOL_ERROR
    return str(caught.value)


@pytest.mark.parametrize("reply", [["1", None], [True, None], [1.0, None], [None, None]])
def test_a_reply_names_its_call_by_number(reply: list[object]) -> None:
    assert "id" in refused(Pair(), frame(REPLIES, pack([reply])), by_server=False)


@pytest.mark.parametrize("body", [[], [None], [7], ["x" * 16_385], ["t", 7], ["t", ["k"]]])
def test_a_token_is_text(body: list[object]) -> None:
    assert "AUTH" in refused(Pair(), frame(AUTH, pack(body)), by_server=True)


@pytest.mark.parametrize("role", Role)
def test_every_kind_of_frame_has_its_sender(role: Role) -> None:
    """What one role may not send, the other may: no kind is nobody's."""
    other = Role.SERVER if role is Role.CLIENT else Role.CLIENT
    for kind, known in KINDS.items():
        id = 1 if known.has_id else 0
        if role in known.senders:
            check_header(kind, 0, 0, id, role)
        else:
            check_header(kind, 0, 0, id, other)
            with pytest.raises(RemoteProtocolError, match=f"from the {role}"):
                check_header(kind, 0, 0, id, role)
