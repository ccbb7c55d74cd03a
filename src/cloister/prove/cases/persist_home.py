"""Add start-up files, keys, autostart entries and user units to the home."""

import contextlib
import os

from cloister.prove.inside.support import Box, append

ID = "persist-home"
TITLE = "Add start-up files, keys, autostart entries and user units to the home"
PROMISE = "P-017"
CLASSES = (19,)
EXPECT = "the home is private; nothing of it reaches the host"
SHAPE = "any"
CHECKS = ("home-untouched",)


NAMES = (
    ".bashrc",
    ".bash_profile",
    ".profile",
    ".zshrc",
    ".zshenv",
    ".gitconfig",
    ".config/git/config",
    ".npmrc",
    ".netrc",
    ".ssh/authorized_keys",
    ".ssh/config",
    ".ssh/rc",
    ".config/autostart/evil.desktop",
    ".config/systemd/user/evil.service",
    ".config/environment.d/evil.conf",
    ".pam_environment",
    ".local/bin/ls",
    "bin/ls",
    ".config/fish/config.fish",
    ".vimrc",
    ".claude/settings.json",
    ".codex/config.toml",
    ".pi/agent/settings.json",
    ".local/share/applications/evil.desktop",
    ".xprofile",
    ".inputrc",
)


def attack(box: Box) -> None:
    """Append to each; the private home may take it."""
    for name in NAMES:
        path = f"{box.home}/{name}"
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            append(path, "# cloister-prove-was-here\n")
    box.stopped(f"{len(NAMES)} files: the host's home must be as before")
