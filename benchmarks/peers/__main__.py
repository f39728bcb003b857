"""The processes of a measurement: `serve PEER`, `measure PEER OPERATION LOAD`, `describe PEER`.

Each prints one line of JSON: the server its port once it listens, the client what it measured. A
peer is imported nowhere else, so that one that fails takes nothing else with it.
"""

import importlib.metadata
import json
import sys
from dataclasses import asdict

from benchmarks.measure import Load
from benchmarks.peers import load_peer


def report(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(command: str, name: str, *arguments: str) -> None:
    peer = load_peer(name)
    if command == "describe":
        version = importlib.metadata.version(peer.PACKAGE)
        report([peer.NAME, f"{peer.PACKAGE} {version}", sorted(peer.OPERATIONS)])
    elif command == "serve":
        peer.serve(report)
    else:
        operation, load = arguments
        report(asdict(peer.OPERATIONS[operation](Load(**json.loads(load)))))


main(*sys.argv[1:])
