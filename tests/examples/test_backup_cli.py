"""The commands, as real processes over real sockets; some of them killed."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from examples.backup.cli import cli, verdict

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
BACKUP = ["backup", "PLACE", "--name", "mine", "--server", "URL"]
COMMAND = [sys.executable, "-m", "examples.backup"]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Finished:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        with process:
            self.stdout, self.stderr = process.communicate(timeout=60)
        self.status = process.returncode
        self.errors = self.stderr.splitlines()

    @property
    def json(self):
        return json.loads(self.stdout.splitlines()[-1])


def run(*arguments: object) -> Finished:
    return Finished(start(*arguments))


def succeed(*arguments: object):
    done = run(*arguments, "--json")
    assert (done.status, done.stderr) == (0, "")
    return done.json


@contextmanager
def serving(
    store: Path, listen: str = "tcp://127.0.0.1:0", *options: object
) -> Iterator["Serving"]:
    with start("serve", "--store", store, "--listen", listen, *options) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), process.stderr
            yield Serving(process, line.removeprefix("listening on ").strip())
        finally:
            process.kill()


class Serving:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def stop(self) -> Finished:
        self.process.send_signal(signal.SIGTERM)
        return Finished(self.process)


@contextmanager
def counting(url: str, limit: int, act: Callable[[], None]) -> Iterator[str]:
    """Forwards one connection to a server, and acts when a client has sent `limit` bytes."""
    host, port = url.removeprefix("tcp://").split(":")

    def forward(source: socket.socket, sink: socket.socket, limit: float) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if passed >= limit:
                    act()
                    limit = float("inf")
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def relay() -> None:
        with suppress(OSError):
            near, _ = listener.accept()
            listener.close()  # whoever comes again is refused at once
            with near, socket.create_connection((host, int(port))) as far:
                back = threading.Thread(target=forward, args=(far, near, float("inf")))
                back.start()
                forward(near, far, limit)
                back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=relay)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            # Wakes `accept`, should no client have come.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(autouse=True)
def _place_for_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    for number in range(20):
        (source / f"{number}").write_bytes(random.Random(number).randbytes(500_000))
        (source / "below" / f"{number}").write_text(f"{number}\n")
    (source / "link").symlink_to("below/1")
    return source


def same(left: Path, right: Path) -> bool:
    compare = ["diff", "--recursive", "--no-dereference", str(left), str(right)]
    return subprocess.run(compare, check=False).returncode == 0


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_back_up_list_and_restore(tmp_path, source, scheme):
    listen = f"unix://{tmp_path}/socket" if scheme == "unix" else "tcp://127.0.0.1:0"
    with serving(tmp_path / "store", listen) as server:
        assert succeed("snapshots", "--server", server.url) == {"snapshots": []}
        first = succeed("backup", source, "--server", server.url, "--name", "mine")
        assert (first["files"], first["source_bytes"]) == (40, 10_000_050)
        assert first["chunks"] >= first["new_chunks"] >= 60
        assert 10_000_000 < first["wire_bytes"] < 10_200_000
        assert 0 < first["round_trips"] <= first["calls"]
        (source / "new").write_text("new")
        second = succeed("backup", source, "--server", server.url, "--name", "mine")
        assert second["new_chunks"] == 1
        assert second["wire_bytes"] < 20_000
        assert second["round_trips"] < 10
        listed = succeed("snapshots", "--server", server.url)["snapshots"]
        assert [found["id"] for found in listed] == [first["snapshot"], second["snapshot"]]
        assert {found["name"] for found in listed} == {"mine"}
        done = succeed("restore", first["snapshot"], tmp_path / "1", "--server", server.url)
        assert (done["files"], done["bytes"]) == (40, 10_000_050)
        assert done["wire_bytes"] > 10_000_000
        assert done["seconds"] > 0
        (tmp_path / "2").mkdir()
        done = succeed("restore", "mine", tmp_path / "2", "--server", server.url)
        assert done["files"] == 41
        stopped = server.stop()
    assert (stopped.status, stopped.stdout, stopped.stderr) == (0, "", "")
    assert same(tmp_path / "2", source)
    (source / "new").unlink()
    assert same(tmp_path / "1", source)


def test_for_people(tmp_path, source):
    with serving(tmp_path / "store") as server:
        made = run("backup", source, "--server", server.url, "--name", "mine").stdout
        assert re.search(r"^snapshot [0-9a-f]{32} of mine\n40 files, 10\.0 MB, in", made)
        listed = run("snapshots", "--server", server.url).stdout
        assert re.search(r"^[0-9a-f]{32}  \d{4}-\d\d-\d\d .* 40 files    10\.0 MB  mine\n$", listed)
        restored = run("restore", "mine", tmp_path / "restored", "--server", server.url).stdout
        assert restored.startswith("40 files, 10.0 MB, in")


def test_what_was_skipped_is_named_and_shows_in_the_status(tmp_path, source, monkeypatch):
    monkeypatch.chdir(source)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener, serving(tmp_path / "store") as server:
        listener.bind("socket")
        done = run("backup", source, "--server", server.url, "--name", "mine", "--json")
        assert done.status == 1
        assert done.errors == [
            "skipped socket: a socket",
            "error: 1 skipped, all else is in the snapshot",
        ]
        assert json.loads(done.stdout.splitlines()[0]) == {
            "event": "skipped",
            "path": "socket",
            "reason": "a socket",
        }
        assert (done.json["files"], done.json["skipped"]) == (40, 1)
        succeed("restore", done.json["snapshot"], tmp_path / "restored", "--server", server.url)
    (source / "socket").unlink()
    assert same(tmp_path / "restored", source)


def test_what_is_refused_at_a_restore_is_named_and_shows_in_the_status(tmp_path, source):
    (source / "program").touch()
    (source / "program").chmod(0o4755)
    with serving(tmp_path / "store") as server:
        here = ("--server", server.url)
        succeed("backup", source, *here, "--name", "mine")
        done = run("restore", "mine", tmp_path / "1", *here)
        assert done.status == 1
        first, last = done.errors
        assert first.startswith("skipped program: setuid, ")
        assert last == "error: 1 skipped, all else is restored"
        succeed("restore", "mine", tmp_path / "2", *here, "--setuid")
    modes = [(tmp_path / place / "program").stat().st_mode & 0o7777 for place in "12"]
    assert modes == [0o755, 0o4755]


def test_list_compare_and_look_after(tmp_path, source):
    with serving(tmp_path / "store") as server:
        here = ("--server", server.url)
        first = succeed("backup", source, *here, "--name", "mine")["snapshot"]
        (source / "new\n").write_text("new")
        (source / "5").unlink()
        (source / "below/1").chmod(0o600)
        (source / "below/2").write_text("other")
        second = succeed("backup", source, *here, "--name", "mine", "--exclude", "1*")["snapshot"]
        changes = run("diff", first, "mine", *here).stdout.splitlines()
        assert changes == [
            *("- 1", *(f"- 1{n}" for n in range(10)), "- 5", "- below/1"),
            *(*(f"- below/1{n}" for n in range(10)), "M below/2", "+ new\\n"),
        ]
        counts = succeed("diff", first, "mine", *here)
        assert (counts["added"], counts["removed"], counts["content"]) == (1, 23, 1)
        lines = run("ls", first, *here, "--path", "below/3", "--path", "link").stdout.splitlines()
        assert len(lines) == 2
        assert re.search(r"^-rw-r--r-- .* 2 \d{4}-\d\d-\d\d .* below/3$", lines[0])
        assert lines[1].endswith(" link -> below/1")
        listed = run("ls", "mine", *here, "--json").stdout.splitlines()
        assert json.loads(listed[-1]) == {"entries": len(listed) - 1}
        assert json.loads(listed[0])["kind"] == "directory"
        stored = succeed("stats", *here)
        assert stored["snapshots"] == 2
        assert stored["references"] > stored["chunks"] > 80
        assert stored["source_bytes"] > stored["content_bytes"] > 10_000_000
        # Of which the server was sent all but what was there: its speed is that, by its CPU time.
        assert stored["source_bytes"] > stored["received_bytes"] >= stored["content_bytes"]
        assert stored["calls"] > stored["reply_frames"] > 0
        assert stored["calls_clubbed"] > 0
        told = run("stats", *here).stdout
        assert "deduplication left" in told
        assert re.search(r"clubbing: it answered \d+ calls with \d+ frames", told)
        assert "GB per hour and core" in told
        assert succeed("verify", *here)["ok"]
        ruled = succeed("forget", "--keep-last", 1, *here, "--dry-run")
        assert (ruled["kept"], ruled["forgotten"]) == ([second], [first])
        assert succeed("forget", first, *here) == {"forgotten": [first]}
        assert succeed("gc", *here)["chunks"] > 0
        assert succeed("verify", *here)["ok"]
        assert succeed("restore", "mine", tmp_path / "restored", *here)["files"] == 18


def test_over_tls(tmp_path, source):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        tmp_path / "server.pem"
    )
    listen = ("tls://127.0.0.1:0", "--tls-certificate", tmp_path / "server.pem")
    with serving(tmp_path / "store", *listen) as server:
        here = ("--server", server.url)
        trusting = ("--tls-ca", tmp_path / "ca.pem")
        succeed("backup", source, *here, *trusting, "--name", "mine")
        succeed("restore", "mine", tmp_path / "restored", *here, *trusting)
        strange = run("snapshots", *here)
        assert (strange.status, len(strange.errors)) == (1, 1)
        assert "certificate" in strange.stderr
    assert same(tmp_path / "restored", source)


def test_encrypted(tmp_path, source):
    (tmp_path / "passphrase").write_text("correct horse\n")
    (tmp_path / "wrong").write_text("battery staple\n")
    with serving(tmp_path / "store") as server:
        here = ("--server", server.url)
        key = ("--passphrase-file", tmp_path / "passphrase")
        early = run("backup", source, *here, *key, "--name", "mine")
        assert (early.status, "--encrypt" in early.stderr) == (1, True)
        succeed("backup", source, *here, *key, "--name", "mine", "--encrypt")
        again = succeed("backup", source, *here, *key, "--name", "mine")
        assert again["new_chunks"] == 0
        wrong = run(
            "restore", "mine", tmp_path / "0", *here, "--passphrase-file", tmp_path / "wrong"
        )
        assert (wrong.status, "passphrase" in wrong.stderr) == (1, True)
        without = run("ls", "mine", *here)
        assert (without.status, "encrypted" in without.stderr) == (1, True)
        succeed("restore", "mine", tmp_path / "restored", *here, *key)
        plain = run("backup", source, *here, "--name", "other")
        assert (plain.status, len(plain.errors)) == (1, 1)
        assert "--passphrase-file" in plain.stderr
        (pack,) = (tmp_path / "store/packs").iterdir()
        content = pack.read_bytes()
        middle = len(content) // 2
        pack.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        blind = run("verify", *here)
        assert (blind.status, "snapshot " in blind.stdout) == (1, True)
        found = run("verify", *here, *key, "--json")
        damaged = [json.loads(line) for line in found.stdout.splitlines()[:-1]]
        paths = {damage["path"] for damage in damaged if damage["path"]}
        assert paths
        assert all((source / path).is_file() for path in paths)
        assert f": {paths.pop()}" not in blind.stdout
    assert same(tmp_path / "restored", source)
    stored = b"".join(p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file())
    for secret in (b"below", (source / "1").read_bytes()[:64], b"horse"):
        assert secret not in stored


def test_a_failure_is_one_line(tmp_path, source):
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with serving(tmp_path / "store") as server:
        here = ("--server", server.url)
        name = ("--name", "mine")
        succeed("backup", source, *here, *name)
        failures = [
            (1, "can't connect", ("backup", source, "--server", nowhere, *name)),
            (1, "can't connect", ("snapshots", "--server", nowhere)),
            (1, "No such file", ("backup", tmp_path / "missing", *here, *name)),
            (1, "Not a directory", ("backup", source / "1", *here, *name)),
            (1, "no snapshot", ("restore", "nobody", tmp_path / "restored", *here)),
            (1, "not in the snapshot", ("restore", "mine", tmp_path / "r", "--path", "x", *here)),
            (1, "no snapshot", ("diff", "mine", "nobody", *here)),
            (1, "Not a directory", ("restore", "mine", source / "1", *here)),
            (1, "No such file", ("restore", "mine", tmp_path / "a/b", *here)),
            (1, "used by another", ("serve", "--store", tmp_path / "store", "--listen", nowhere)),
            (1, "in use", ("serve", "--store", tmp_path / "other", "--listen", server.url)),
        ]
        processes = [start(*arguments) for _, _, arguments in failures]
        for (status, text, _), process in zip(failures, processes, strict=True):
            done = Finished(process)
            assert (done.status, done.stdout) == (status, "")
            (line,) = done.errors
            assert line.startswith("error: ")
            assert text in line
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize(
    ("status", "text", "arguments"),
    [
        (2, "No such command", ["nonsense"]),
        (2, "tcp://host:port", ["snapshots", "--server", "nowhere"]),
        (1, "tcp://host:port", ["serve", "--store", "PLACE/store", "--listen", "x"]),
        (2, "--name", ["backup", "PLACE", "--server", "URL"]),
        (1, "no compression", [*BACKUP, "--compression", "best"]),
        (1, "levels 1 to 19", [*BACKUP, "--compression", "zstd:99"]),
        (1, "No such file", [*BACKUP, "--exclude-from", "/missing"]),
        (1, "No such file", [*BACKUP, "--passphrase-file", "/missing"]),
        (1, "is empty", [*BACKUP, "--passphrase-file", "PLACE/empty"]),
        (1, "is not UTF-8", [*BACKUP, "--passphrase-file", "PLACE/binary"]),
        (1, "to encrypt takes", [*BACKUP, "--encrypt"]),
        (2, "either snapshots or a rule", ["forget", "--server", "URL"]),
        (2, "go with a rule", ["forget", "x", "--dry-run", "--server", "URL"]),
        (1, "no name for a tenant", ["tenants", "add", "../x", "--tenants", "PLACE/tenants"]),
    ],
)
def test_a_command_line_that_cannot_be_is_one_line_too(tmp_path, status, text, arguments):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    # In this process: 14 interpreters would take a while to start.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        filled = [a.replace("PLACE", str(tmp_path)).replace("URL", url) for a in arguments]
        with pytest.raises((Exception, BaseExceptionGroup)) as caught:
            cli.main(filled, standalone_mode=False)
    told = verdict(caught.value)
    assert told[0] == status
    assert text in told[1]


@pytest.mark.parametrize("sent", [1_000, 5_000_000])
def test_a_client_killed_in_the_middle_leaves_nothing_visible(tmp_path, source, sent):
    clients: list[subprocess.Popen[str]] = []
    with serving(tmp_path / "store") as server:
        with counting(server.url, sent, lambda: clients[0].kill()) as url:
            clients.append(start("backup", source, "--server", url, "--name", "mine"))
            assert Finished(clients[0]).status == -signal.SIGKILL
        assert succeed("snapshots", "--server", server.url) == {"snapshots": []}
        again = succeed("backup", source, "--server", server.url, "--name", "mine")
        if sent > 1_000_000:  # what was acknowledged is not sent again
            assert again["new_bytes"] < 10_000_000
        succeed("restore", "mine", tmp_path / "restored", "--server", server.url)
    assert same(tmp_path / "restored", source)


@pytest.mark.parametrize("sent", [1_000, 5_000_000])
def test_a_server_killed_in_the_middle_fails_the_client_and_nothing_else(tmp_path, source, sent):
    with (
        serving(tmp_path / "store") as server,
        counting(server.url, sent, server.process.kill) as url,
    ):
        done = run("backup", source, "--server", url, "--name", "mine")
        assert done.status == 1
        assert len(done.errors) == 1
        assert done.stderr.startswith("error: ")
    with serving(tmp_path / "store") as server:
        assert succeed("snapshots", "--server", server.url) == {"snapshots": []}
        succeed("backup", source, "--server", server.url, "--name", "mine")
        succeed("restore", "mine", tmp_path / "restored", "--server", server.url)
    assert same(tmp_path / "restored", source)


def test_an_interrupted_client_says_so(tmp_path, source):
    clients: list[subprocess.Popen[str]] = []
    with (
        serving(tmp_path / "store") as server,
        counting(server.url, 1_000_000, lambda: clients[0].send_signal(signal.SIGINT)) as url,
    ):
        clients.append(start("backup", source, "--server", url, "--name", "mine"))
        done = Finished(clients[0])
    assert (done.status, done.stderr) == (130, "error: interrupted\n")


def test_a_server_told_to_stop_ends_its_clients_calls_first(tmp_path, source):
    with (
        serving(tmp_path / "store") as server,
        counting(server.url, 1_000_000, lambda: server.process.send_signal(signal.SIGTERM)) as url,
    ):
        done = run("backup", source, "--server", url, "--name", "mine")
        stopped = Finished(server.process)
    assert (stopped.status, stopped.stderr) == (0, "")
    # New calls are refused while it drains, and a backup makes many.
    assert done.status == 1
    assert len(done.errors) == 1
