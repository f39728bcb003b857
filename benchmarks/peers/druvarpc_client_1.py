"""druvarpc with one interceptor of the client."""

from benchmarks.peers import druvarpc

NAME = "one interceptor of the client"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way(client=1)
