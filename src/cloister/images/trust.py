"""Who may sign which image, and what counts as going back. Pure: files come in as text, clocks not at all.

A signature is Ed25519 (RFC 8032) over the canonical manifest. `manifest.sig` has one line per signer:

    cloister-image-signature-v1 PUBLIC_KEY SIGNATURE        both in hexadecimal

A file of the trust store (`*.pub`) has one line per key; `names=` limits the key to images whose names match:

    cloister-image-key-v1 PUBLIC_KEY [names=PATTERN,PATTERN...] [COMMENT]

Everything that is not understood is refused: a line that a newer version would read otherwise must not be guessed at.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

from cloister.errors import DeniedError

SIGNATURE_LINE = "cloister-image-signature-v1"
KEY_LINE = "cloister-image-key-v1"
MAX_SIGNATURES = 16
MAX_BYTES = 64 * 1024
"""Of a file of signatures or keys."""

_KEY = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(rf"{SIGNATURE_LINE} ([0-9a-f]{{64}}) ([0-9a-f]{{128}})")


class TrustedKey(NamedTuple):
    """A key whose signature counts."""

    public: str
    """32 bytes in hexadecimal."""
    source: str
    """The file or policy key it was read from."""
    names: tuple[str, ...] = ("*",)
    """Patterns of images' names that it may sign."""
    comment: str = ""

    def may_sign(self, name: str) -> bool:
        """Say whether its signature counts for an image of this name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)


class Signature(NamedTuple):
    """What one signer left."""

    public: str
    value: bytes


def key_line(public: str, *, names: Sequence[str] = (), comment: str = "") -> str:
    """Return the line of a trust store for a key."""
    words = [KEY_LINE, public, *([f"names={','.join(names)}"] if names else []), *([comment] if comment else [])]
    return " ".join(words) + "\n"


def parse_keys(text: str, source: str) -> list[TrustedKey]:
    """Return the keys of one file of a trust store; empty lines and `#` lines are passed over.

    Raises:
        DeniedError: `image-trust-file`: a line is not understood, so that nobody knows what it was to allow.
    """
    found: list[TrustedKey] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or words[0] != KEY_LINE or not _KEY.fullmatch(words[1]):  # noqa: PLR2004
            raise DeniedError(
                "image-trust-file", "a line of the trust store is not understood", where=f"{source}:{number}",
                remedy=f"{KEY_LINE} PUBLIC_KEY [names=PATTERN,...] [COMMENT]",
            )  # fmt: skip
        names: tuple[str, ...] = ("*",)
        rest = words[2:]
        if rest and rest[0].startswith("names="):
            names = tuple(word for word in rest.pop(0).removeprefix("names=").split(",") if word)
        found.append(TrustedKey(words[1], source, names, " ".join(rest)))
    return found


def signature_line(public: str, value: bytes) -> str:
    """Return the line of `manifest.sig` for a signature."""
    return f"{SIGNATURE_LINE} {public} {value.hex()}\n"


def parse_signatures(data: bytes) -> list[Signature]:
    """Return the signatures of a file; none when it is empty.

    Raises:
        DeniedError: `image-signature-bad`: it is not such a file.
    """
    lines = data.decode("ascii", "replace").splitlines()
    if len(lines) > MAX_SIGNATURES:
        raise bad_signature("there are too many signatures")
    found: list[Signature] = []
    for line in lines:
        shape = _LINE.fullmatch(line)
        if not shape:
            raise bad_signature("a line of its signatures is not understood")
        found.append(Signature(shape[1], bytes.fromhex(shape[2])))
    return found


def judge(message: bytes, signatures: Sequence[Signature], keys: Sequence[TrustedKey], name: str) -> TrustedKey:
    """Return the trusted key that has signed an image.

    One good signature of a trusted key for this name is enough. A wrong one that claims to be of a trusted key is
    refused even beside a good one: nobody makes such by mistake.

    Raises:
        DeniedError: `image-unsigned`, `image-key-unknown`, `image-key-name`, `image-signature-bad`.
    """
    if not signatures:
        raise DeniedError("image-unsigned", f"the image {name} is not signed", remedy=f"cloister image sign {name}")
    known = [(key, each) for each in signatures for key in keys if key.public == each.public]
    if not known:
        raise DeniedError("image-key-unknown", f"the image {name} is signed by a key that is not trusted",
                          where=", ".join(each.public[:16] for each in signatures),
                          remedy="put its key into ~/.config/cloister/trust.d or /etc/cloister/trust.d")  # fmt: skip
    for key, each in known:
        if not verifies(key.public, each.value, message):
            raise bad_signature("its manifest is not what was signed", where=key.public[:16])
    for key, _ in known:
        if key.may_sign(name):
            return key
    raise DeniedError("image-key-name", f"the key of the image {name} may sign {', '.join(known[0][0].names)} only",
                      where=known[0][0].source)  # fmt: skip


def bad_signature(why: str, *, where: str = "") -> DeniedError:
    """Return the refusal of a signature that is wrong."""
    return DeniedError("image-signature-bad", f"the image's signature is wrong: {why}", where=where,
                       remedy="build or fetch the image again; this one was changed")  # fmt: skip


def verifies(public: str, value: bytes, message: bytes) -> bool:
    """Say whether a signature is right."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(value, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_not_older(name: str, version: int, seen: int) -> None:
    """Refuse to go back behind the highest version that was used of an image by this signer.

    Raises:
        DeniedError: `image-older`.
    """
    if version < seen:
        message = f"version {version} of the image {name} is older than {seen}, which was used here"
        raise DeniedError("image-older", message, remedy=f"cloister image allow-older {name} {version}")
