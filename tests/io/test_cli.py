import socket
import subprocess
import sys
from functools import partial

import pytest
import trio

import druvarpc
from druvarpc.cli import main
from tests.io.peers import ROOT, RawPeer, Workshop, raw_server, serving


async def druvarpc_command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    code = "import sys; from druvarpc.cli import main; sys.exit(main())"
    with trio.fail_after(20):
        return await trio.run_process(
            [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=ROOT,
        )


async def command(*arguments: str) -> int:
    """Run the command in a thread of this process; return its status."""
    return await trio.to_thread.run_sync(partial(main, arguments))


async def test_ping_prints_round_trips(tmp_path):
    async with serving(Workshop(), "tcp://127.0.0.1:0", f"unix://{tmp_path}/socket") as server:
        for address in server.addresses:
            done = await druvarpc_command("ping", address, "--count", "3")
            assert done.returncode == 0
            assert done.stderr == b""
            lines = done.stdout.decode().splitlines()
            assert len(lines) == 3
            for line in lines:
                assert line.startswith(f"{address}: ")
                assert 0 < float(line.removesuffix(" ms").rpartition(" ")[2]) < 1000


async def test_ping_says_in_one_line_why_it_fails(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        assert await command("ping", address) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("druvarpc: ")
    assert address in output.err
    assert "refused" in output.err


async def test_ping_of_an_address_that_is_none(capsys):
    assert await command("ping", "localhost") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tcp://host:port" in error


async def test_ping_prints_no_control_characters_of_the_server(capsys):
    async def hostile(peer: RawPeer) -> None:
        await peer.send(bytes.fromhex("8b4452555641 0a01 010000010000000000000000 90"))
        body = b"\x92\x01\xa9\x1b[31m\nred"
        await peer.send(bytes([4, 0, 0, len(body)]) + bytes(8) + body)
        await peer.stream.send_eof()
        while await peer.stream.receive_some(1000):
            pass

    async with raw_server(hostile) as address:
        assert await command("ping", address) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.strip().isprintable()


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_ping_wants_a_count(capsys, count):
    with pytest.raises(SystemExit) as ended:
        main(["ping", "tcp://127.0.0.1:1", "--count", count])
    assert ended.value.code == 2
    assert "count" in capsys.readouterr().err


def test_a_command_is_wanted(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"druvarpc {druvarpc.__version__}\n"
