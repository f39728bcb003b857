"""The reference backup: deduplicating, over one connection. README.md says how to use it.

What a backup is made of stands in modules that know nothing of the network:

* `tree`: a directory tree as a stream of entries
* `chunks`: files cut into chunks; their ids, their compression
* `reader`: a tree, read in batches for a backup
* `loads`: a restore, cut into portions
* `target`: a directory that is being restored
* `store`: what the server keeps: packs and a catalogue, in an order that survives crashes
* `interfaces`: what both have to do, wherever they are kept
* `packs`: files of chunks, appended to; `files`: what they ask of the operating system
* `catalogue`: where each chunk is, pages of entries and snapshots, in SQLite; `schema`: its tables;
  `database`, `wal`: its file
* `directory`: both of them in a directory; `memory`: both in memory
* `drafts`: snapshots in the making; `snapshots`: what is known of one without its entries
* `leases`: what keeps running backups and restores from losing what they count on
* `collect`, `verify`, `retention`: removing garbage, finding damage, which snapshots a rule keeps
* `reports`: what is told of these
* `tenants`: who may use a server, and for what; `tenancy`: each tenant's store
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
