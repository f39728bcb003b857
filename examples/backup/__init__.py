"""The reference backup: deduplicating, over one connection. README.md says how to use it.

What a backup is made of stands in modules that know nothing of the network:

* `tree`: a directory tree as a stream of entries
* `chunks`: files cut into chunks; their ids, their compression
* `reader`: a tree, read in batches for a backup
* `loads`: a restore, cut into portions
* `target`: a directory that is being restored
* `packs`: files of chunks, appended to
* `catalogue`: where each chunk is
* `snapshots`: which entries each snapshot has
* `store`: what the server keeps: packs, catalogue and snapshots, in an order that survives crashes
* `errors`: what any of them raises

Their functions block and may be called from any thread, unless they say otherwise.

What crosses the network:

* `service`: the contract of both sides
* `server`: a store's methods as handlers, and the process that serves them
* `client`: a backup, as a pipeline
* `restore`: a restore, as a pipeline
* `stages`: work in threads between two channels
* `cli`: the commands
* `demo`: all of it on a real tree
"""
