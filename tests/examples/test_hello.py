"""The hello example: as two processes, and that its README tells the truth."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import druvarpc
import druvarpc.testing
from examples.hello.client import stream
from examples.hello.server import HelloServer
from examples.hello.service import Hello

ROOT = Path(__file__).parents[2]


def test_two_processes_print_what_the_readme_says():
    readme = (ROOT / "examples/hello/README.md").read_text("utf-8")
    (expected,) = re.findall(
        r"^\$ python -m examples\.hello\.client\n(.*?)```", readme, re.S | re.M
    )
    module = [sys.executable, "-m"]
    with subprocess.Popen(
        [*module, "examples.hello.server", "tcp://127.0.0.1:0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("listening on ").strip()
            client = [*module, "examples.hello.client", url]
            output = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, check=True)
        finally:
            server.kill()
    assert output.stdout == expected
    assert output.stderr == ""


async def test_a_word_is_shouted_before_the_next_is_said():
    mouth, words = trio.open_memory_channel[str](0)
    async with druvarpc.testing.connected([HelloServer()]) as client:
        shouted = client.stub(Hello).shout(words)
        for word in ("one", "two"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mouth.send, word)
                assert await anext(shouted) == word.upper()
        mouth.close()
        assert [word async for word in shouted] == []


async def test_arguments_are_checked():
    async with druvarpc.testing.connected([HelloServer()]) as client:
        with pytest.raises(druvarpc.RpcError, match="total"):
            await client.stub(Hello).total(stream(["not a number"]))
