"""druvarpc behind an upgrade of HTTP."""

from benchmarks.peers import druvarpc

NAME = "HTTP upgrade"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way("http://127.0.0.1:0")
