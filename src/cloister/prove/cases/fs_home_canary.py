"""Read a secret in the owner's home."""

import os

from cloister.prove.inside.support import Box, read

ID = "fs-home-canary"
TITLE = "Read a secret in the owner's home"
PROMISE = "P-017"
CLASSES = (7,)
EXPECT = "the home is a fresh directory with what was carried in"
SHAPE = "any"


FILES = (
    ".ssh/id_rsa",
    ".ssh/id_ed25519",
    ".ssh/authorized_keys",
    ".aws/credentials",
    ".netrc",
    ".config/gh/hosts.yml",
    ".gnupg/private-keys-v1.d",
    ".kube/config",
    ".docker/config.json",
    ".bash_history",
    ".config/gcloud",
    ".git-credentials",
    ".password-store",
    ".mozilla",
    ".claude/.credentials.json",
    ".codex/auth.json",
    ".pi/agent/auth.json",
    ".config/cloister",
    ".local/state/cloister",
)


def attack(box: Box) -> None:
    """The canary by its path, what secrets are usually called, and every name at the top."""
    canary = str(box.fact("home_canary"))
    box.refused(canary, "ENOENT EACCES", read, canary)
    for name in FILES:
        path = f"{box.home}/{name}"
        box.must(not os.path.lexists(path), f"{name}: not there")
    names = os.listdir(box.home)
    box.must(os.path.basename(canary) not in names, f"{len(names)} names at the top of the home")
