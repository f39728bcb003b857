"""The examples bearer_tokens and mutual_tls, and that their READMEs tell the truth."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import druvarpc
from druvarpc import RpcError, Status
from druvarpc.testing import connected
from examples.bearer_tokens.client import Tokens
from examples.bearer_tokens.server import Authenticate, MyLogin, MyNotes
from examples.bearer_tokens.service import Login, Notes
from examples.bearer_tokens.tickets import sign, verify
from examples.mutual_tls.server import MyFleet, authenticate
from examples.mutual_tls.service import Fleet
from tests.io.certificates import authority

ROOT = Path(__file__).parents[2]
KEY = b"a key for tests"


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Run an example's server for the time of a block; give its address."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().removeprefix("listening on ").strip()
        finally:
            server.kill()


def run(*arguments: str) -> str:
    """Return what an example's client prints."""
    ran = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ran.stdout + ran.stderr


def told(example: str) -> list[tuple[list[str], str]]:
    """Return the commands of the client in a README, and what they print."""
    readme = (ROOT / "examples" / example / "README.md").read_text("utf-8")
    name = rf"examples\.{example}\.client"
    found = re.findall(rf"^\$ python -m ({name} .*)\n((?:(?!\$|```).*\n)*)", readme, re.M)
    assert found
    return [(command.split(), output) for command, output in found]


@pytest.mark.once
def test_bearer_tokens_print_what_the_readme_says():
    with running("examples.bearer_tokens.server", "tcp://127.0.0.1:0") as url:
        for command, output in told("bearer_tokens"):
            assert run(*command, url) == output.replace("tcp://127.0.0.1:7422", url)


@pytest.mark.once
def test_mutual_tls_prints_what_the_readme_says(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl isn't installed")
    folder = str(tmp_path / "certificates")
    subprocess.run([ROOT / "examples/mutual_tls/certificates.sh", folder], check=True)
    with running("examples.mutual_tls.server", folder, "tls://127.0.0.1:0") as url:
        for (module, _, name), output in told("mutual_tls"):
            assert run(module, folder, name, url) == output


# Bearer tokens.


def test_a_token_that_was_changed_is_none():
    token = sign(KEY, "alice smith", 12.5)
    assert verify(KEY, token) == ("alice smith", 12.5)
    for other in (token[:-1], "a" + token, "", " ", "é", sign(b"another key", "alice", 1.0)):
        with pytest.raises(ValueError, match="no such token"):
            verify(KEY, other)


@pytest.mark.parametrize("token", [None, "a guess", sign(KEY, "alice", 1.0)])
async def test_who_has_no_good_token_may_log_in_at_most(token):
    door = Authenticate(KEY)
    services = [MyLogin(KEY), MyNotes()]
    async with connected(services, token=token, authenticate=door) as client:
        with pytest.raises(RpcError) as caught:
            await client.stub(Notes).read()
        assert caught.value.status is Status.UNAUTHENTICATED
        if token is None:
            assert (await client.stub(Login).login("alice", "wonderland")).seconds == 60


@pytest.mark.once
async def test_tokens_that_expire_are_replaced(nursery):
    """With tokens of half a second, calls for two of them: not one is refused."""
    serve = partial(
        druvarpc.serve,
        [MyLogin(KEY, lifetime=0.5), MyNotes()],
        "tcp://127.0.0.1:0",
        authenticate=Authenticate(KEY),
    )
    server = await nursery.start(serve)
    url = server.addresses[0]
    async with druvarpc.connect(url, token=Tokens(url, "alice", "wonderland")) as client:
        notes = client.stub(Notes)
        end = trio.current_time() + 1.2
        count = 0
        while trio.current_time() < end:
            count += 1
            assert await notes.write("again") == count
        with pytest.raises(RpcError, match="PERMISSION_DENIED"):
            await notes.erase("admin")


# Mutual TLS.


@pytest.mark.once
async def test_certificates_of_others_and_of_no_member(tmp_path, nursery):
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs")
    serve = partial(
        druvarpc.serve,
        [MyFleet()],
        "tls://127.0.0.1:0",
        tls=ours.server(client_authorities=ours.file),
        authenticate=authenticate,
    )
    server = await nursery.start(serve)

    async def call(**certificate: object) -> None:
        tls = druvarpc.TLS(authorities=ours.file, **certificate)
        async with druvarpc.connect(server.addresses[0], tls=tls) as client:
            await client.stub(Fleet).report("well")

    agent = "a.agent.fleet.example"
    with trio.fail_after(10):
        await call(certificate=ours.certify(agent, to="agent"))
        for name in ("a@example.org", "a.agent.example", "agent.fleet.example", "a.agent"):
            with pytest.raises(RpcError, match="UNAUTHENTICATED: the certificate names no member"):
                await call(certificate=ours.certify(name, to="nobody"))
        with pytest.raises(RpcError, match="PERMISSION_DENIED"):
            await call(certificate=ours.certify("a.operator.fleet.example", to="operator"))
        with pytest.raises(druvarpc.ConnectionLost):
            await call(certificate=theirs.certify(agent, to="agent"))
        with pytest.raises(druvarpc.ConnectionLost):
            await call()
