"""OTLP over HTTP: requests to a collector, and what its answers mean (opentelemetry.io/docs/specs/otlp, "OTLP/HTTP").

One connection that is kept; an answer is the acknowledgement, so nothing is lost and nothing has to settle.
"""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

import msgspec

from cloister.host.audit_syslog import Trust, tls_context

_TIMEOUT_S = 30.0
_ANSWER_BYTES = 64 * 1024
_REFUSED = (400, 413, 422)
_PATH = "/v1/logs"
_LONGEST_WAIT_S = 300.0


class RefusedError(Exception):
    """The collector understood the request and will never take it."""


class WaitError(OSError):
    """Not now: the collector is busy, not allowed, or not there. The same request may work later."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        """Keep how long it asked us to wait; 0 where it did not."""
        super().__init__(why)
        self.wait_s = wait_s


class _Partial(msgspec.Struct, rename="camel"):
    rejected_log_records: str | int = 0
    error_message: str = ""


class _Answer(msgspec.Struct, rename="camel"):
    partial_success: _Partial = msgspec.field(default_factory=_Partial)


class Collector:
    """One receiver of OTLP."""

    def __init__(self, url: str, trust: Trust) -> None:
        """Connect with the first request; without a path in the URL it is `/v1/logs`."""
        parts = urlsplit(url)
        self._host, self._port, self._secure = parts.hostname or "", parts.port, parts.scheme == "https"
        self._path = parts.path if parts.path not in ("", "/") else _PATH
        self._trust = trust
        self._connection: http.client.HTTPConnection | None = None

    def send(self, body: bytes) -> str:
        """Send one request and return what the collector had to say of records that it left out; mostly nothing.

        Raises:
            RefusedError: it will not take this request, ever.
            WaitError: not now.
            OSError: it cannot be reached, or is not who it must be.
        """
        connection = self._connection or self._connect()
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read(_ANSWER_BYTES)
            if not answer.isclosed():
                self.close()  # more than we read: this connection cannot go on
        except http.client.HTTPException as error:
            self.close()
            raise WaitError(f"no answer that is HTTP: {error!r}") from error
        except OSError:
            self.close()
            raise
        return _judge(answer.status, text, answer.headers.get("Retry-After", "0"))

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = tls_context(self._trust)
            self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_S, context=context)
        else:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        return self._connection


def _judge(status: int, text: bytes, retry_after: str) -> str:
    if 200 <= status < 300:  # noqa: PLR2004  RFC 9110, section 15.3
        try:
            partial = msgspec.json.decode(text or b"{}", type=_Answer).partial_success
            rejected = int(partial.rejected_log_records)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            return ""
        return f"{rejected} records were rejected: {partial.error_message[:200]}" if rejected else ""
    if status in _REFUSED:
        raise RefusedError(f"HTTP {status}: {text[:200]!r}")
    try:
        wait_s = min(_LONGEST_WAIT_S, max(0.0, float(retry_after)))
    except ValueError:
        wait_s = 0.0
    raise WaitError(f"HTTP {status}", wait_s)
