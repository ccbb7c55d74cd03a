"""`cloister-shim connect`: bytes both ways through the proxy, ends of directions, refusals in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shim_build

pytestmark = pytest.mark.kernel

# A network namespace of our own, so that the proxy's fixed port is free; a proxy that a test scripts.
_STAGE = """
import json, socket, subprocess, sys, threading
shim, answer, script, words = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
seen = {}
def proxy():
    while True:
        s = listener.accept()[0]
        head = b''
        while b'\\r\\n\\r\\n' not in head: head += s.recv(1)
        seen['request'] = head.decode()
        s.sendall(answer.encode('latin-1'))
        exec(script)
        s.close()
if answer != 'none':
    listener = socket.create_server(('127.0.0.1', 3128))
    threading.Thread(target=proxy, daemon=True).start()
done = subprocess.run([shim, 'connect', *words], input=sys.stdin.buffer.read(), capture_output=True, timeout=20)
print(json.dumps([done.returncode, done.stdout.decode('latin-1'), done.stderr.decode(), seen.get('request', '')]))
"""
OPEN = "HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim with sanitizers: a memory error is a failed test."""
    try:
        return shim_build.sanitized_shim()
    except (OSError, subprocess.CalledProcessError):
        return shim_build.shim()


def talk(shim: Path, answer: str, script: str = "", *words: str, stdin: bytes = b"") -> tuple[int, str, str, str]:
    """Run it against a scripted proxy; return exit code, output, errors, and the request."""
    box = ["bwrap", "--unshare-user", "--unshare-net", "--dev-bind", "/", "/", "--die-with-parent", "--"]
    command = [
        *box,
        "/usr/bin/python3",
        "-c",
        _STAGE,
        str(shim),
        answer,
        script,
        json.dumps(words or ("h.example", "22")),
    ]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr.decode()
    code, output, errors, request = json.loads(done.stdout)
    return code, output, errors, request


def test_bytes_go_both_ways_and_each_end_on_its_own(shim: Path) -> None:
    """The end of input reaches the host while the answer is still to come; many bytes, all values, none lost."""
    data = bytes(range(256)) * 4000
    script = "got = b''\nwhile d := s.recv(65536): got += d\ns.sendall(got[::-1])"
    code, output, errors, request = talk(shim, OPEN, script, stdin=data)

    assert (code, errors) == (0, "")
    assert output.encode("latin-1") == data[::-1]
    assert request.startswith("CONNECT h.example:22 HTTP/1.1\r\nHost: h.example:22\r\n")


def test_bytes_that_come_with_the_answer_are_the_hosts(shim: Path) -> None:
    """A server that speaks first, as ssh's does, is not swallowed with the head."""
    assert talk(shim, OPEN + "SSH-2.0-x\r\n", "s.recv(1)")[:2] == (0, "SSH-2.0-x\r\n")


def test_an_ipv6_address_stands_in_brackets(shim: Path) -> None:
    """RFC 9110, section 9.3.6."""
    assert talk(shim, OPEN, "", "fd00::1", "22")[3].startswith("CONNECT [fd00::1]:22 HTTP/1.1\r\n")


def test_a_refusal_is_shown_with_what_would_allow_it(shim: Path) -> None:
    """Explanation, reason and remedy; escapes and control characters cannot play tricks on a terminal."""
    fields = {"reason": "not-in-allowlist", "explanation": "no rule \x1b[2J", "remedy": 'add "h:22" to allow'}
    body = json.dumps(fields, separators=(",", ":")).replace("\\u001b", "\x1b")
    answer = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    code, output, errors, _ = talk(shim, answer, "s.recv(1)")

    assert (code, output) == (77, "")
    assert "no rule" in errors
    assert "[not-in-allowlist]" in errors
    assert 'try: add "h:22" to allow' in errors
    assert "\x1b" not in errors


@pytest.mark.parametrize(
    ("answer", "code"),
    [("none", 69), ("", 76), ("garbage\r\n\r\n", 76), ("HTTP/1.1 200", 76), ("X" * 20000, 76),
     ("HTTP/1.1 403 No\r\nContent-Length: 99999999999999999999\r\n\r\n{", 77), ("HTTP/1.1 403 No\r\n\r\n", 77)],
)  # fmt: skip
def test_a_strange_proxy_is_an_error_and_no_hang(shim: Path, answer: str, code: int) -> None:
    """Nobody there, nothing said, garbage, no end of head, wrong lengths."""
    assert talk(shim, answer)[0] == code


@pytest.mark.parametrize(
    "words",
    [("h", "0"), ("h", "65536"), ("h", "-1"), ("h", "x"), ("h", ""), ("", "22"), ("h\r\nX: y", "22"), ("h/", "22"),
     ("a" * 256, "22"), ("h", "22 ")],
)  # fmt: skip
def test_only_hosts_and_ports_are_asked_for(shim: Path, words: tuple[str, str]) -> None:
    """Nothing can be put into the request that is no host or port."""
    code, _, errors, request = talk(shim, OPEN, "", *words)

    assert (code, request) == (64, "")
    assert "shim-usage" in errors


def test_a_receiver_that_is_gone_ends_it(shim: Path) -> None:
    """No SIGPIPE death and no endless loop when nobody reads any more."""
    script = f"""
import socket, subprocess, threading
listener = socket.create_server(('127.0.0.1', 3128))
p = subprocess.Popen(['{shim}', 'connect', 'h', '22'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
s = listener.accept()[0]
s.recv(999); s.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\nhello'); p.stdout.read(5); p.stdout.close()
try:
    for _ in range(100): s.sendall(bytes(100000))
except OSError: pass
s.close(); p.stdin.close(); print(p.wait(10))
"""
    box = ["bwrap", "--unshare-user", "--unshare-net", "--dev-bind", "/", "/", "--die-with-parent", "--"]
    done = subprocess.run([*box, "/usr/bin/python3", "-c", script], capture_output=True, timeout=40, check=False)

    assert done.stdout == b"0\n", (done.stderr, sys.version)
