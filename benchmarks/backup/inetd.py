"""`python -m benchmarks.backup.inetd HOST PORT COMMAND…`: a command for each connection, in turn.

The connection is the command's input and output, as inetd does it: so nothing stands between borg
and its client that would take time.
"""

import socket
import subprocess
import sys


def main() -> None:
    host, port, *command = sys.argv[1:]
    with socket.create_server((host, int(port))) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Waited for: what it used is counted as this process's children's.
                subprocess.run(command, stdin=connection, stdout=connection, check=False)


main()
