"""Have the person's gpg-agent do something else than sign with named keys."""

import socket

from cloister.prove.inside.support import Box

ID = "ipc-gpg-agent"
TITLE = "Have the person's gpg-agent decrypt, export, delete, or ask with words of one's own"
PROMISE = "P-154"
CLASSES = (41, 66)
EXPECT = "no gpg-agent, or one that knows signing with named keys only"
SHAPE = "any"

GRIP = "0123456789ABCDEF0123456789ABCDEF01234567"
COMMANDS = (
    "PKDECRYPT",
    f"SETKEY {GRIP}",
    f"EXPORT_KEY {GRIP}",
    f"EXPORT_KEY --openpgp {GRIP}",
    "IMPORT_KEY",
    f"DELETE_KEY --force {GRIP}",
    "GENKEY",
    f"PASSWD {GRIP}",
    f"PRESET_PASSPHRASE {GRIP} -1 00",
    f"CLEAR_PASSPHRASE {GRIP}",
    "GET_PASSPHRASE --no-ask x X X X",
    "GET_CONFIRMATION give+me+everything",
    "KEYWRAP_KEY --export",
    f"KEYTOCARD --force {GRIP} x OPENPGP.1",
    "SCD LEARN",
    "LEARN",
    "KILLAGENT",
    "RELOADAGENT",
    "UPDATESTARTUPTTY",
    "GETVAL x",
    "PUTVAL x y",
    "GETINFO socket_name",
    "GETINFO pid",
    "PKSIGN",
)


def attack(box: Box) -> None:
    """Every command of gpg-agent(1) that is not part of a signature, each on a connection of its own."""
    path = _socket(f"{box.home}/.gnupg/S.gpg-agent")
    if not path:
        box.stopped("no gpg-agent is in this sandbox")
        return
    for command in COMMANDS:
        answer = _ask(path, command)
        box.must(answer.startswith("ERR "), f"{command.split(' ')[0]}: {answer.split(' ')[0] or 'closed'}")
    listed = _ask(path, "HAVEKEY --list")
    box.must(not listed.startswith("D "), "a list of all keys")


def _socket(redirect: str) -> str:
    """Follow the file that libassuan follows."""
    try:
        with open(redirect, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("socket=") for line in lines if line.startswith("socket=")), "")


def _ask(path: str, command: str) -> str:
    """Return the line that answers a command."""
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(5)
        agent.connect(path)
        with agent.makefile("rwb") as lines:
            lines.readline()
            lines.write(f"{command}\n".encode())
            lines.flush()
            return str(lines.readline().decode("utf-8", "replace"))
