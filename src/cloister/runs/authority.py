"""The user's certificate authority: made with the first run that ends TLS, kept in the state directory, renewed early.

Key and certificate are one file, so no crash can leave one without the other. What is damaged,
too old, or was readable by others is not used again: a new one costs nothing, since only
sandboxes trust it. Each run keeps the authority that its bundle names, whatever comes later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from cloister.credentials.certificates import Pair, make_authority, usable_authority
from cloister.host import private_files
from cloister.relay.authority import Authority

_FILE = "authority.pem"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


class Trusted(NamedTuple):
    """An authority and the certificate by which sandboxes know it."""

    authority: Authority
    certificate: bytes


class Authorities:
    """The authority of one user, as long as one broker lives."""

    def __init__(self, directory: str, clock: Callable[[], float] = time.time) -> None:
        """Look at nothing yet; `directory` is the user's state directory."""
        self._directory = f"{directory}/authority"
        self._clock = clock
        self._kept: Trusted | None = None

    def current(self) -> Trusted:
        """Return the authority for a run that begins now. Reads and writes files, so not on an event loop.

        Raises:
            OSError: it cannot be kept.
        """
        with private_files.locked(self._directory):
            pair = self._stored()
            if pair is None:
                pair = make_authority(self._clock())
                private_files.replace(f"{self._directory}/{_FILE}", pair.key_pem + pair.cert_pem)
                self._kept = None
        if self._kept is None or self._kept.certificate != pair.cert_pem:
            self._kept = Trusted(Authority(pair, self._clock), pair.cert_pem)
        return self._kept

    def _stored(self) -> Pair | None:
        """Return what is stored and can be used."""
        data = private_files.read(f"{self._directory}/{_FILE}") or b""
        key, mark, certificate = data.partition(_CERTIFICATE)
        pair = Pair(key, mark + certificate)
        if not mark or not usable_authority(pair.cert_pem, self._clock()):
            return None
        try:
            Authority(pair, self._clock)
        except ValueError:
            return None
        return pair
