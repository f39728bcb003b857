"""The reference backup: deduplicating, over one connection.

What a backup is made of stands in modules that know nothing of the network:

* `tree`: a directory tree as a stream of entries
* `chunks`: files cut into chunks; their ids, their compression
* `target`: a directory that is being restored
* `packs`: files of chunks, appended to
* `catalogue`: where each chunk is
* `snapshots`: which entries each snapshot has
* `store`: what the server keeps: packs, catalogue and snapshots, in an order that survives crashes
* `errors`: what any of them raises

Their functions block and may be called from any thread, unless they say otherwise.
"""
