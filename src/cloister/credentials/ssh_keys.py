"""Public keys of SSH: what they are called, how they are written, and whether a signature is theirs.

Formats: RFC 4253 section 6.6, RFC 5656 (ECDSA), RFC 8332 (RSA with SHA-2), RFC 8709 (Ed25519).
SHA-1 and DSA are not known here. No private key is ever handled. `cryptography` is imported with
the first signature that is checked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from cloister.credentials.ssh_wire import Reader, WireError

_ED25519 = "ssh-ed25519"
_RSA = "ssh-rsa"
_RSA_HASHES = {"rsa-sha2-256": "SHA256", "rsa-sha2-512": "SHA512"}
_CURVES = {"nistp256": "SHA256", "nistp384": "SHA384", "nistp521": "SHA512"}
_RSA_BITS = range(2048, 16385)
_MAX_EXPONENT_BITS = 64
_SIGNATURE_BYTES = 64  # Ed25519


def fingerprint(blob: bytes) -> str:
    """Return a key's name as `ssh-keygen -l` writes it: `SHA256:` and the digest of the blob in base64."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def key_type(blob: bytes) -> str:
    """Return the type of a key, such as `ssh-ed25519`.

    Raises:
        WireError: these bytes are no key.
    """
    return Reader(blob).text()


def parse_public(text: str) -> bytes:
    """Return the blob in one line of a `.pub` file: type, base64, comment (sshd(8)).

    Raises:
        WireError: the line is no public key.
    """
    words = text.split()
    if len(words) < 2:  # noqa: PLR2004  # type and key
        raise WireError("a public key is a line with a type and base64")
    try:
        blob = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError):
        raise WireError("the base64 of a public key cannot be read") from None
    if key_type(blob) != words[0]:
        raise WireError("the type in front of a public key is not the type within")
    return blob


def write_public(blob: bytes) -> str:
    """Return a key as `.pub` files and known_hosts have it: type and base64."""
    return f"{key_type(blob)} {base64.b64encode(blob).decode()}"


def verifies(blob: bytes, signature: bytes, data: bytes) -> bool:
    """Say whether a signature over `data` was made with the private part of a key.

    Args:
        blob: the public key.
        signature: algorithm and signature, as SSH sends them.
        data: what was signed.

    Raises:
        WireError: the key or the signature is malformed, or of a kind that is not known here.
    """
    reader, made = Reader(blob), Reader(signature)
    kind, algorithm, value = reader.text(), made.text(), made.string()
    made.end()
    if kind == _ED25519 and algorithm == kind:
        return _ed25519(reader, value, data)
    if kind == _RSA and algorithm in _RSA_HASHES:
        return _rsa(reader, value, data, _RSA_HASHES[algorithm])
    if kind.startswith("ecdsa-sha2-") and algorithm == kind:
        return _ecdsa(reader, kind.removeprefix("ecdsa-sha2-"), value, data)
    raise WireError(f"signatures of the kind {algorithm[:64]} with a key of the kind {kind[:64]} cannot be checked")


def _ed25519(reader: Reader, value: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = reader.string()
    reader.end()
    if len(value) != _SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(value, data)
    except InvalidSignature:
        return False
    except ValueError:
        raise WireError("the Ed25519 key is none") from None
    return True


def _rsa(reader: Reader, value: bytes, data: bytes, digest: str) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    exponent, modulus = reader.number(), reader.number()
    reader.end()
    if modulus.bit_length() not in _RSA_BITS or exponent.bit_length() > _MAX_EXPONENT_BITS:
        raise WireError("an RSA key has 2048 to 16384 bits and a small exponent")
    size = (modulus.bit_length() + 7) // 8
    if len(value) > size:
        return False
    try:
        key = RSAPublicNumbers(exponent, modulus).public_key()
        key.verify(value.rjust(size, b"\0"), data, PKCS1v15(), getattr(hashes, digest)())  # some leave out zeros
    except InvalidSignature:
        return False
    except ValueError:
        raise WireError("the RSA key is none") from None
    return True


def _ecdsa(reader: Reader, curve: str, value: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    if reader.text() != curve or curve not in _CURVES:
        raise WireError("the curve of an ECDSA key is not known, or not that of its type")
    point, made = reader.string(), Reader(value)
    reader.end()
    first, second = made.number(), made.number()
    made.end()
    kinds: dict[str, ec.EllipticCurve] = {
        "nistp256": ec.SECP256R1(),
        "nistp384": ec.SECP384R1(),
        "nistp521": ec.SECP521R1(),
    }
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(kinds[curve], point)
        key.verify(encode_dss_signature(first, second), data, ec.ECDSA(getattr(hashes, _CURVES[curve])()))
    except InvalidSignature:
        return False
    except ValueError:
        raise WireError("the ECDSA key is none") from None
    return True
