"""Get a certificate for a name of one's own choice, or change whom the sandbox trusts."""

import os

from cloister.prove.inside.clients import must_be_refused, secure, send
from cloister.prove.inside.support import Box, read, write

ID = "cred-certificates"
TITLE = "Get a certificate for another name, or change what is trusted"
PROMISE = "P-148"
CLASSES = (51, 65)
EXPECT = "certificates are for bound hosts only, and the list of trusted ones is read-only"
SHAPE = "any"
IF_POLICY = ("credentials",)
LIMIT_S = 30.0

NAMES = ("cloister-prove.example", "api.cloister-prove.example", "localhost", "cloister.internal", "com")


def attack(box: Box) -> None:
    """Other names in the handshake and in the Host field of bound hosts; tunnels to others; then the file itself."""
    places = {tuple(place) for one in box.fact("credentials") for place in one["places"]}
    for host, port in sorted(places)[:2]:
        for name in NAMES:
            _handshake(box, f"{name} at {host}:{port}", host, port, name)
        connection, answer = secure(host, port)
        if connection is not None:
            answer = send(connection, "GET", "/", "cloister-prove.example", {})
        must_be_refused(box, f"Host: another at {host}:{port}", answer)
    for name in NAMES:
        _handshake(box, f"a tunnel to {name}", name, 443, name, dialled=True)
    bundle = os.environ.get("SSL_CERT_FILE", "")
    folder = os.path.dirname(bundle)
    same = box.path("cloister-prove-bundle")
    write(same, read(bundle, 4 << 20))
    box.refused("write the bundle", "EROFS EACCES", os.open, bundle, os.O_WRONLY | os.O_APPEND)
    box.refused("change its mode", "EROFS EPERM", os.chmod, bundle, 0o666)
    box.refused("add a file beside it", "EROFS EACCES", write, f"{folder}/cloister-prove")
    box.refused("remove the bundle", "EROFS EACCES EBUSY EPERM", os.unlink, bundle)
    box.refused("replace the bundle", "EROFS EXDEV EACCES EBUSY", os.rename, same, bundle)


def _handshake(box: Box, what: str, host: str, port: int, name: str, *, dialled: bool = False) -> None:  # noqa: PLR0913  # a place, and how it is judged
    try:
        connection, answer = secure(host, port, name)
    except OSError as error:
        box.stopped(f"{what}: {type(error).__name__}")
        return
    if connection is None and dialled and answer.undialled:
        box.stopped(f"{what}: passed on, not ended here")  # names are free in this mode
        return
    if connection is None:
        must_be_refused(box, what, answer)
        return
    connection.close()
    box.breach(f"{what}: a trusted certificate")
