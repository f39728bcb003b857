"""druvarpc with three interceptors of the client."""

from benchmarks.peers import druvarpc

NAME = "three of the client"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way(client=3)
