"""Read the caller's environment, or that of the host's processes."""

import contextlib
import os

from cloister.prove.inside.support import Box

ID = "proc-environment"
TITLE = "Read the caller's environment, or that of the host's processes"
PROMISE = "P-065"
CLASSES = (34, 66)
EXPECT = "it is made from nothing, and only processes of the run are in /proc"
SHAPE = "any"


NAMES = (
    "SSH_AUTH_SOCK",
    "SSH_AGENT_PID",
    "GPG_AGENT_INFO",
    "DBUS_SESSION_BUS_ADDRESS",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
    "DOCKER_HOST",
    "KUBECONFIG",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "GH_TOKEN",
    "NPM_TOKEN",
    "SUDO_USER",
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "NODE_OPTIONS",
    "BASH_ENV",
    "ENV",
    "GIT_SSH_COMMAND",
    "TMUX",
    "STY",
    "INVOCATION_ID",
    "NOTIFY_SOCKET",
    "CLOISTER_PROVE_CANARY",
    "CREDENTIALS_DIRECTORY",
    "MAIL",
    "OLDPWD",
)


def attack(box: Box) -> None:
    """The own environment by name, and every other one as bytes."""
    for name in sorted(set(NAMES) - {*box.fact("pass_environment"), *box.fact("given_variables")}):
        box.must(name not in os.environ, f"{name}: not set")
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            text = file.read()
            box.must(
                b"CLOISTER_PROVE_CANARY" not in text,
                f"/proc/{pid}/environ: {text[:200].decode('latin-1') if b'PROVE_CANARY' in text else 'clean'}",
            )


def twin(box: Box) -> None:
    """What is needed is there."""
    for name in ("HOME", "PATH", "USER", "TMPDIR", "CLOISTER_RUN"):
        box.works(name, bool(os.environ.get(name)))
