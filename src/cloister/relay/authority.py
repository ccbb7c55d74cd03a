"""Server contexts for the hosts whose TLS ends here, made when they are first asked for.

Holds the key of the authority in memory and the certificates of a bounded number of hosts. OpenSSL
takes a key by way of a file only: it gets a sealed-off memory file (memfd_create(2)) with the key
encrypted under a password that is never written, closed before this returns. Where the
authority is kept between runs is not known here.
"""

from __future__ import annotations

import os
import secrets
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable

from cloister.credentials.certificates import Pair, issue, load_issuer

MAX_HOSTS = 256
RENEW_AFTER_S = 86_400.0
"""A certificate is made anew after a day, of the seven it is valid for, and when the clock went back as far."""
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # TLS 1.2; those of 1.3 are all like this
ALPN = ("h2", "http/1.1")


class Authority:
    """Makes contexts for one user's runs."""

    def __init__(self, pair: Pair, clock: Callable[[], float] = time.time) -> None:
        """Take the authority's key and certificate, and a clock (seconds since the epoch).

        Raises:
            ValueError: when they cannot be read.
        """
        self._issuer = load_issuer(pair)
        self._clock = clock
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()

    def context(self, host: str) -> ssl.SSLContext:
        """Return the context for a canonical host: at least TLS 1.2, offering `h2` and `http/1.1`."""
        now = self._clock()
        kept = self._contexts.get(host)
        if kept is not None and abs(now - kept[0]) < RENEW_AFTER_S:
            self._contexts.move_to_end(host)
            return kept[1]
        context = self._make(host, now)
        self._contexts[host] = (now, context)
        self._contexts.move_to_end(host)
        if len(self._contexts) > MAX_HOSTS:
            self._contexts.popitem(last=False)
        return context

    def _make(self, host: str, now: float) -> ssl.SSLContext:
        """Issue a certificate and load it."""
        password = secrets.token_hex(16)
        pair = issue(self._issuer, host, now, password.encode())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_ciphers(_CIPHERS)
        context.set_alpn_protocols(list(ALPN))
        handle = os.memfd_create("certificate", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(pair.key_pem + pair.cert_pem)
            context.load_cert_chain(f"/proc/self/fd/{handle}", password=password)
        finally:
            os.close(handle)
        return context
