"""Tenants across a wire: tokens, roles, and what one tenant sees of another."""

import os
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from druvarpc import Status
from druvarpc.testing import connected
from examples.backup.retention import Rule
from examples.backup.server import StoreService, authenticator
from examples.backup.service import BackupStore
from examples.backup.tenancy import Tenancy
from examples.backup.tenants import Role, Tenants, add_token
from tests.examples.remote_stores import collected, commit, put, refused, verified
from tests.examples.stores import chunk, ids

CHECKOUT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.backup"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


@asynccontextmanager
async def tenants(file: Path) -> AsyncGenerator[Callable[..., object], None]:
    """Yields what connects with a token."""
    async with Tenancy.at(file.parent / "stores", file) as stores:
        service = StoreService(stores)

        @asynccontextmanager
        async def connect(token: str | None) -> AsyncGenerator[BackupStore, None]:
            known = authenticator(Tenants(file))
            async with connected([service], token=token, authenticate=known) as client:
                yield client.stub(BackupStore)

        yield connect


async def test_devices_of_a_tenant_share_and_tenants_see_nothing_of_each_other(file):
    phone, laptop = (add_token(file, "acme", Role.FULL) for _ in range(2))
    other = add_token(file, "other", Role.FULL)
    async with (
        tenants(file) as connect,
        connect(other) as stranger,
        connect(phone) as one,
        connect(laptop) as two,
    ):
        await put(one, 1, 2)
        snapshot = await commit(one, "phone", 1, 2)
        assert await two.missing(ids(1, 2, 3)) == [2]
        assert await two.snapshots() == [snapshot]
        assert await stranger.missing(ids(1, 2, 3)) == [0, 1, 2]
        assert await stranger.snapshots() == []
        await refused(Status.FAILED_PRECONDITION, lambda: stranger.fetch(ids(1)))
        await refused(Status.NOT_FOUND, lambda: stranger.forget([snapshot.id]))
        await refused(Status.FAILED_PRECONDITION, lambda: commit(stranger, "x", 1))
        await put(stranger, 1)
        await stranger.forget([])
        assert (await collected(stranger)).chunks == 1
        assert (await stranger.usage()).chunks == 0
        assert await one.fetch(ids(1)) == [chunk(1)]


async def test_no_tenant_is_told_what_the_server_did_for_others(file):
    token = add_token(file, "acme", Role.FULL)
    async with tenants(file) as connect, connect(token) as store:
        await put(store, 1)
        usage = await store.usage()
        assert usage.chunks == 1
        assert (usage.cpu_seconds, usage.peak_memory) == (None, None)


async def test_nobody_is_told_why_a_token_is_refused(file):
    token = add_token(file, "acme", Role.FULL)
    messages = set()
    async with tenants(file) as connect:
        for wrong in (None, "", "nonsense", token[:-1], token.split(".")[0], "0.0"):
            async with connect(wrong) as store:
                messages.add(await refused(Status.UNAUTHENTICATED, store.snapshots))
    assert len(messages) == 1


async def test_who_may_only_append_removes_nothing(file):
    admin, device = (add_token(file, "acme", role) for role in (Role.FULL, Role.APPEND_ONLY))
    async with tenants(file) as connect, connect(device) as store:
        await put(store, 1, 2)
        snapshot = await commit(store, "name", 1)
        assert await store.fetch(ids(1)) == [chunk(1)]
        assert (await verified(store))[-1].finished
        assert (await store.usage()).chunks == 2
        await refused(Status.PERMISSION_DENIED, lambda: store.forget([snapshot.id]))
        for dry_run in (True, False):
            await refused(
                Status.PERMISSION_DENIED,
                lambda dry=dry_run: store.forget_by_rule(Rule(last=1), "", dry),
            )
        await refused(Status.PERMISSION_DENIED, lambda: collected(store))
        assert await store.snapshots() == [snapshot]
        async with connect(admin) as other:
            assert await other.forget([snapshot.id]) == [snapshot]
            assert (await collected(other)).chunks == 2


# The commands.


def run(*arguments: object, token: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=CHECKOUT,
        env=os.environ | variables | {"DRUVARPC_BACKUP_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.once
def test_the_commands_of_a_server_with_tenants_and_tls(tmp_path, file):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("content")
    authority, certificate = trustme.CA(), tmp_path / "server.pem"
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(certificate)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    trust = {ssl.get_default_verify_paths().openssl_cafile_env: str(tmp_path / "authority.pem")}
    options = ["--tenants", file, "--tls-certificate", certificate]
    admin = run("tenants", "add", "acme", "--tenants", file).stdout.strip()
    device = run("tenants", "add", "acme", "--append-only", "--tenants", file).stdout.strip()
    assert run("tenants", "add", "../acme", "--tenants", file).returncode == 1
    serve = ["serve", "--store", tmp_path / "store", "--listen", "tls://127.0.0.1:0", *options]
    with subprocess.Popen(
        [*COMMAND, *map(str, serve)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("listening on ").strip()
            here = ("--server", url, "--cache", tmp_path / "cache")
            back_up = ("backup", tmp_path / "source", "--name", "mine", *here)
            for token in ("", "nonsense"):
                done = run(*back_up, token=token, **trust)
                assert (done.returncode, done.stdout) == (1, "")
                assert done.stderr == "error: there is no such token\n"
            assert run(*back_up, token=device, **trust).returncode == 0
            done = run("forget", "mine", *here, token=device, **trust)
            assert (done.returncode, done.stderr) == (
                1,
                "error: this token may only back up and restore\n",
            )
            assert run(
                "restore", "mine", tmp_path / "restored", *here, token=device, **trust
            ).stdout
            assert (tmp_path / "restored/file").read_text() == "content"
            assert run("forget", "mine", *here, token=admin, **trust).returncode == 0
            assert run("gc", *here, token=admin, **trust).returncode == 0
            assert "0 snapshots" in run("verify", *here, token=admin, **trust).stdout
        finally:
            process.terminate()
    assert process.returncode == 0
