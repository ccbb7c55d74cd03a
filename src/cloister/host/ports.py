"""Whether a port of the host's loopback is free, for gateways whose ports systemd shall hold. Looks, and holds none."""

from __future__ import annotations

import errno
import socket


def taken(port: int) -> bool:
    """Say whether somebody listens on a port of 127.0.0.1, or of all addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are over are nobody's
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
