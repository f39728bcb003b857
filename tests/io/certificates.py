"""Certificates for tests, as files: an authority, a server's, and clients'."""

from dataclasses import dataclass
from pathlib import Path

import trustme

import druvarpc


@dataclass(frozen=True)
class Authority:
    """An authority, and the folder where it writes what it certifies."""

    folder: Path
    ca: trustme.CA

    @property
    def file(self) -> Path:
        path = self.folder / "authority.pem"
        self.ca.cert_pem.write_to_path(str(path))
        return path

    def certify(self, *names: str, to: str = "server", common_name: str | None = None) -> Path:
        """Write a chain and its key to one file, at once as far as a server can see."""
        certified = self.ca.issue_cert(*names, common_name=common_name)
        path = self.folder / f"{to}.pem"
        fresh = path.with_suffix(".new")
        certified.private_key_and_cert_chain_pem.write_to_path(str(fresh))
        fresh.replace(path)
        return path

    def server(self, *names: str, **more: object) -> druvarpc.TLS:
        return druvarpc.TLS(
            certificate=self.certify(*(names or ("127.0.0.1", "localhost"))), **more
        )

    def client(self, **more: object) -> druvarpc.TLS:
        return druvarpc.TLS(authorities=self.file, **more)


def authority(folder: Path) -> Authority:
    folder.mkdir(exist_ok=True)
    return Authority(folder, trustme.CA(key_type=trustme.KeyType.ECDSA))
