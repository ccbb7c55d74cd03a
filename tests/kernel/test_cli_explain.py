"""`cloister explain` against the sandbox itself: what it says is what happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

POLICY = f"""{BASE}
[agents.shell.filesystem]
read = ["~/docs"]
write = ["~/out"]
hide = ["~/docs/private", "masked"]

[agents.shell.egress]
allow = ["allowed.example.org", {{ host = "plain.example.org", port = 80, methods = ["GET"] }}]
"""

TRY = r"""
import os, sys
for path in sys.argv[1:]:
    exists = os.path.exists(path)
    readable = writable = False
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
        readable = True
    except OSError:
        pass
    try:
        if os.path.isdir(path):
            name = os.path.join(path, "cloister-try")
            open(name, "x").close()
            os.unlink(name)
        elif exists:
            os.close(os.open(path, os.O_WRONLY))
        else:
            made = not os.path.exists(os.path.dirname(os.path.realpath(path)))
            os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
            os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(os.path.realpath(path))
            made and os.rmdir(os.path.dirname(os.path.realpath(path)))
        writable = True
    except OSError:
        pass
    print(f"{path}\t{exists}\t{readable}\t{writable}")
"""


ASK = """
import sys
from cloister.cli import explain
for path in sys.argv[1:]:
    explain.main(["shell", path, "--json"])
"""


def _make(user: User, workspace: Path) -> list[str]:
    """Make files of every kind; return the paths to ask about."""
    for name in ("docs/private", "out"):
        (user.home / name).mkdir(parents=True)
    for name in ("docs/read.txt", "docs/private/key", "out/own.txt"):
        (user.home / name).write_text("x")
    for name in ("masked", "sub", ".vscode"):
        (workspace / name).mkdir()
    (workspace / "masked/inside").write_text("x")
    (workspace / "frozen").write_text("x")
    (workspace / "frozen").chmod(0o400)
    (workspace / "to-key").symlink_to(user.home / ".ssh/id_ed25519")
    (workspace / "to-docs").symlink_to("../../docs")
    (workspace / "round").symlink_to("round")
    (workspace / ".vscode/tasks.json").write_text("{}")
    home = [".ssh", ".ssh/id_ed25519", ".netrc", "docs", "docs/read.txt", "docs/private", "docs/private/key", "out"]
    home += ["out/own.txt", "new", "out/new", "docs/new", ".config", ".", "src"]
    inside = ["", "README", "new", "sub", "sub/new", "masked", "masked/inside", "frozen", "to-key", "to-docs/read.txt"]
    inside += ["round", ".git", ".git/hooks", ".git/hooks/pre-commit", ".git/config", ".git/objects", ".git/index"]
    inside += [".git/HEAD", ".vscode", ".vscode/tasks.json", ".vscode/new", ".idea", ".idea/new", ".env", ".mcp.json"]
    inside += ["sub/../README", "./README", "to-docs/../out/own.txt"]
    system = ["/", "/usr", "/usr/bin/env", "/bin/sh", "/etc/passwd", "/etc/shadow", "/etc/hostname", "/root", "/home"]
    system += [
        "/tmp",
        "/tmp/new",
        "/var/tmp/new",
        "/dev/null",
        "/dev/sda",
        "/run",
        "/run/cloister/box",
        "/var/run",
        "/opt",
    ]
    system += ["/usr/local/new", "/run/cloister/shim", "/nowhere/at/all", "/sys/kernel", str(user.runtime)]
    return [
        *(str(user.home / name) for name in home),
        *(f"{workspace}/{name}".rstrip("/") for name in inside),
        *system,
    ]


def test_what_explain_says_of_paths_is_what_happens(user: User, workspace: Path) -> None:
    """Existing, readable, writable: for every path, the answer is what a program in the sandbox finds."""
    user.write_policy(POLICY)
    paths = _make(user, workspace)
    done = user.run("run", "shell", "--", "python3", "-c", TRY, *paths, cwd=workspace)
    assert done.returncode == 0, done.stderr
    found = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    asked = subprocess.run(
        [sys.executable, "-c", ASK, *paths], cwd=workspace, env=user.environment, capture_output=True, check=True
    )
    wrong = []
    for path, answer in zip(paths, json.loads(f"[{asked.stdout.decode().replace('}', '},')[:-2]}]"), strict=True):
        told = [str(answer[key]) for key in ("exists", "allowed", "writable")]
        if told != found[path]:
            wrong.append(f"{path}: said {told}, found {found[path]}")
    user.close()

    assert not wrong, "\n".join(wrong)
    assert any(row == ["True", "True", "True"] for row in found.values())
    assert any(row == ["False", "False", "False"] for row in found.values())


def test_a_path_is_explained_with_the_line_that_shows_it(user: User, workspace: Path) -> None:
    """The answer names the file and line of the policy; a path nobody shows gets the line that would."""
    user.write_policy(POLICY)
    _make(user, workspace)
    (user.home / "other").mkdir()
    shown = json.loads(user.run("explain", "shell", "--json", str(user.home / "docs"), cwd=workspace).stdout)
    hook = json.loads(user.run("explain", "shell", "--json", ".git/hooks", cwd=workspace).stdout)
    absent = json.loads(user.run("explain", "shell", "--json", "/srv", cwd=workspace).stdout)

    assert "cloister.toml:8 .agents.shell.filesystem.read[0]" in shown["where"]
    assert "protected" in hook["where"]
    assert "not mounted" in absent["where"]


HOSTS = (
    ("allowed.example.org", "CONNECT allowed.example.org:443", 0),
    ("allowed.example.org:80", "GET http://allowed.example.org/", 1),
    ("other.example.org", "CONNECT other.example.org:443", 1),
    ("http://plain.example.org/x", "GET http://plain.example.org/x", 0),
    ("plain.example.org:80 --method POST", "POST http://plain.example.org/", 1),
    ("https://plain.example.org/x", "CONNECT plain.example.org:443", 1),
    ("10.1.2.3", "CONNECT 10.1.2.3:443", 1),
    ("2130706433:443", "CONNECT 2130706433:443", 1),
)

REQUEST = r"""
import socket, sys
for line in sys.argv[1:]:
    host = line.split("//")[-1].split("/")[0].split()[-1]
    with socket.create_connection(("127.0.0.1", 3128)) as s:
        s.sendall(f"{line} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while part := s.recv(65536):
            data += part
    head, _, body = data.decode().partition("\r\n\r\n")
    print(head.split()[1], body)
"""


def test_what_explain_says_of_hosts_is_what_the_proxy_says(user: User, workspace: Path) -> None:
    """A host that is called unreachable is refused with the same reason; a reachable one is not refused by policy."""
    user.write_policy(POLICY)
    _make(user, workspace)
    lines = [line for _, line, _ in HOSTS]
    done = user.run("run", "shell", "--", "python3", "-c", REQUEST, *lines, cwd=workspace)
    user.close()

    assert len(done.stdout.splitlines()) == len(HOSTS), done.stderr
    for (what, _, code), answered in zip(HOSTS, done.stdout.splitlines(), strict=True):
        said = user.run("explain", "shell", "--json", *what.split(), cwd=workspace)
        status, _, body = answered.partition(" ")
        assert said.returncode == code, what
        assert (status == "403") == (code == 1), what
        assert code == 0 or json.loads(body)["reason"] == json.loads(said.stdout)["reason"]


def test_explaining_leaves_nothing_and_starts_nothing(user: User, workspace: Path) -> None:
    """Neither explain nor plan starts a broker or makes a file, not even on the first day."""
    before = sorted(str(path) for path in user.home.rglob("*"))
    for words in (
        ("explain", "shell", "/usr"),
        ("plan", "shell"),
        ("run", "--dry-run", "shell"),
        ("plan", "-v", "shell"),
    ):
        assert user.run(*words, cwd=workspace).returncode == 0

    assert sorted(str(path) for path in user.home.rglob("*")) == before
    assert os.listdir(user.runtime) == []
    assert user.broker_pid == 0


def test_the_port_of_models_is_explained_where_there_are_models(user: User, workspace: Path) -> None:
    """What is served in the sandbox needs no rule, so none is proposed; without `llm` nothing is there."""
    table = '[providers.up]\nkey = "file:~/.config/cloister/up.key"\n[agents.shell.llm]\nproviders = ["up"]\n'
    question = ("explain", "shell", "--json", "127.0.0.1:11435")
    without = json.loads(user.run(*question, cwd=workspace).stdout)
    policy = user.home / ".config/cloister/cloister.toml"
    user.write_policy(policy.read_text() + table)
    served = json.loads(user.run(*question, cwd=workspace).stdout)

    assert (without["allowed"], without["protocol"]) == (False, "tunnel")
    assert (served["allowed"], served["protocol"], served["remedy"]) == (True, "model calls", "")
    assert served["where"] == "[agents.shell.llm]"
    assert "up: anthropic at" in served["explanation"]
