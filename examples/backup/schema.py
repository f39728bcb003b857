"""The tables of a catalogue in SQLite, and the version of the format that they are."""

VERSION = 3
SCHEMA = (
    """
    CREATE TABLE chunks (
        id BLOB PRIMARY KEY,
        pack INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        size INTEGER NOT NULL,
        condemned INTEGER NOT NULL DEFAULT 0,
        lost INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID
    """,
    # Chunks are added in this order: it grows at its end, and costs little.
    "CREATE INDEX chunks_by_place ON chunks (pack, offset)",
    "CREATE INDEX chunks_condemned ON chunks (pack, condemned) WHERE condemned > 0",
    "CREATE INDEX chunks_lost ON chunks (id) WHERE lost",
    """
    CREATE TABLE packs (
        number INTEGER PRIMARY KEY,
        ends INTEGER NOT NULL DEFAULT 0,
        used INTEGER NOT NULL DEFAULT 0,
        chunks INTEGER NOT NULL DEFAULT 0,
        content INTEGER NOT NULL DEFAULT 0,
        digest BLOB NOT NULL
    )
    """,
    # AUTOINCREMENT: a number is never used again, not even one whose page was removed.
    """
    CREATE TABLE pages (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        entries INTEGER NOT NULL,
        files INTEGER NOT NULL,
        size INTEGER NOT NULL,
        digest BLOB NOT NULL,
        data BLOB NOT NULL,
        chunks BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        digest BLOB NOT NULL,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        entries INTEGER NOT NULL,
        files INTEGER NOT NULL,
        size INTEGER NOT NULL,
        chunks INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE contents (
        snapshot INTEGER NOT NULL REFERENCES snapshots ON DELETE CASCADE,
        position INTEGER NOT NULL,
        page INTEGER NOT NULL REFERENCES pages,
        PRIMARY KEY (snapshot, position)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX contents_by_page ON contents (page)",
    # Each fact is here twice: without the tenant's key, nothing that is encrypted can be read.
    """
    CREATE TABLE facts (
        name TEXT NOT NULL,
        copy INTEGER NOT NULL,
        value BLOB NOT NULL,
        digest BLOB NOT NULL,
        PRIMARY KEY (name, copy)
    ) WITHOUT ROWID
    """,
)
