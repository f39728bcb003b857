"""druvarpc over a Unix socket."""

from benchmarks.peers import druvarpc

NAME = "Unix socket"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve
druvarpc.way = druvarpc.Way("unix://{folder}/socket")
