"""The processes of a measurement: `serve PEER ADDRESS`, and `measure PEER OPERATION JOB`.

Each prints one line of JSON: the server its port once it listens, the client what it measured. A
peer is imported nowhere else, so that one that fails takes nothing else with it.
"""

import json
import sys

from benchmarks.wan.ends import load_end
from benchmarks.wan.job import Job


def report(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(command: str, name: str, *arguments: str) -> None:
    end = load_end(name)
    if command == "serve":
        end.serve(arguments[0], report)
    else:
        operation, job = arguments
        report(end.OPERATIONS[operation](Job(**json.loads(job))))


main(*sys.argv[1:])
