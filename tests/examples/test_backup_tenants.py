"""The file of tenants, and the stores of tenants."""

import os
import stat
from pathlib import Path

import pytest
import trio

from examples.backup import tenancy
from examples.backup.errors import BackupError, StoreLocked, TenantsError
from examples.backup.store import Store
from examples.backup.tenancy import Tenancy
from examples.backup.tenants import ANYBODY, Device, Role, Tenants, add_token
from tests.examples.stores import put, there


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


def test_a_token_says_whose_it_is_and_what_it_allows(path):
    admin = add_token(path, "acme", Role.FULL)
    laptop = add_token(path, "acme", Role.APPEND_ONLY)
    other = add_token(path, "other-1.example", Role.FULL)
    tenants = Tenants(path)
    assert tenants.device(admin) == Device("acme", Role.FULL)
    assert tenants.device(laptop) == Device("acme", Role.APPEND_ONLY)
    assert tenants.device(other) == Device("other-1.example", Role.FULL)


def test_whatever_else_is_nobodys(path):
    token = add_token(path, "acme", Role.FULL)
    id, secret = token.split(".")
    tenants = Tenants(path)
    for wrong in (
        *(None, "", ".", id, f"{id}.", f"{id}.{secret[:-1]}", f"{id}.{secret}x", f"x.{secret}"),
        *(secret, token + "\n", token.upper(), "acme", "default", "\udcff", "0" * 64),
    ):
        assert tenants.device(wrong) is None


def test_the_file_has_no_token_and_is_for_nobody_elses_eyes(path):
    token = add_token(path, "acme", Role.FULL)
    assert token.split(".")[1] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_tokens_are_never_alike(path):
    assert len({add_token(path, "acme", Role.FULL) for _ in range(20)}) == 20


def test_a_file_that_changes_is_read_again(path):
    token = add_token(path, "acme", Role.FULL)
    tenants = Tenants(path)
    late = add_token(path, "late", Role.FULL)
    assert tenants.device(late) == Device("late", Role.FULL)
    path.write_text("\n[[token]]".join(path.read_text().split("\n[[token]]")[:1]))
    assert tenants.device(token) is tenants.device(late) is None
    path.unlink()
    with pytest.raises(TenantsError):
        tenants.device(token)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc", "A", "a b", "-a", "x" * 64, "ä", "a\n"]
)
def test_names_that_are_no_directorys_are_refused(path, name):
    with pytest.raises(TenantsError, match="no name"):
        add_token(path, name, Role.FULL)
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "token = 5",
        "[[token]]",
        '[[token]]\nid = "a"\ntenant = "../.."\nrole = "full"\nhash = "' + "a" * 64 + '"',
        '[[token]]\nid = "a"\ntenant = "acme"\nrole = "god"\nhash = "' + "a" * 64 + '"',
        '[[token]]\nid = "a"\ntenant = "acme"\nrole = "full"\nhash = "' + "0" * 64 + '"',
        '[[token]]\nid = "a"\ntenant = "acme"\nrole = "full"\nhash = ""',
    ],
)
def test_what_is_no_file_of_tenants_is_refused_and_left_alone(path, text):
    path.write_text(text)
    with pytest.raises(TenantsError):
        Tenants(path)
    with pytest.raises(TenantsError):
        add_token(path, "acme", Role.FULL)
    assert path.read_text() == text


def test_a_file_that_is_not_there_is_refused(path):
    with pytest.raises(TenantsError, match="No such file"):
        Tenants(path)


def acme(name: str = "acme") -> Device:
    return Device(name, Role.FULL)


async def test_each_tenant_has_a_store_of_its_own(tmp_path, path):
    add_token(path, "acme", Role.FULL)
    async with (
        Tenancy.at(tmp_path / "stores", path) as stores,
        stores.opened(acme()) as first,
        stores.opened(acme("other")) as second,
    ):
        put(first, [1])
        assert there(first, [1]) == [1]
        assert there(second, [1]) == []
        async with stores.opened(acme()) as again:
            assert again is first
    assert sorted(os.listdir(tmp_path / "stores/tenants")) == ["acme", "other"]


async def test_without_tenants_the_directory_is_the_store(tmp_path):
    async with Tenancy.at(tmp_path, None) as stores:
        async with stores.opened(ANYBODY) as store:
            put(store, [1])
        with pytest.raises(StoreLocked):
            Store(tmp_path)
    with Store(tmp_path) as store:
        assert there(store, [1]) == [1]


async def test_a_store_that_cannot_be_opened_is_told_at_once(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(b"certainly not a database" * 100)
    with pytest.raises(BackupError, match="not a database"):
        async with Tenancy.at(tmp_path, None):
            pass


async def test_stores_that_nobody_uses_are_closed(tmp_path, path, monkeypatch):
    monkeypatch.setattr(tenancy, "KEPT", 2)
    add_token(path, "acme", Role.FULL)
    async with Tenancy.at(tmp_path / "stores", path) as stores:
        async with stores.opened(acme("used")) as used:
            for number in range(5):
                async with stores.opened(acme(f"{number}")) as store:
                    put(store, [number])
            for number in range(3):
                with Store(tmp_path / f"stores/tenants/{number}") as store:
                    assert there(store, range(5)) == [number]
            with pytest.raises(StoreLocked):
                Store(tmp_path / "stores/tenants/4")
            put(used, [9])
        async with stores.opened(acme("0")) as store:
            assert there(store, [0]) == [0]


async def test_many_who_come_at_once_get_the_same_store(tmp_path, path, monkeypatch):
    monkeypatch.setattr(tenancy, "KEPT", 0)
    add_token(path, "acme", Role.FULL)

    async def use(number: int) -> None:
        async with stores.opened(acme(f"{number % 3}")) as store:
            await trio.to_thread.run_sync(put, store, [number])

    async with Tenancy.at(tmp_path / "stores", path) as stores, trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(use, number)
    for tenant in range(3):
        with Store(tmp_path / f"stores/tenants/{tenant}") as store:
            assert there(store, range(30)) == list(range(tenant, 30, 3))
