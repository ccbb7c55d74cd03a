"""Find the private key that signs certificates, or any other private key of ours."""

import contextlib
import os

from cloister.prove.inside.support import Box, opens, read

ID = "cred-authority-key"
TITLE = "Find the key of the authority that the sandbox trusts"
PROMISE = "P-148"
CLASSES = (66,)
EXPECT = "no private key is in the box, and the store of keys is not there"
SHAPE = "any"
IF_POLICY = ("credentials", "identity")

MARKS = (b"PRIVATE KEY-----", b"openssh-key-v1")


def attack(box: Box) -> None:
    """Every file that Cloister put inside, and the places where the keys are outside."""
    looked = 0
    for folder, _, names in os.walk("/run/cloister"):
        for name in names:
            path = f"{folder}/{name}"
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                with open(descriptor, "rb") as file:
                    data = file.read(4 << 20)
                if not data.startswith(b"\x7fELF"):  # our own program, which talks of keys
                    looked += 1
                    found = [mark.decode() for mark in MARKS if mark in data]
                    box.must(not found, f"{path}: {', '.join(found) or 'no key'}")
    box.must(looked > 0, f"{looked} files of the box were looked at")
    for path in box.fact("secret_stores"):
        box.refused(str(path), "ENOENT EACCES", opens, str(path))


def twin(box: Box) -> None:
    """What is to be trusted can be read."""
    path = os.environ.get("SSL_CERT_FILE", "")
    box.works("certificates", not path or "BEGIN CERTIFICATE" in read(path, 4 << 20))
