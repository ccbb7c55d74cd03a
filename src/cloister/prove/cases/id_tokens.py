"""Read another run's identity tokens, or change one's own."""

import base64
import contextlib
import json
import os
import re
import time

from cloister.prove.inside.support import Box, read, write

ID = "id-tokens"
TITLE = "Read another run's identity tokens, or change one's own"
PROMISE = "P-160"
CLASSES = (63, 68)
EXPECT = "only this run's tokens are there, read-only"
SHAPE = "any"
NEEDS = ("sibling",)
IF_POLICY = ("identity",)
LIMIT_S = 20.0

TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}")
SEARCH_S = 8.0
LARGE = ("/proc", "/sys", "/usr", "/dev")


def attack(box: Box) -> None:
    """While another run of the same agent lives: every token that stands in a file, then every way to change ours."""
    folder, run = os.environ.get("CLOISTER_IDENTITY_DIRECTORY", ""), os.environ.get("CLOISTER_RUN", "")
    seen = 0
    for path, token in _tokens(box.fact("tops"), box.workspace):
        claims = json.loads(base64.urlsafe_b64decode(token.split(b".")[1] + b"=="))
        seen += 1
        box.must(claims.get("run") == run, f"{path}: of {'this' if claims.get('run') == run else 'another'} run")
    box.must(seen > 0, f"{seen} tokens found")
    own = f"{folder}/cloister.jwt"
    box.refused("write one", "EROFS EACCES", write, own)
    box.refused("remove one", "EROFS EACCES", os.unlink, own)
    box.refused("put another in its place", "EROFS EACCES", os.rename, own, f"{folder}/x.jwt")
    box.refused("add one", "EROFS EACCES", write, f"{folder}/forged.jwt")
    box.refused("add a link", "EROFS EACCES", os.symlink, "/etc/passwd", f"{folder}/link.jwt")
    box.refused("change modes", "EROFS EPERM", os.chmod, folder, 0o777)
    box.refused("go up", "EROFS EACCES", os.mkdir, f"{folder}/../other")


def _tokens(tops: list[str], workspace: str) -> list[tuple[str, bytes]]:
    """Search as long as there is time, the likely places first."""
    found = []
    deadline = time.monotonic() + SEARCH_S
    for folder, folders, names in (step for top in ("/run/cloister", *tops) for step in os.walk(top)):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in (*LARGE, "/run/cloister")]
        if folder.startswith(workspace):
            continue
        if time.monotonic() > deadline:
            break
        for name in names:
            with contextlib.suppress(OSError):
                path = f"{folder}/{name}"
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                with open(descriptor, "rb") as file:
                    found += [(path, token) for token in TOKEN.findall(file.read(1 << 16))]
    return found


def twin(box: Box) -> None:
    """The run's own can be read, and say who it is."""
    token = read(os.environ["CLOISTER_IDENTITY_TOKEN_FILE"], 1 << 16)
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    box.works("the agent's name", claims["agent"] == os.environ["CLOISTER_AGENT"])
    box.works(
        "the index", "cloister" in json.loads(read(f"{os.environ['CLOISTER_IDENTITY_DIRECTORY']}/index.json", 1 << 16))
    )
