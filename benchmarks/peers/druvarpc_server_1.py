"""druvarpc with one interceptor of the server."""

from benchmarks.peers import druvarpc

NAME = "one of the server"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way(server=1)
