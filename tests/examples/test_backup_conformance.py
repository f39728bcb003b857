"""What packs and a catalogue have to do, whatever they are kept in: one suite for each.

Another implementation is added to `PACKS` or `CATALOGUES`, and has to pass.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from examples.backup.catalogue import Catalogue
from examples.backup.chunks import Chunk
from examples.backup.errors import (
    CatalogueError,
    KeyExists,
    PackError,
    PackMissing,
    UnknownChunks,
    UnknownSnapshot,
)
from examples.backup.interfaces import CatalogueStore, Location, PackStore, PackUse, Stored
from examples.backup.memory import MemoryCatalogue, MemoryPacks
from examples.backup.packs import Packs
from examples.backup.snapshots import Snapshot
from tests.examples.stores import chunk, ids, page_of

CHUNKS = [chunk(seed, 10 * seed) for seed in range(1, 8)]

PACKS: dict[str, Callable[[Path], PackStore]] = {
    "files": lambda place: Packs(place / "packs", limit=200),
    "memory": lambda _: MemoryPacks(MemoryCatalogue(), limit=3),
}
CATALOGUES: dict[str, Callable[[Path], CatalogueStore]] = {
    "sqlite": lambda place: Catalogue(place / "catalogue.sqlite"),
    "sqlite, gathering": lambda place: Catalogue(place / "catalogue.sqlite", gather=100),
    "memory": lambda _: MemoryCatalogue(),
}


@pytest.fixture(params=PACKS)
def packs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PackStore]:
    with closing(PACKS[request.param](tmp_path)) as packs:
        yield packs


@pytest.fixture(params=CATALOGUES)
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CatalogueStore]:
    with closing(CATALOGUES[request.param](tmp_path)) as catalogue:
        yield catalogue


class TestPacks:
    def test_what_is_appended_is_read_in_any_order(self, packs: PackStore):
        first = packs.append(CHUNKS[:2])
        second = packs.append(CHUNKS[2:])
        packs.sync()
        assert list(packs.read(first + second)) == CHUNKS
        assert list(packs.read([second[0], first[1], second[0]])) == [
            CHUNKS[2],
            CHUNKS[1],
            CHUNKS[2],
        ]
        assert list(packs.read([])) == []

    def test_a_full_pack_is_followed_by_the_next(self, packs: PackStore):
        assert packs.current == 0
        where = [packs.append([one])[0] for one in CHUNKS]
        packs.sync()
        numbers = [location.pack for location in where]
        assert numbers == sorted(numbers)
        assert packs.numbers() == sorted(set(numbers))
        assert len(packs.numbers()) > 1
        assert packs.current == numbers[-1]
        assert list(packs.read(where)) == CHUNKS

    def test_a_scan_finds_all_records_from_any_of_them_on(self, packs: PackStore):
        where = packs.append(CHUNKS)
        packs.sync()
        records = list(zip(where, CHUNKS, strict=True))
        assert where[0].offset == packs.first
        assert list(packs.scan(where[0].pack)) == records
        for position, location in enumerate(where):
            assert list(packs.scan(location.pack, location.offset)) == records[position:]

    def test_records_follow_each_other_without_gaps(self, packs: PackStore):
        where = packs.append(CHUNKS)
        ends = [location.offset + location.length for location in where]
        assert [location.offset for location in where] == [packs.first, *ends[:-1]]

    def test_a_sealed_pack_is_not_appended_to(self, packs: PackStore):
        (first,) = packs.append(CHUNKS[:1])
        packs.seal()
        assert packs.current == 0
        (second,) = packs.append(CHUNKS[1:2])
        packs.sync()
        packs.seal()
        packs.seal()
        assert second.pack > first.pack
        assert list(packs.read([first, second])) == CHUNKS[:2]

    def test_a_removed_pack_is_missing_and_its_number_not_used_again(self, packs: PackStore):
        (first,) = packs.append(CHUNKS[:1])
        packs.sync()
        packs.seal()
        packs.remove(first.pack)
        packs.remove(first.pack)
        assert packs.numbers() == []
        with pytest.raises(PackMissing):
            list(packs.read([first]))
        with pytest.raises(PackMissing):
            list(packs.scan(first.pack))
        (second,) = packs.append(CHUNKS[1:2])
        assert second.pack > first.pack

    def test_a_reader_of_a_removed_pack_goes_on_or_is_told(self, packs: PackStore):
        where = packs.append(CHUNKS[:3])
        packs.sync()
        packs.seal()
        reading = packs.read(where)
        found = [next(reading)]
        packs.remove(where[0].pack)
        try:
            found += reading
        except PackMissing:
            return
        assert found == CHUNKS[:3]

    def test_what_is_not_there_is_refused(self, packs: PackStore):
        (where,) = packs.append(CHUNKS[:1])
        packs.sync()
        for wrong in (
            Location(where.pack, where.offset + where.length, where.length),
            Location(where.pack, where.offset, where.length + 1),
            Location(where.pack + 1, where.offset, where.length),
        ):
            with pytest.raises(PackError):
                list(packs.read([wrong]))

    def test_readers_and_a_writer_do_not_disturb_each_other(self, packs: PackStore):
        where = packs.append(CHUNKS)
        packs.sync()

        def read(_: int) -> bool:
            return all(list(packs.read(where)) == CHUNKS for _ in range(20))

        with ThreadPoolExecutor(4) as pool:
            readings = pool.map(read, range(4))
            for _ in range(20):
                packs.append(CHUNKS)
                packs.sync()
            assert all(readings)


def placed(seed: int, pack: int = 1) -> tuple[Chunk, Location]:
    return chunk(seed), Location(pack, 10 * seed, 5)


def stored(seed: int, pack: int = 1, condemned: int = 0) -> Stored:
    return Stored(chunk(seed).id, Location(pack, 10 * seed, 5), 1000, condemned)


def known(catalogue: CatalogueStore, *seeds: int) -> list[Stored]:
    found = catalogue.find(ids(*seeds))
    return [found[id] for id in ids(*seeds) if id in found]


def snapshot(id: str, created: int = 1) -> Snapshot:
    return Snapshot(id, "name", created, 3, 2, 2000, 2)


class TestCatalogue:
    def test_chunks_are_found(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2)])
        assert known(catalogue, 2, 3, 1) == [stored(2), stored(1)]
        assert catalogue.find([]) == {}
        assert catalogue.find([b"", b"short", bytes(100)]) == {}

    @pytest.mark.parametrize("count", [499, 500, 501, 3500])
    def test_very_many_are_found(self, catalogue: CatalogueStore, count: int):
        many = [seed.to_bytes(32, "big") for seed in range(2 * count)]
        catalogue.add((Chunk(id, 1, b""), Location(1, 1, 1)) for id in many[::2])
        assert list(catalogue.find(many)) == many[::2]

    def test_a_chunk_that_is_known_stays_where_it_is(self, catalogue: CatalogueStore):
        catalogue.add([placed(1)])
        catalogue.add([placed(1, pack=9), placed(2, pack=9)])
        assert known(catalogue, 1, 2) == [stored(1), stored(2, pack=9)]

    def test_a_chunk_that_is_lost_is_added_in_another_place(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2)])
        catalogue.set_lost(stored(1), True)
        catalogue.set_lost(stored(2, pack=8), True)
        assert catalogue.lost() == set(ids(1))
        assert [one.lost for one in known(catalogue, 1, 2)] == [True, False]
        catalogue.add([placed(1, pack=9), placed(2, pack=9)])
        assert known(catalogue, 1, 2) == [stored(1, pack=9), stored(2)]
        assert catalogue.packs() == [PackUse(1, 25, 5, 1, 1000), PackUse(9, 25, 5, 1, 1000)]
        catalogue.set_lost(stored(2), True)
        catalogue.set_lost(stored(2), False)
        assert catalogue.lost() == set()

    def test_chunks_come_in_the_order_of_their_ids(self, catalogue: CatalogueStore):
        catalogue.add(placed(seed) for seed in range(20))
        every = sorted(ids(*range(20)))
        found, after = [], b""
        while some := catalogue.chunks(after, 7):
            assert len(some) <= 7
            found += [one.id for one in some]
            after = some[-1].id
        assert found == every

    def test_condemned_once_and_revived(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2), placed(3)])
        catalogue.condemn(ids(1, 2, 99), 5)
        catalogue.condemn(ids(1), 6)
        assert known(catalogue, 1, 2, 3) == [
            stored(1, condemned=5),
            stored(2, condemned=5),
            stored(3),
        ]
        assert catalogue.condemned() == 2
        catalogue.revive(ids(1, 3, 99))
        assert known(catalogue, 1, 2, 3) == [stored(1), stored(2, condemned=5), stored(3)]
        assert catalogue.condemned() == 1

    def test_a_sweep_takes_what_was_condemned_early_enough(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2), placed(3), placed(4, pack=2)])
        catalogue.condemn(ids(1, 4), 5)
        catalogue.condemn(ids(2), 6)
        assert catalogue.sweep(1, 4) == (0, 0)
        assert catalogue.sweep(1, 5) == (1, 5)
        assert known(catalogue, 1, 2, 3, 4) == [
            stored(2, condemned=6),
            stored(3),
            stored(4, pack=2, condemned=5),
        ]

    def test_packs_count_what_they_have(self, catalogue: CatalogueStore):
        assert catalogue.packs() == []
        catalogue.begin_pack(1)
        assert catalogue.packs() == [PackUse(1)]
        catalogue.add([placed(1), placed(2), placed(3, pack=2)])
        catalogue.add([placed(1, pack=2)])
        assert catalogue.packs() == [PackUse(1, 25, 10, 2, 2000), PackUse(2, 35, 5, 1, 1000)]
        catalogue.condemn(ids(2), 1)
        catalogue.sweep(1, 1)
        assert catalogue.packs()[0] == PackUse(1, 25, 5, 1, 1000)

    def test_chunks_move_if_they_are_where_they_were(self, catalogue: CatalogueStore):
        catalogue.begin_pack(2)
        catalogue.add([placed(1), placed(2), placed(3)])
        catalogue.condemn(ids(2), 7)
        to = Location(2, 100, 6)
        catalogue.move([(stored(1), to), (stored(3, pack=8), to), (stored(9), to)])
        assert known(catalogue, 1, 3) == [Stored(chunk(1).id, to, 1000), stored(3)]
        catalogue.move([(stored(2), Location(2, 106, 5))])
        assert known(catalogue, 2) == [Stored(chunk(2).id, Location(2, 106, 5), 1000, 7)]
        assert catalogue.packs() == [PackUse(1, 35, 5, 1, 1000), PackUse(2, 111, 11, 2, 2000)]

    def test_what_is_in_a_pack_comes_in_order(self, catalogue: CatalogueStore):
        catalogue.add([placed(3), placed(1), placed(2), placed(4, pack=2)])
        assert catalogue.in_pack(1, 0, 2) == [stored(1), stored(2)]
        assert catalogue.in_pack(1, 20, 9) == [stored(2), stored(3)]
        assert catalogue.in_pack(1, 31, 9) == []

    def test_a_pack_ends_when_it_has_no_chunks_and_its_number_stays_taken(
        self, catalogue: CatalogueStore
    ):
        assert catalogue.last_pack() == 0
        catalogue.begin_pack(3)
        catalogue.begin_pack(3)
        catalogue.add([placed(1, pack=3)])
        catalogue.end_pack(3)
        assert [pack.number for pack in catalogue.packs()] == [3]
        catalogue.condemn(ids(1), 1)
        catalogue.sweep(3, 1)
        catalogue.end_pack(3)
        assert catalogue.packs() == []
        assert catalogue.last_pack() == 3

    def test_pages_come_back_as_they_were(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2)])
        made = [page_of(1), page_of(1, 2), page_of(2)]
        keys = catalogue.add_pages(made)
        assert len(set(keys)) == 3
        assert catalogue.pages(keys[::-1]) == made[::-1]
        assert catalogue.pages([]) == []
        with pytest.raises(CatalogueError, match="missing"):
            catalogue.pages([keys[0], max(keys) + 1])

    def test_pages_name_no_chunk_that_is_not_there(self, catalogue: CatalogueStore):
        catalogue.add([placed(1)])
        with pytest.raises(UnknownChunks) as caught:
            catalogue.add_pages([page_of(1), page_of(1, 2)])
        assert caught.value.ids == ids(2)
        assert catalogue.unused_pages() == set()

    def test_pages_revive_what_they_name(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2)])
        catalogue.condemn(ids(1, 2), 5)
        catalogue.add_pages([page_of(1)])
        assert known(catalogue, 1, 2) == [stored(1), stored(2, condemned=5)]

    def test_snapshots_share_pages(self, catalogue: CatalogueStore):
        catalogue.add([placed(1), placed(2)])
        one, two, three = catalogue.add_pages([page_of(1), page_of(2), page_of(1, 2)])
        catalogue.commit(snapshot("b", 2), [one, two])
        catalogue.commit(snapshot("a", 1), [two])
        assert catalogue.snapshots() == [snapshot("a", 1), snapshot("b", 2)]
        assert (catalogue.contents("a"), catalogue.contents("b")) == ([two], [one, two])
        assert (catalogue.used_pages(), catalogue.unused_pages()) == ({one, two}, {three})
        catalogue.remove_snapshots(["b", "nobody"])
        assert catalogue.snapshots() == [snapshot("a", 1)]
        assert (catalogue.used_pages(), catalogue.unused_pages()) == ({two}, {one, three})
        with pytest.raises(UnknownSnapshot):
            catalogue.contents("b")
        catalogue.remove_pages([one, three])
        assert catalogue.unused_pages() == set()
        assert catalogue.pages([two]) == [page_of(2)]

    def test_keys_of_removed_pages_are_not_used_again(self, catalogue: CatalogueStore):
        catalogue.add([placed(1)])
        (key,) = catalogue.add_pages([page_of(1)])
        catalogue.remove_pages([key])
        assert catalogue.add_pages([page_of(1)]) != [key]

    def test_generations_are_kept(self, catalogue: CatalogueStore):
        assert catalogue.generation() == 1
        catalogue.set_generation(2)
        assert catalogue.generation() == 2

    def test_a_key_is_kept_once(self, catalogue: CatalogueStore):
        assert catalogue.key() == b""
        catalogue.set_key(b"wrapped")
        with pytest.raises(KeyExists):
            catalogue.set_key(b"another")
        assert catalogue.key() == b"wrapped"

    def test_no_key_comes_after_what_is_not_encrypted(self, catalogue: CatalogueStore):
        catalogue.add([placed(1)])
        with pytest.raises(KeyExists, match="not encrypted"):
            catalogue.set_key(b"wrapped")
        assert catalogue.key() == b""

    def test_threads_share_it(self, catalogue: CatalogueStore):
        def work(thread: int) -> bool:
            seeds = range(1000 * thread, 1000 * thread + 15)
            for seed in seeds:
                id = seed.to_bytes(32, "big")
                catalogue.add([(Chunk(id, 1, b""), Location(1, seed, 1))])
                if not catalogue.find([id]):
                    return False
            return len(catalogue.in_pack(1, seeds[0], 15)) == 15

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(1, 5)))
        assert catalogue.packs()[0].chunks == 60

    def test_it_says_that_it_is_intact(self, catalogue: CatalogueStore):
        catalogue.add([placed(1)])
        assert catalogue.check() == []
