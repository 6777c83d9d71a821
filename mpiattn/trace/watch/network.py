"""Lines of JSON between the watches of the hosts, over sockets of their own: MPI may be what is stuck."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LONGEST = 2**28  # bytes of a line; a longer one is nothing that a watch sends


class Connection:
    """A connection to the watch of another host, which sends and takes lines and never blocks for long."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.socket.settimeout(2.0)
        self.pending = b""
        self.lost = False

    def send(self, **line: object) -> None:
        """Send a line; where the other side is not there any more, note it."""
        try:
            self.socket.sendall(json.dumps(line).encode() + b"\n")
        except OSError:
            self.lost = True

    def lines(self) -> Iterator[dict[str, Any]]:
        """Return the lines that have come, to be asked for when the socket can be read."""
        try:
            data = self.socket.recv(2**20)
        except OSError:
            data = b""
        self.lost = self.lost or not data or len(self.pending) > LONGEST
        *whole, self.pending = (self.pending + data).split(b"\n")
        for line in whole:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def listen() -> socket.socket:
    """Return a socket at which the other hosts can call, at a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def call(addresses: Sequence[str], port: int) -> Connection | None:
    """Return a connection to the first address that answers, None where none does."""
    for address in addresses:
        with contextlib.suppress(OSError):
            return Connection(socket.create_connection((address, port), timeout=2.0))
    return None


def own_addresses() -> list[str]:
    """Return the addresses of this host: its name, and where Linux says so, those of its network devices."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        words = Path("/proc/net/fib_trie").read_text().split()
        # "|-- ADDRESS /32 host LOCAL" is an address of this host.
        for place, word in enumerate(words[:-3]):
            if word == "|--" and words[place + 2 : place + 5] == ["/32", "host", "LOCAL"]:
                found.append(words[place + 1])
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, scope, _, _ = line.split()
            if scope == "00":  # known everywhere
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    others = [address for address in dict.fromkeys(found) if not address.startswith("127.") and address != "::1"]
    return others
