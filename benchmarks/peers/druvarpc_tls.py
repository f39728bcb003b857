"""druvarpc over TLS."""

from pathlib import Path

import trustme

from benchmarks.peers import druvarpc
from druvarpc import TLS

NAME = "TLS"
PACKAGE = druvarpc.PACKAGE
OPERATIONS = druvarpc.OPERATIONS
serve = druvarpc.serve


def certify(folder: Path) -> TLS:
    """Make an authority and a certificate, both of elliptic curves."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    certified = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    certified.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    return TLS(certificate=folder / "server.pem")


druvarpc.way = druvarpc.Way("tls://127.0.0.1:0", tls=certify)
