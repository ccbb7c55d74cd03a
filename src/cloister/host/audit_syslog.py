"""Syslog on the wire: UDP (RFC 5426), TCP (RFC 6587, counted octets), TLS (RFC 5425), and the host's own journal.

Syslog has no acknowledgement. Over TCP and TLS a message counts as arrived when the receiver's kernel has taken it and
the connection has lived on for `SETTLE_S`; when it breaks, everything younger is sent again. So a receiver that is
killed loses nothing but what it had not read for longer than that, and may get messages twice, which their sequence
number tells. UDP and the journal's socket get each message once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import time
from collections import deque
from typing import NamedTuple
from urllib.parse import urlsplit

SETTLE_S = 10.0
BURST = 32
"""Datagrams sent in one go: Linux's default buffer of a receiver holds some 90 of them."""
PACE_PER_S = 4000.0
"""Datagrams a second from then on: RFC 5426 has no way to hear that a receiver falls behind."""
_TIMEOUT_S = 20.0
JOURNAL = "/run/systemd/journal/socket"
DEV_LOG = "/dev/log"


class Trust(NamedTuple):
    """Who a receiver must be, and who we are."""

    authorities: str = ""
    """File with certificates of authorities; empty: the system's."""
    certificate: str = ""
    """File with our certificate and its key, where the receiver asks for one."""


def tls_context(trust: Trust) -> ssl.SSLContext:
    """Return what verifies a receiver's certificate and name; TLS 1.2 is the least (RFC 9662).

    Raises:
        OSError: a file cannot be read, or holds no certificate (ssl.SSLError is an OSError).
    """
    context = ssl.create_default_context(cafile=trust.authorities or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if trust.certificate:
        context.load_cert_chain(trust.certificate)
    return context


class Datagrams:
    """Syslog over UDP: one datagram each, no word of whether it arrived, and so never many at once."""

    def __init__(self, host: str, port: int) -> None:
        """Resolve with the first message."""
        self._address = (host, port)
        self._socket: socket.socket | None = None
        self._room, self._since = float(BURST), 0.0
        self.arrived = 0

    def send(self, seq: int, message: bytes) -> None:
        """Send one message, after a moment (ms) where many went before it.

        Raises:
            OSError: it could not be sent; also when an earlier one was answered with "port unreachable".
        """
        self._pace()
        if self._socket is None:
            found = socket.getaddrinfo(*self._address, type=socket.SOCK_DGRAM)[0]
            self._socket = socket.socket(found[0], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.connect(found[4])
        self._socket.send(message)
        self.arrived = seq

    def _pace(self) -> None:
        """Wait until there is room for one more; half a burst's time at once, as each wait costs a turn."""
        now = time.monotonic()
        self._room = min(BURST, self._room + (now - self._since) * PACE_PER_S)
        if self._room < 1:
            time.sleep(BURST / 2 / PACE_PER_S)
            now = time.monotonic()
            self._room += BURST / 2
        self._since = now
        self._room -= 1

    def look(self) -> None:
        """Nothing is to be heard."""

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class Stream:
    """Syslog over TCP or TLS."""

    def __init__(self, host: str, port: int, trust: Trust | None = None) -> None:
        """Connect with the first message; with `trust` by TLS."""
        self._address, self._trust = (host, port), trust
        self._socket: socket.socket | None = None
        self._pending: deque[tuple[int, float]] = deque()
        self._sent = 0
        self.arrived = 0
        """The number of the last message that is known to have arrived."""

    def send(self, seq: int, message: bytes) -> None:
        """Send one framed message.

        Raises:
            OSError: the receiver cannot be reached, is not who it must be, or went away; what has not `arrived` must be
                sent again. TLS errors are OSErrors.
        """
        if self._socket is None:
            self._socket = self._connect()
        self._socket.sendall(message)
        self._sent = seq

    def look(self) -> None:
        """Note what has arrived, and notice that the receiver went away.

        Raises:
            OSError: it went away.
        """
        if self._socket is None:
            return
        self._hear(self._socket)
        now = time.monotonic()
        if self._sent and not self._unsent(self._socket):
            if not self._pending or self._pending[-1][0] != self._sent:
                self._pending.append((self._sent, now))
            while self._pending and self._pending[0][1] + SETTLE_S <= now:
                self.arrived = self._pending.popleft()[0]

    def close(self) -> None:
        """Let go of the connection; what was sent last may or may not arrive."""
        if self._socket is not None:
            with contextlib.suppress(OSError, ValueError):
                if isinstance(self._socket, ssl.SSLSocket):
                    self._socket.unwrap()
            self._socket.close()
        self._socket, self._sent = None, 0
        self._pending.clear()

    def _connect(self) -> socket.socket:
        raw = socket.create_connection(self._address, timeout=_TIMEOUT_S)
        try:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_TIMEOUT_S * 1000))
            if self._trust is None:
                return raw
            return tls_context(self._trust).wrap_socket(raw, server_hostname=self._address[0])
        except BaseException:
            raw.close()
            raise

    @staticmethod
    def _hear(connection: socket.socket) -> None:
        """Read what the receiver says, which is nothing but the end, an alert, or TLS's own business."""
        while select.select([connection], [], [], 0)[0]:
            connection.settimeout(0)
            try:
                if not connection.recv(4096):
                    raise ConnectionResetError(errno.ECONNRESET, "the receiver closed the connection")
            except (ssl.SSLWantReadError, BlockingIOError):
                return
            finally:
                connection.settimeout(_TIMEOUT_S)

    @staticmethod
    def _unsent(connection: socket.socket) -> int:
        """Return how many bytes the receiver's kernel has not taken yet (SIOCOUTQ, tcp(7))."""
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", answer)[0])


class Local:
    """The host's own log: the journal by its native protocol where there is one, else /dev/log."""

    def __init__(self, journal: str = JOURNAL, dev_log: str = DEV_LOG) -> None:
        """Connect with the first message."""
        self._journal, self._dev_log = journal, dev_log
        self._socket: socket.socket | None = None
        self.native = os.path.exists(journal)
        self.arrived = 0

    def send(self, seq: int, message: bytes) -> None:
        """Send one message, made by `journal_entry` or `dev_log_line`.

        Raises:
            OSError: nobody listens, or takes no more for now.
        """
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            connection.settimeout(_TIMEOUT_S)
            try:
                connection.connect(self._journal if self.native else self._dev_log)
            except BaseException:
                connection.close()
                raise
            self._socket = connection
        self._socket.send(message)
        self.arrived = seq

    def look(self) -> None:
        """Nothing is to be heard."""

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def split_address(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of `udp://`, `tcp://` or `tls://`.

    Raises:
        ValueError: it has no host or no port.
    """
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        raise ValueError(f"{url} has no host or no port")
    return parts.scheme, parts.hostname, parts.port
