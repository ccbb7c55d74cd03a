"""The system's trusted certificates as one file, and that file with one more in it.

Distributions keep a bundle in one of a few places (the list is that of Go's crypto/x509,
root_linux.go). Nothing is verified here: programs in the sandbox do that.
"""

from __future__ import annotations

import os

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_MAX_BYTES = 4 << 20


def system_bundle() -> str:
    """Return the path of the system's bundle, or nothing."""
    return next((path for path in BUNDLES if os.path.isfile(path)), "")


def bundle(roots: str, authority: bytes) -> str:
    """Return the text of a bundle with an authority's certificate behind those in a file.

    Raises:
        OSError: the file cannot be read, or there is no authority.
    """
    if b"BEGIN CERTIFICATE" not in authority:
        raise OSError(0, "there is no certificate of our own to trust")
    text = ""
    if roots:
        with open(roots, encoding="latin-1") as file:
            text = file.read(_MAX_BYTES)
    return text.rstrip("\n") + "\n" + authority.decode("ascii")
