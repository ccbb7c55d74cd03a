"""The guard of pure tests, attacked: every way to the machine that Python offers must end the test."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.guard import TouchedTheMachineError


def _quietly_spawn() -> None:
    with contextlib.suppress(Exception):
        subprocess.run(["true"], check=False)


def _load_library() -> None:
    import ctypes

    ctypes.CDLL(None)


def _write_by_descriptor() -> None:
    os.close(os.open("/var/tmp/cloister-guard", os.O_WRONLY | os.O_CREAT))


async def _spawn() -> None:
    await asyncio.create_subprocess_exec("true")


ATTACKS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run(["true"], check=False),
    "hidden behind except Exception": _quietly_spawn,
    "os.system": lambda: os.system("true"),  # noqa: S605
    "os.fork": os.fork,
    "os.posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "os.exec": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
    "asyncio subprocess": lambda: asyncio.run(_spawn()),
    "ctypes": _load_library,
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "name lookup": lambda: socket.getaddrinfo("example.org", 80),
    "kill": lambda: os.kill(os.getpid(), 0),
    "write": lambda: Path("/var/tmp/cloister-guard").write_text("x"),
    "write by descriptor": _write_by_descriptor,
    "remove": lambda: Path("/var/tmp/cloister-guard").unlink(missing_ok=True),
    "write through a link out of the temporary folder": lambda: Path("/proc/self/cwd/x").write_text("x"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_touching_the_machine_ends_the_test(attack: Callable[[], object]) -> None:
    """A pure test that spawns, connects, loads libraries or writes outside its folder is stopped."""
    with pytest.raises(TouchedTheMachineError):
        attack()


def test_reading_and_temporary_files_are_allowed(tmp_path: Path) -> None:
    """A pure test may read any file, and write below its temporary folder."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to("/etc/passwd")

    assert Path(__file__).read_text(encoding="utf-8").startswith('"""')
    assert (tmp_path / "b").read_text() == "x"


def test_asyncio_without_network_is_allowed() -> None:
    """A pure test may run an event loop."""
    assert asyncio.run(asyncio.sleep(0, "done")) == "done"
