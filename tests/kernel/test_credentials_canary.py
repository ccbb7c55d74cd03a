"""The canary: after a run that used secrets in every way, none is where an agent, a log or a record could have it.

They are looked for in all spellings. The twin finds the placeholder with the same search, so the search works.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.bound import BEARER, HOST, credential, curl, keep, policy, spellings
from support.cloister import User
from support.secure_server import Answer, SecureServer

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
SECRETS = {
    "bearer": "canary-Bearer-4f5e6d7c8b9a",
    "basic": "canary-Basic-0a1b2c3d4e5f",
    "query": "canary-Query-9988776655",
    "command": "canary-Command-1f2e3d4c",
    "masked": "canary-Masked-5a6b7c8d9e",
    "path": "4455667:canary-Path-6e5d4c3b2a",
    "signer": "canary-Signer-0123456789abcdefghij",
}
COLLECT = r"""
import os, sys
def add(data): sys.stdout.buffer.write(data + b"\n")
for one in sorted(os.listdir("/proc")):
    if not one.isdigit(): continue
    for name in ("environ", "cmdline", "maps", "status", "comm"):
        try: add(open(f"/proc/{one}/{name}", "rb").read())
        except OSError: pass
    try:
        memory = open(f"/proc/{one}/mem", "rb", 0)
        for line in open(f"/proc/{one}/maps"):
            span, modes = line.split()[:2]
            if "r" not in modes or "[vsyscall]" in line or "[vvar" in line: continue
            first, last = (int(part, 16) for part in span.split("-"))
            if last - first > 64 << 20: continue
            try:
                memory.seek(first); add(memory.read(last - first))
            except OSError: pass
    except OSError: pass
for top in ("/run", "/tmp", os.environ["HOME"], "/etc", "/dev/shm", "/var/tmp"):
    for folder, _, files in os.walk(top):
        for name in files:
            try: add(f"{folder}/{name}".encode() + open(f"{folder}/{name}", "rb").read(8 << 20))
            except OSError: pass
"""


def tables(user: User, port: int) -> list[str]:
    """Return one credential of each kind; the secret of one comes from a command."""
    script = user.home / "secret.sh"
    script.write_text(f"#!/bin/sh\necho {SECRETS['command']}\n")
    script.chmod(0o700)
    references = {name: keep(user, secret, name) for name, secret in SECRETS.items() if name != "command"}
    keep(user, f"AKIDEXAMPLE:{SECRETS['signer']}", "signer")
    return [
        credential(references["bearer"], port, name="bearer", env="TOKEN"),
        credential(references["basic"], port, name="basic", env="", scheme="header", header="X-Put-In"),
        credential(references["query"], port, name="query", env="QUERY", scheme="query", query="key"),
        credential(references["path"], port, name="path", env="BOT", scheme="path", value="bot{secret}"),
        credential("command:~/secret.sh", port, name="command", env="", scheme="header", header="X-Command"),
        credential(references["masked"], port, name="masked", env="", scheme="header", header="X-Masked", mask=True),
        credential(references["signer"], port, name="signer", env="", scheme="sigv4", paths=["/aws"]),
    ]


def traces(user: User) -> bytes:
    """Return everything on disk that the run and its broker wrote."""
    places = (*user.state.rglob("*"), *user.runtime.rglob("*"), *(user.home / "src").rglob("*"))
    files = [path for path in places if path.is_file() and "authority" not in path.parts]
    return b"\n".join(f"{path}\n".encode() + path.read_bytes() for path in files)


def test_no_secret_is_anywhere(user: User, workspace: Path, server: SecureServer) -> None:
    """Zero hits in environments, memory, files, output, records and logs; the placeholder is found where it belongs."""
    server.answer = lambda sent: Answer(body=json.dumps(sent.headers["x-masked"]).encode())
    user.write_policy(policy(server.port, *tables(user, server.port)))
    sign = '--aws-sigv4 "aws:amz:us-east-1:sts" -u "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'
    script = "; ".join(
        (
            curl(server.port, BEARER, path="/x?key='$QUERY'"),
            curl(server.port, path="/bot'$BOT'/getMe"),
            curl(server.port, sign, path="/aws"),
            curl(server.port, "-d", '"$TOKEN"'),
            curl(server.port, BEARER, path="/aws", host="denied.example.org"),
            "python3 collect.py; kill -SEGV $$",
        )
    )
    (workspace / "collect.py").write_text(COLLECT)
    done = user.inside(f"ulimit -c unlimited; {script}", cwd=workspace)
    output = done.stdout.encode("utf-8", "backslashreplace") + done.stderr.encode("utf-8", "backslashreplace")
    shown = "".join(user.run(*words, cwd=workspace).stdout for words in (
        ("receipt", "last"), ("logs", "--events", "last"), ("inspect", "last"), ("plan", "shell"), ("check",),
    ))  # fmt: skip

    got = repr(server.sent)
    for name in ("bearer", "basic", "query", "path", "command", "masked"):
        assert SECRETS[name] in got, f"the server did not get {name}"
    assert "AKIDEXAMPLE" in got
    for where, data in {"inside": output, "records": traces(user), "shown": shown.encode()}.items():
        hits = [(name, text) for name, secret in SECRETS.items() for text in spellings(secret) if text in data]
        assert not hits, where
    authority = (user.state / "authority/authority.pem").read_bytes()
    key, _, certificate = authority.partition(b"-----BEGIN CERTIFICATE-----")
    lines = {
        name: [line for line in text.split() if len(line) > 40] for name, text in (("key", key), ("", certificate))
    }
    assert not any(line in output for line in lines["key"]), "whoever has it can be any server for every run"
    assert all(line in output for line in lines[""]), "the bundle was not collected"
    assert len(output) > 1 << 20, "hardly anything was collected"
    assert b"cloister-bearer-" in output
    assert "*" * len(SECRETS["masked"]) in done.stdout
    assert b"cloister-" not in shown.encode().replace(b"cloister-shim", b"")
    assert b"cloister-bearer-" not in traces(user)
    assert not list(workspace.rglob("core*"))
    user.close()


def test_the_search_finds_every_spelling() -> None:
    """The twin of the search itself: a secret that is there is found however it is written."""
    secret = SECRETS["bearer"]
    for raw in (secret, f"me:{secret}", f"ab{secret}cd"):
        encoded = base64.b64encode(raw.encode())
        assert any(text in encoded for text in spellings(secret)), raw
    assert all(any(text in data for text in spellings(secret)) for data in (secret.encode(), secret[::-1].encode()))


def test_a_killed_broker_leaves_no_secret(user: User, workspace: Path, server: SecureServer) -> None:
    """Killed by a signal that dumps core, the broker writes none, and what it leaves holds nothing."""
    user.write_policy(policy(server.port, *tables(user, server.port)))
    user.run("run", "--detach", "shell", "--", "sleep", "60", cwd=workspace)
    run = user.records()[-1]["id"]
    user.run("exec", run, "--", "sh", "-c", curl(server.port, BEARER), cwd=workspace)
    limits = Path(f"/proc/{user.broker_pid}/limits").read_text()
    os.kill(user.broker_pid, signal.SIGABRT)
    user.run("ps", cwd=workspace)
    after = user.inside("true", cwd=workspace)

    assert SECRETS["bearer"] in repr(server.sent)
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]
    assert after.returncode == 0
    data = traces(user)
    assert not [text for secret in SECRETS.values() for text in spellings(secret) if text in data]
    user.close()


def test_the_broker_cannot_be_read(user: User, workspace: Path, server: SecureServer) -> None:
    """Other processes of the user outside cannot read the broker's memory either: it is not dumpable (prctl(2))."""
    user.write_policy(policy(server.port, *tables(user, server.port)))
    user.inside("true", cwd=workspace)
    memory = Path(f"/proc/{user.broker_pid}/mem")

    assert os.getuid() == 0 or not os.access(memory, os.R_OK)
    user.close()


API = """\
import sys
from cloister import Sandbox
with Sandbox("shell", directory=".") as box:
    print(box.run(["sh", "-c", sys.argv[1]]).stdout.decode())
    print(box.run(["sh", "-c", "echo $TOKEN"]).stdout.decode())
    print(box.close().credentials)
"""


def test_the_api_uses_placeholders(user: User, workspace: Path, server: SecureServer) -> None:
    """`Sandbox` gives every command the placeholders, and the receipt says what was used."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    done = subprocess.run(
        [sys.executable, "-c", API, curl(server.port, BEARER)], cwd=workspace, env=user.environment,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    fetched, shown, used = filter(None, done.stdout.splitlines())

    assert fetched == "hello"
    assert shown.startswith("cloister-token-")
    assert used == f"('token: 1 requests to {HOST}:{server.port}',)"
    user.close()
