"""One upstream at run time: its key, its open connections, and whether it is worth trying.

Connections are kept and used again, checked by TLS unless the upstream is on this host. The key is asked for anew every
few seconds, and at once after a 401, so that it rotates without a restart; between that, a request waits for nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from cloister.llm import upstreams
from cloister.llm.errors import Refusal
from cloister.llm.upstreams import Headers, Upstream
from cloister.relay.upstream import HttpUpstream

if TYPE_CHECKING:
    import ssl

KEY_KEPT_S = 5.0
KEPT_CONNECTIONS = 64
KEPT_S = 30.0
"""Shorter than servers keep theirs, so that a request seldom meets a connection that is closing."""
TRIP_AFTER = 5
"""Failures in a row after which an upstream is left alone, where there is another one."""
REST_S = 30.0


def _system_trust() -> ssl.SSLContext:
    """Return a client's context that trusts what the host trusts, for HTTP/1.1."""
    from cloister.relay.trust import system_trust

    return system_trust(False)


class SupplyError(Exception):
    """An upstream that cannot be used now; the refusal is for the client."""

    def __init__(self, refusal: Refusal) -> None:
        """Keep it."""
        super().__init__(refusal.message)
        self.refusal = refusal


class Key(Protocol):
    """The secret that opens an upstream."""

    async def read(self) -> str:
        """Return it as it is now.

        Raises:
            CloisterError: it cannot be had.
        """
        ...

    def rejected(self) -> None:
        """The upstream did not accept it: whatever was remembered of it is old."""
        ...


class Signer(Protocol):
    """Makes the fields that open an upstream for one request, where a key alone does not."""

    async def sign(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> list[tuple[str, str]]:
        """Return fields to add.

        Raises:
            ValueError: it cannot be signed; the message holds nothing secret.
        """
        ...


class Supply:
    """One upstream."""

    def __init__(
        self, upstream: Upstream, key: Key | None = None, signer: Signer | None = None,
        trust: Callable[[], ssl.SSLContext] = _system_trust,
    ) -> None:  # fmt: skip
        """Open nothing yet.

        Args:
            upstream: where and how.
            key: None where there is none.
            signer: signs requests instead.
            trust: makes the context by which an upstream's certificate is checked.
        """
        self.upstream = upstream
        self.signer = signer
        self.failures = 0
        self.down_until = 0.0
        self._key = key
        self._trust = trust
        self._lines = b""
        self._lines_until = -1.0
        self._idle: list[tuple[float, HttpUpstream]] = []

    # The key.

    def lines(self) -> bytes | None:
        """Return our lines of a request head, key included; None when the key has to be asked for."""
        return self._lines if time.monotonic() < self._lines_until else None

    async def refresh(self, *, rejected: bool = False) -> bool:
        """Ask for the key; return whether it has changed. `rejected` says that the upstream refused the one before.

        Raises:
            SupplyError: it cannot be had.
        """
        from cloister.errors import CloisterError

        key = ""
        try:
            if self._key is not None and self.signer is None:
                if rejected:
                    self._key.rejected()
                key = await self._key.read()
            field = upstreams.key_field(self.upstream, key)
        except (CloisterError, OSError, ValueError) as error:
            what = error.message if isinstance(error, CloisterError) else str(error)
            raise SupplyError(
                Refusal(503, "key-unavailable", f"the key of the provider {self.upstream.name} cannot be had: {what}")
            ) from None
        before = self._lines
        self._lines = upstreams.own_lines(self.upstream, [field] if field else [])
        self._lines_until = time.monotonic() + KEY_KEPT_S
        return self._lines != before

    async def signature(self, method: str, target: str, headers: Headers, body: bytes) -> bytes:
        """Return the lines of a head that sign a request, where signing is what opens this upstream.

        Raises:
            SupplyError: it cannot be signed.
        """
        if self.signer is None:
            return b""
        url = f"{self.upstream.scheme}://{self.upstream.authority}{target}"
        kinds = [value.decode("latin-1") for name, value in headers if name.lower() == b"content-type"]
        try:
            fields = await self.signer.sign(method, url, {"content-type": kinds[0]} if kinds else {}, body)
        except ValueError as error:
            raise SupplyError(Refusal(503, "key-unavailable", f"{self.upstream.name}: {error}")) from None
        return "".join(f"{name}: {value}\r\n" for name, value in fields).encode("ascii")

    # Connections.

    def take(self) -> HttpUpstream | None:
        """Return an open connection that nobody uses."""
        while self._idle:
            since, connection = self._idle.pop()
            if connection.idle and time.monotonic() - since < KEPT_S:
                return connection
            connection.close()
        return None

    def give(self, connection: HttpUpstream) -> None:
        """Take a connection back after an answer."""
        if len(self._idle) < KEPT_CONNECTIONS and connection.reusable:
            self._idle.append((time.monotonic(), connection))
        else:
            connection.close()

    async def dial(self) -> HttpUpstream:
        """Open a connection.

        Raises:
            SupplyError: the upstream cannot be reached.
        """
        upstream = self.upstream
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(upstream.connect_timeout_s):
                if upstream.scheme == "https":
                    _, connection = await loop.create_connection(
                        HttpUpstream, upstream.host, upstream.port, ssl=self._trust(), server_hostname=upstream.host
                    )
                else:
                    _, connection = await loop.create_connection(HttpUpstream, upstream.host, upstream.port)
        except TimeoutError:
            self.judge(failed=True)
            what = f"{upstream.place} did not answer in {upstream.connect_timeout_s:g} s"
            raise SupplyError(Refusal(504, "connect-timeout", what)) from None
        except OSError as error:
            self.judge(failed=True)
            why = error.strerror or str(error) or type(error).__name__
            what = f"{upstream.place} cannot be connected to: {why}"
            raise SupplyError(Refusal(502, "connect-failed", what)) from None
        return connection

    def expire(self, now: float) -> None:
        """Close connections that were idle for long."""
        while self._idle and now - self._idle[0][0] > KEPT_S:
            self._idle.pop(0)[1].close()

    @property
    def busy(self) -> bool:
        """Whether connections are kept."""
        return bool(self._idle)

    def close(self) -> None:
        """Close what nobody uses."""
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    # Whether it is worth trying.

    @property
    def resting(self) -> bool:
        """Whether it failed so often in a row that another one is tried first."""
        return time.monotonic() < self.down_until

    def judge(self, *, failed: bool) -> None:
        """Count a failure, or forget those before: an answer came."""
        if not failed:
            self.failures, self.down_until = 0, 0.0
            return
        self.failures += 1
        if self.failures >= TRIP_AFTER:
            self.down_until = time.monotonic() + REST_S
