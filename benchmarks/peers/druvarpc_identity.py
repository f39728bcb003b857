"""druvarpc with authenticate and authorize."""

from benchmarks.peers import druvarpc

NAME = "authenticate and authorize"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way(identity=True)
