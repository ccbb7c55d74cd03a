"""Who may talk to a broker: its own user and nobody else, not even root, whom no file mode stops."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.root]

OTHER = 4252
OWNER = os.stat(sys.prefix).st_uid or 4251
"""Who the installation under test belongs to: others may not reach it."""
ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as asker:
    asker.settimeout(1)
    try:
        asker.connect(sys.argv[1])
        print("closed" if asker.recv(1) == b"" else "answered")
    except OSError as error:
        print(type(error).__name__)
"""


def _as_user(uid: int) -> dict[str, Any]:
    return {"user": uid, "group": uid, "extra_groups": []}


@pytest.fixture
def broker() -> Iterator[Path]:
    """Serve one user; return the socket."""
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        os.chown(folder, OWNER, OWNER)
        environment = {"HOME": folder, "XDG_RUNTIME_DIR": folder, "PATH": "/usr/bin:/bin"}
        ready, told = os.pipe()
        words = [sys.executable, "-I", "-m", "cloister.services.broker", "--ready-fd", str(told)]
        with subprocess.Popen(words, env=environment, cwd="/", pass_fds=(told,), **_as_user(OWNER)) as process:
            os.close(told)
            assert os.read(ready, 1)
            os.close(ready)
            yield next(Path(folder).rglob("broker.sock"))
            process.terminate()


def _ask(path: Path, uid: int) -> str:
    words = [os.path.realpath(sys.executable), "-I", "-c", ASK, str(path)]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd="/", **_as_user(uid)).stdout.strip()


def test_only_its_user_is_listened_to(broker: Path) -> None:
    """Its user's connection stays open; other users find no way in, and when modes let them, are hung up on."""
    assert _ask(broker, OWNER) == "TimeoutError"
    assert _ask(broker, OTHER) == "PermissionError"
    assert _ask(broker, 0) == "closed"

    for folder in [broker, *broker.parents][: len(broker.parts) - 2]:
        folder.chmod(0o777)
    assert _ask(broker, OTHER) == "closed"
    assert _ask(broker, OWNER) == "TimeoutError"

    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(broker))
        assert asker.recv(1) == b""
