"""Without a sensor: seccomp's user notification tells launched programs and connections, where the policy asks."""

import hashlib
import os
from pathlib import Path

import pytest

from support.cloister import BASE, User

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
WATCHED = 'schema = 1\n\n[audit]\nfallback = "seccomp"\n'
HASHED = "schema = 1\n\n[audit]\nhashes = true\n"
CONNECT = (
    "import socket\n"
    "for address in (('192.0.2.7', 443), ('2001:db8::7', 25)):\n"
    "    family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET\n"
    "    try: socket.socket(family).connect(address)\n"
    "    except OSError: pass\n"
    "for name in ('/run/nowhere.sock', '\\0hidden'):\n"
    "    try: socket.socket(socket.AF_UNIX).connect(name)\n"
    "    except OSError: pass\n"
)


def policy(user: User, head: str) -> None:
    """Write the usual policy with another head."""
    user.write_policy(BASE.replace("schema = 1\n", head, 1))


def told(user: User, kind: str) -> list[dict]:
    """Return the events of a kind that came by seccomp."""
    return [event for event in user.audited(kind) if event.get("tier") == "seccomp"]


def test_programs_and_connections_are_on_record(user: User, workspace: Path) -> None:
    """Each launched program with its arguments, and each connect of any family, also that of grandchildren."""
    policy(user, WATCHED)
    (workspace / "connect.py").write_text(CONNECT)
    done = user.inside("(env env /bin/echo 'one two' three); python3 connect.py", cwd=workspace)
    user.close()

    assert done.stdout == "one two three\n", done.stderr
    executed = told(user, "process.executed")
    (echo,) = [event for event in executed if event["process"]["path"] == "/bin/echo"]
    assert echo["process"]["cmd_line"] == ["/bin/echo", "one two", "three"]
    assert echo["process"]["cwd"] == str(workspace)
    assert echo["run"] == user.receipts()[0]["id"]
    assert any("python3" in event["process"]["cmd_line"][0] for event in executed)
    endpoints = [event["endpoint"] for event in told(user, "network.connected")]
    assert {"ip": "192.0.2.7", "port": 443} in endpoints
    assert {"ip": "2001:db8::7", "port": 25} in endpoints
    assert {"path": "/run/nowhere.sock", "protocol": "unix"} in endpoints
    assert {"path": "@hidden", "protocol": "unix"} in endpoints


def test_the_digest_of_what_is_executed_is_on_record(user: User, workspace: Path) -> None:
    """With `hashes` each launched program has its SHA-256: the command itself, the system's, and the agent's own."""
    policy(user, HASHED)
    mine = workspace / "mine"
    mine.write_text("#!/bin/sh\necho mine\n")
    mine.chmod(0o755)
    done = user.inside("./mine; cat /dev/null", cwd=workspace)
    user.close()

    assert done.stdout == "mine\n", done.stderr
    by_path = {event["process"]["path"]: event["process"].get("hash", "") for event in told(user, "process.executed")}
    cat, shell = (hashlib.sha256(Path(name).resolve().read_bytes()).hexdigest() for name in ("/usr/bin/cat", "/bin/sh"))
    assert by_path["./mine"] == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert by_path["/usr/bin/cat"] == cat
    assert by_path[str(Path("/bin/sh").resolve())] == shell


def test_nothing_is_told_that_nobody_asked_for(user: User, workspace: Path) -> None:
    """Without the key no call takes the detour, and a listener of the agent's own is refused as ever."""
    done = user.inside("true", cwd=workspace)
    user.close()

    assert done.returncode == 0
    assert "process.executed" not in {event["kind"] for event in user.audited("run.ended")}
    assert not [event for event in user.audited("run.started") if event.get("tier") == "seccomp"]


LISTENER = (
    "import ctypes, struct\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
    "allow = struct.pack('HBBI', 6, 0, 0, 0x7fff0000)\n"
    "program = ctypes.create_string_buffer(allow)\n"
    "class Fprog(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('p', ctypes.c_void_p)]\n"
    "fprog = Fprog(1, ctypes.addressof(program))\n"
    "nr = {nr}\n"
    "for flags in (0, 8):\n"
    "    got = libc.syscall(nr, 1, flags, ctypes.byref(fprog))\n"
    "    print(flags, 'made' if got >= 0 else 'refused', flush=True)\n"
)


@pytest.mark.parametrize("head", [WATCHED, "schema = 1\n"], ids=["watched", "plain"])
def test_an_agent_makes_no_listener_of_its_own(user: User, workspace: Path, head: str) -> None:
    """Whether calls are told or not: plain filters may be added, one with a listener is refused."""
    policy(user, head)
    number = 317 if os.uname().machine == "x86_64" else 277
    (workspace / "listen.py").write_text(LISTENER.format(nr=number))
    done = user.inside("python3 listen.py", cwd=workspace)

    assert done.stdout.splitlines() == ["0 made", "8 refused"], done.stderr


def test_signals_exit_codes_and_children_are_as_ever(user: User, workspace: Path) -> None:
    """What waits for us behaves as before: failures to execute, signals, pipes, many at once, a fork that outlives."""
    policy(user, WATCHED)
    script = (
        "nothere 2>/dev/null; echo $?; /etc/passwd 2>/dev/null; echo $?; sh -c 'kill -TERM $$'; echo $?; "
        "for i in $(seq 60); do (true | cat) & done; wait; echo done; exit 7"
    )
    done = user.inside(script, cwd=workspace)
    assert done.stdout.split() == ["127", "126", "143", "done"], done.stderr
    assert done.returncode == 7
    assert user.run("run", "shell", "--", "/no/such/program", cwd=workspace).returncode == 127


def test_a_flood_is_counted_not_kept(user: User, workspace: Path) -> None:
    """An agent that connects without end neither stops its run nor fills the log: what is left out is counted."""
    policy(user, WATCHED)
    flood = (
        "import socket\n"
        "for _ in range(9000):\n"
        "    with socket.socket(socket.AF_UNIX) as one:\n"
        "        try: one.connect('/run/x')\n"
        "        except OSError: pass\n"
        "print('through')\n"
    )
    (workspace / "flood.py").write_text(flood)
    done = user.inside("python3 flood.py", cwd=workspace)
    user.close()

    assert done.stdout == "through\n", done.stderr
    kept = len([event for event in told(user, "network.connected") if event["endpoint"].get("path") == "/run/x"])
    lost = sum(event["count"] for event in told(user, "log.lost"))
    assert kept < 9000
    assert kept + lost >= 9000
