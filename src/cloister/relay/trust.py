"""Whom the relay trusts as a server: the system's certificate store, always with the host's name checked.

`SSL_CERT_FILE` and `SSL_CERT_DIR` of the broker's environment replace the store, as for every
program that uses OpenSSL. There is no way to switch verification off, and `SSLKEYLOGFILE`, by which Python
would write the keys of these connections into a file, has no effect here.
"""

from __future__ import annotations

import ssl
import time
from functools import lru_cache

_RELOAD_S = 3600
"""A change of the store is seen after this long; reading it takes tens of milliseconds."""


def system_trust(http2: bool) -> ssl.SSLContext:
    """Return a client's context: TLS 1.2 or later, verification required, ALPN with or without `h2`."""
    return _context(http2, int(time.monotonic() // _RELOAD_S))


def client_context(http2: bool, cafile: str | None = None) -> ssl.SSLContext:
    """Make such a context; `cafile` stands in for the system's store."""
    context = ssl.create_default_context(cafile=cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.keylog_filename = None  # type: ignore[assignment] # typeshed does not know that this stops it
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    return context


@lru_cache(maxsize=2)
def _context(http2: bool, _age: int) -> ssl.SSLContext:
    """Read the store at most once in a while."""
    return client_context(http2)
