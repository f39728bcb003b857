"""druvarpc with three interceptors of the server."""

from benchmarks.peers import druvarpc

NAME = "three of the server"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way(server=3)
