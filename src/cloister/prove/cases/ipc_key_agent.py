"""Have the person's ssh-agent do something else than sign for named uses."""

import os
import socket

from cloister.prove.inside.support import Box

ID = "ipc-key-agent"
TITLE = "Have the person's ssh-agent sign anything, or change it"
PROMISE = "P-152"
CLASSES = (41, 66)
EXPECT = "no ssh-agent, or one that lists named keys and fails at everything else"
SHAPE = "any"

FAILURE = b"\x05"
LIST = b"\x0b"
CHANGES = {
    "add a key": b"\x11" + bytes(64),
    "add a smart card": b"\x14" + bytes(8),
    "add a smart card with limits": b"\x1a" + bytes(8),
    "remove a key": b"\x12" + bytes(4),
    "remove all keys": b"\x13",
    "lock": b"\x16" + bytes(4),
    "unlock": b"\x17" + bytes(4),
    "list keys of version 1": b"\x01",
    "add a key with limits": b"\x19" + bytes(64),
    "sign by version 1": b"\x03" + bytes(64),
    "add a key of version 1": b"\x07" + bytes(64),
    "ask what it can do": b"\x1b" + (5).to_bytes(4, "big") + b"query",
    "restrict itself": b"\x1b" + (36).to_bytes(4, "big") + b"restrict-destination-v00@openssh.com",
    "an extension nobody knows": b"\x1b" + (16).to_bytes(4, "big") + b"prove@cloister.x",
    "no message": b"",
    "a message of another kind": b"\xff",
}


def attack(box: Box) -> None:
    """With each key that is listed, data that is no login and no commit; then every change that the protocol knows.

    A filter may say no and pass a request on all the same, so the keys are listed again at the end.
    """
    path = os.environ.get("SSH_AUTH_SOCK", "")
    if not path or not os.path.exists(path):
        box.stopped("no ssh-agent is in this sandbox")
        return
    listed = _ask(path, LIST)
    documents = {
        "sign any bytes": b"any bytes",
        "sign a login that is bound to no host": _text(bytes(32)) + b"\x32" + _text(b"root") + _text(b"ssh-connection"),
        "sign a file": b"SSHSIG" + _text(b"file") + _text(b"") + _text(b"sha512") + _text(bytes(64)),
    }
    for key in _keys(listed):
        for what, data in documents.items():
            request = b"\x0d" + _text(key) + _text(data) + bytes(4)
            box.must(_ask(path, request)[:1] == FAILURE, what)
            for how, bound in forged_bindings().items():
                box.must(_ask(path, bound, request)[:1] == FAILURE, f"{what}, after {how}")
    for what, message in (forged_bindings() | CHANGES).items():
        box.must(_ask(path, message)[:1] == FAILURE, what)
    box.must(_ask(path, LIST) == listed, "the keys are as they were")


def forged_bindings() -> dict[str, bytes]:
    """Return bindings of a connection to a host (PROTOCOL.agent of OpenSSH) that no host has signed."""
    host_key = _text(_text(b"ssh-ed25519") + _text(bytes(32)))
    session, signature = _text(bytes(32)), _text(_text(b"ssh-ed25519") + _text(bytes(64)))
    name = b"\x1b" + _text(b"session-bind@openssh.com")
    return {
        "a binding to a host that did not sign": name + host_key + session + signature + b"\x00",
        "a binding for forwarding": name + host_key + session + signature + b"\x01",
        "a binding without a signature": name + host_key + session + _text(b"") + b"\x00",
        "half a binding": name + host_key,
    }


def _text(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _keys(answer: bytes) -> list[bytes]:
    """Take the list apart."""
    keys, at = [], 5
    for _ in range(int.from_bytes(answer[1:5], "big")):
        size = int.from_bytes(answer[at : at + 4], "big")
        keys.append(answer[at + 4 : at + 4 + size])
        at += 4 + size
        at += 4 + int.from_bytes(answer[at : at + 4], "big")
    return keys


def _ask(path: str, *messages: bytes) -> bytes:
    """Ask on a connection of its own; return the last answer. A connection that is closed instead is a refusal."""
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(5)
        agent.connect(path)
        answer = b""
        for message in messages:
            answer = _answer(agent, message)
        return answer


def _answer(agent: socket.socket, message: bytes) -> bytes:
    answer = b""
    try:
        agent.sendall(_text(message))
        while len(answer) < 4 or len(answer) < 4 + int.from_bytes(answer[:4], "big"):
            more = agent.recv(65536)
            if not more:
                return FAILURE
            answer += more
    except ConnectionError:
        return FAILURE
    return answer[4:]
