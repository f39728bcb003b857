"""Collecting garbage while others back up and restore: nothing that anyone counts on is removed."""

import random
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from examples.backup import collect, pages
from examples.backup.directory import Directory
from examples.backup.drafts import Draft
from examples.backup.errors import Busy, CatalogueError, UnknownChunks
from examples.backup.files import Files
from examples.backup.memory import Memory
from examples.backup.reports import Checked, Collected
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store
from tests.examples.stores import ROOT, chunk, commit, ids, page_of, put, there


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path if request.param == "files" else Memory()) as store:
        yield store


def collected(store: Store) -> Collected:
    *_, last = store.collect()
    assert last.finished
    return last


def verified(store: Store) -> Checked:
    reports = list(store.verify())
    assert [damage for report in reports for damage in report.damage] == []
    return reports[-1]


def test_what_no_snapshot_needs_is_removed_and_nothing_else(store):
    put(store, range(10))
    first = commit(store, "a", range(6))
    commit(store, "b", range(4, 8))
    assert collected(store).chunks == 2
    assert there(store, range(10)) == list(range(8))
    store.forget([first.id])
    assert there(store, range(10)) == list(range(8))
    did = collected(store)
    assert (did.pages, did.condemned, did.chunks, did.held) == (2, 4, 4, 0)
    assert there(store, range(10)) == [4, 5, 6, 7]
    assert list(store.read_chunks(ids(4, 5, 6, 7))) == [chunk(seed) for seed in range(4, 8)]
    with pytest.raises(UnknownChunks):
        store.read_chunks(ids(0))
    assert verified(store).chunks == 4
    did = collected(store)
    assert (did.pages, did.condemned, did.chunks) == (0, 0, 0)


def test_an_empty_store_has_no_garbage(store):
    assert collected(store) == Collected(finished=True)


def test_disk_space_is_given_back(tmp_path):
    def size() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "packs").iterdir())

    with Store(Directory(tmp_path, pack_limit=20_000)) as store:
        for seed in range(100):
            put(store, [seed])
        old = commit(store, "old", range(95))
        commit(store, "new", range(95, 100))
        collected(store)
        full = size()
        store.forget([old.id])
        did = collected(store)
        assert did.freed == full - size()
        assert size() < 7_000
        assert did.packs >= 5
        assert store.usage().pack_bytes == size()
        verified(store)
    with Store(tmp_path) as store:
        verified(store)
        assert there(store, range(100)) == list(range(95, 100))
        put(store, [1])
        verified(store)


def test_a_pack_with_little_garbage_is_left_alone(tmp_path):
    with Store(tmp_path) as store:
        put(store, range(100))
        commit(store, "name", range(80))
        before = (tmp_path / "packs/00000001.pack").read_bytes()
        did = collected(store)
        assert (did.chunks, did.packs, did.freed) == (20, 0, 0)
        assert (tmp_path / "packs/00000001.pack").read_bytes() == before
        # What was removed is missing, though its bytes are still there: it is put once more.
        put(store, range(80, 100))
        assert there(store, range(100)) == list(range(100))
        verified(store)


# Leases.


def test_a_backup_that_was_told_that_a_chunk_is_there_can_use_it(store):
    put(store, [1, 2])
    draft = store.begin("name")
    assert there(store, [1, 2]) == [1, 2]
    did = collected(store)
    assert (did.condemned, did.chunks, did.held) == (2, 0, 2)
    draft.add([page_of(1)])
    snapshot = draft.commit()
    did = collected(store)
    assert (did.condemned, did.chunks, did.held) == (0, 1, 0)
    assert list(store.pages(snapshot.id)) == [page_of(1)]
    assert there(store, [1, 2]) == [1]
    verified(store)


def test_a_backup_that_begins_later_is_told_that_condemned_chunks_are_missing(store):
    put(store, [1, 2])
    early = store.begin("early")
    collected(store)
    late = store.begin("late")
    assert there(store, [1, 2]) == []
    assert store.put_many([chunk(1)]) == 0  # its bytes are there: it is only revived
    assert there(store, [1, 2]) == [1]
    late.add([page_of(1)])
    early.add([page_of(2)])
    early.commit()
    late.commit()
    assert collected(store).chunks == 0
    assert there(store, [1, 2]) == [1, 2]
    verified(store)


@pytest.mark.parametrize("step", range(1, 9))
def test_what_is_committed_while_a_collection_runs_stays(store, step):
    put(store, [1, 2, 3])
    base = commit(store, "name", [2])
    draft = store.begin("name")
    running = store.collect()
    for _ in range(step):
        next(running, None)
    draft.add([page_of(1)])
    draft.commit()
    store.forget([base.id])
    late = store.begin("late")
    for _ in running:
        pass
    late.add([page_of(*there(store, [2, 3]))] if there(store, [2, 3]) else [])
    late.commit()
    collected(store)
    assert 1 in there(store, [1])
    verified(store)
    for snapshot in store.snapshots():
        assert [list(store.read_chunks(list(page.ids()))) for page in store.pages(snapshot.id)]


def test_a_lease_ends_with_its_draft(store):
    for end in (Draft.discard, Draft.commit):
        put(store, [1])
        draft = store.begin("name")
        assert collected(store).held == 1
        end(draft)
        assert collected(store).chunks == 1


def test_what_was_put_for_a_running_backup_stays_through_any_number_of_collections(store):
    draft = store.begin("name")
    put(store, range(20))
    for _ in range(3):
        collected(store)
    draft.add([page_of(*range(10))])
    for _ in range(3):
        collected(store)
    draft.add([page_of(*range(10, 20))])
    for _ in range(3):
        collected(store)
    draft.commit()
    collected(store)
    assert there(store, range(20)) == list(range(20))
    verified(store)


def test_a_base_that_is_forgotten_stays_for_the_backup_that_began_with_it(store):
    put(store, range(5))
    base = commit(store, "name", range(5))
    draft = store.begin("name", base.id)
    store.forget([base.id])
    collected(store)
    draft.copy(0, 2)
    again = draft.commit()
    collected(store)
    assert list(store.pages(again.id)) == [pages.encode([ROOT]), page_of(*range(5))]
    assert there(store, range(5)) == list(range(5))
    verified(store)


def test_a_restore_that_holds_finishes_though_its_snapshot_is_forgotten(store):
    put(store, range(40))
    draft = store.begin("name")
    draft.add([page_of(seed) for seed in range(40)])
    snapshot = draft.commit()
    with store.hold():
        reading = store.pages(snapshot.id)
        found = [next(reading)]
        store.forget([snapshot.id])
        assert collected(store).condemned == 0  # who still reads the pages keeps all of it
        found += reading
        assert collected(store).held == 40
        assert found == [page_of(seed) for seed in range(40)]
        assert list(store.read_chunks(ids(*range(40)))) == [chunk(seed) for seed in range(40)]
    assert collected(store).chunks == 40


def test_a_reader_goes_on_while_its_pack_is_written_anew(tmp_path):
    with Store(Directory(tmp_path, pack_limit=10_000)) as store:
        for seed in range(40):
            put(store, [seed])
        commit(store, "name", range(0, 40, 2))
        wanted = ids(*range(0, 40, 2))
        reading = store.read_chunks(wanted)
        found = [next(reading)]
        assert collected(store).packs >= 4
        found += reading
        assert [one.id for one in found] == wanted


def test_one_collection_at_a_time(store):
    running = store.collect()
    put(store, [1])
    next(running)
    with pytest.raises(Busy):
        next(store.collect())
    running.close()
    assert collected(store).chunks == 1


def test_left_at_any_step_it_can_be_begun_again(tmp_path):
    with Store(Directory(tmp_path, pack_limit=5_000)) as store:
        wanted: set[int] = set()
        for steps in range(14):
            put(store, range(10 * steps, 10 * steps + 10))
            wanted |= {10 * steps, 10 * steps + 1}
            commit(store, "name", [10 * steps, 10 * steps + 1])
            running = store.collect()
            for _ in range(steps):
                next(running)
            running.close()
            verified(store)
        collected(store)
        assert there(store, range(140)) == sorted(wanted)
        verified(store)


def test_needed_chunks_are_found_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "NEEDED", 10)
    with Store(Memory()) as store:
        put(store, range(100))
        commit(store, "name", range(0, 100, 3))
        assert collected(store).chunks == 66
        assert there(store, range(100)) == list(range(0, 100, 3))


def test_nothing_is_removed_if_the_catalogue_is_damaged(tmp_path):
    parts = Memory()
    with Store(parts) as store:
        put(store, range(4))
        snapshot = commit(store, "name", [1])
        keys = parts.catalogue.contents(snapshot.id)
        parts.catalogue.remove_pages(keys[1:])
        with pytest.raises(CatalogueError):
            collected(store)
        assert len(list(store.read_chunks(ids(*range(4))))) == 4
        store.forget([snapshot.id])
        assert collected(store).chunks == 4


def test_damage_in_a_pack_ends_nothing(tmp_path):
    with Store(Directory(tmp_path, pack_limit=2_000)) as store:
        for seed in range(12):
            put(store, [seed])
        commit(store, "name", range(0, 12, 3))
        path = tmp_path / "packs/00000001.pack"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        collected(store)
        assert path.read_bytes() == content
        found = [damage for report in store.verify() for damage in report.damage]
        assert [damage.chunk for damage in found if damage.chunk] == ids(0, 0)
        assert list(store.read_chunks(ids(3, 6, 9))) == [chunk(seed) for seed in (3, 6, 9)]


# Crashes: a copy of the directory at every step is what a kill leaves there.


class Copying(Files):
    """Copies a store before each thing that is done to its files."""

    def __init__(self) -> None:
        self.copies: list[dict[str, bytes]] = []
        self.place: Path | None = None

    def copy(self) -> None:
        if self.place is not None:
            self.copies.append(
                {
                    str(path.relative_to(self.place)): path.read_bytes()
                    for path in self.place.rglob("*")
                    if path.is_file() and not path.name.endswith("-shm")
                }
            )

    def create(self, path: Path) -> int:
        self.copy()
        return super().create(path)

    def write(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        self.copy()
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self.copy()
        super().sync(fd)

    def remove(self, path: Path) -> None:
        self.copy()
        super().remove(path)
        self.copy()


def test_killed_at_any_step_nothing_needed_is_lost(tmp_path):
    place, files = tmp_path / "store", Copying()
    with Store(Directory(place, pack_limit=6_000, files=files)) as store:
        for seed in range(20):
            put(store, [seed])
        old = commit(store, "old", range(20))
        new = commit(store, "new", range(0, 20, 3))
        store.forget([old.id])
        files.place = place
        for _ in store.collect():
            files.copy()
        files.place = None
    assert len(files.copies) > 30
    for number, copy in enumerate(files.copies[::3]):
        left = tmp_path / f"{number}"
        for name, content in copy.items():
            (left / name).parent.mkdir(parents=True, exist_ok=True)
            (left / name).write_bytes(content)
        with Store(left) as store:
            verified(store)
            assert store.snapshots() == [new]
            wanted = ids(*range(0, 20, 3))
            assert [one.id for one in store.read_chunks(wanted)] == wanted
            collected(store)
            verified(store)
            assert there(store, range(20)) == list(range(0, 20, 3))
            assert len(list((left / "packs").iterdir())) <= 4


# All at once.


def test_backups_restores_and_collections_at_the_same_time(tmp_path):
    """Each backup uses what others put and forget, as far as `missing` says that it is there."""
    ended = threading.Event()

    def back_up(thread: int) -> int:
        draw = random.Random(thread)
        reused = 0
        for number in range(12):
            wanted = sorted(draw.sample(range(60), 20))
            draft = store.begin(f"{thread}")
            has = there(store, wanted)
            reused += len(has)
            put(store, sorted(set(wanted) - set(has)))
            for start in range(0, 20, 5):
                draft.add([page_of(*wanted[start : start + 5])])
            snapshot = draft.commit()
            with store.hold():
                assert len(list(store.pages(snapshot.id))) == 4
                found = list(store.read_chunks(ids(*wanted)))
                assert found == [chunk(seed) for seed in wanted]
                if number % 3 != 2:
                    store.forget([snapshot.id])
        return reused

    def collect_all() -> int:
        count = 0
        while not ended.is_set():
            count += collected(store).chunks
        return count

    with (
        Store(Directory(tmp_path, pack_limit=8_000)) as store,
        ThreadPoolExecutor(4) as pool,
    ):
        collecting = pool.submit(collect_all)
        try:
            backups = [pool.submit(back_up, thread) for thread in range(3)]
            assert sum(backup.result() for backup in backups) > 0
        finally:
            ended.set()
        assert collecting.result() > 0
        verified(store)
        for snapshot in store.snapshots():
            needed = {id for page in store.pages(snapshot.id) for id in page.ids()}
            assert len(list(store.read_chunks(sorted(needed)))) == 20


class Model(RuleBasedStateMachine):
    """Drafts, snapshots and collections in any order: what was told to be there can be used."""

    drafts = Bundle("drafts")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(Memory())
        self.promised: dict[Draft, set[int]] = {}
        self.kept: dict[str, set[int]] = {}
        self.pages = 0
        self.collecting: Generator[Collected, None, None] | None = None

    @rule(target=drafts)
    def begin(self) -> tuple[Draft, set[int]]:
        draft = self.store.begin("name")
        self.promised[draft] = set()
        return draft, set()

    @rule(target=drafts, base=snapshots)
    def begin_with(self, base: Snapshot) -> tuple[Draft, set[int]]:
        if base.id not in self.kept:
            return self.begin()
        draft = self.store.begin("name", base.id)
        if count := len(list(self.store.pages(base.id))):
            draft.copy(0, count)
        self.promised[draft] = set()
        return draft, set(self.kept[base.id])

    @rule(draft=drafts, seeds=st.sets(st.integers(0, 12)))
    def ask(self, draft: tuple[Draft, set[int]], seeds: set[int]) -> None:
        if draft[0] in self.promised:
            self.promised[draft[0]] |= set(there(self.store, seeds))

    @rule(draft=drafts, seeds=st.sets(st.integers(0, 12), min_size=1))
    def put(self, draft: tuple[Draft, set[int]], seeds: set[int]) -> None:
        put(self.store, seeds)
        if draft[0] in self.promised:
            self.promised[draft[0]] |= seeds

    @rule(draft=drafts, data=st.data())
    def add(self, draft: tuple[Draft, set[int]], data: st.DataObject) -> None:
        if promised := self.promised.get(draft[0]):
            seeds = data.draw(st.sets(st.sampled_from(sorted(promised)), min_size=1))
            self.pages += 1  # so that entries come in order, after those of any base
            draft[0].add([page_of(*seeds, prefix=b"%06d-" % self.pages)])
            draft[1].update(seeds)

    @rule(target=snapshots, draft=consumes(drafts))
    def commit(self, draft: tuple[Draft, set[int]]) -> Snapshot:
        snapshot = draft[0].commit()
        self.kept[snapshot.id] = draft[1]
        del self.promised[draft[0]]
        return snapshot

    @rule(draft=consumes(drafts))
    def discard(self, draft: tuple[Draft, set[int]]) -> None:
        draft[0].discard()
        del self.promised[draft[0]]

    @rule(snapshot=consumes(snapshots))
    def forget(self, snapshot: Snapshot) -> None:
        self.store.forget([snapshot.id])
        del self.kept[snapshot.id]

    @rule(steps=st.integers(1, 9))
    def go_on_collecting(self, steps: int) -> None:
        self.collecting = self.collecting or self.store.collect()
        for _ in range(steps):
            if next(self.collecting, None) is None:
                self.collecting = None
                break

    @rule()
    def give_up_collecting(self) -> None:
        if self.collecting:
            self.collecting.close()
            self.collecting = None

    @invariant()
    def every_snapshot_is_whole(self) -> None:
        for id, seeds in self.kept.items():
            named = {one for page in self.store.pages(id) for one in page.ids()}
            assert named == set(ids(*seeds))
            assert len(list(self.store.read_chunks(sorted(named)))) == len(seeds)


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
