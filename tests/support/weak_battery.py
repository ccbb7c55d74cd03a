"""The battery's own judge over a guest that a test booted itself: cases go in by the link, answers come out.

What stands for a run's session asks the driver's `judge` in the guest, one process per case. The rest (canaries, twins,
what an answer is worth) is `prove/runner.py` as it is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cloister.prove import inside
from cloister.prove.canaries import Canaries
from cloister.prove.case import load
from cloister.prove.runner import Battery, Result
from cloister.prove.session import MODULES, PYTHON, Session
from support.guest_link import HOME, GuestLink, encode_u32

PROGRAM = f"{HOME}/prove.py"


def carried() -> dict[str, bytes]:
    """Return the files that the guest's run brings along: the driver, with a request as its argument."""
    folder = Path(inside.__file__).parent
    texts = {name: (folder / f"{name}.py").read_text() for name in MODULES}
    program = (
        f"import json, sys\nexec(compile({(folder / 'driver.py').read_text()!r}, 'driver', 'exec'), globals())\n"
        f"install_all({texts!r})\nprint('ANSWER' + json.dumps(judge(json.loads(sys.argv[1]))))\n"
    )
    return {PROGRAM[1:]: program.encode()}


class ProxyLink(GuestLink):
    """A link whose proxy refuses every CONNECT in words, as the relay would."""

    def take(self, frame: Any) -> None:
        """Answer a request of a program; anything else as before."""
        if frame.kind == "D" and frame.payload[4:].startswith(b"CONNECT "):
            number = int.from_bytes(frame.payload[:4], "little")
            self.send("D", encode_u32(number) + b"HTTP/1.1 403 Forbidden\r\n\r\n")
        else:
            super().take(frame)


class _Asking(Session):
    """What the battery asks; there is no process of ours to begin or end."""

    def __init__(self, link: GuestLink) -> None:
        self._link = link

    def ask(self, request: Any) -> dict[str, Any]:
        """Ask for one function of a case."""
        done = self._link.run(PYTHON, "-I", PROGRAM, json.dumps(request))
        _, _, answer = done.out.rpartition("ANSWER")
        assert answer, f"{done.status}: {done.out}{done.err}"
        found: dict[str, Any] = json.loads(answer)
        return found


class _Nowhere:
    """A ground on which nothing is started."""

    def __init__(self, base: Path) -> None:
        self.base, self.runtime, self.home = str(base), str(base), str(base)

    environment: dict[str, str] = {}  # noqa: RUF012  # never changed

    def command(self, directory: str, words: tuple[str, ...], *, pty: bool = False) -> list[str]:
        """There is nothing to start.

        Raises:
            AssertionError: always.
        """
        raise AssertionError(directory, words, pty)

    def stop_broker(self, number: int = 0) -> None:
        """There is none."""


class GuestBattery(Battery):
    """All cases against one guest; the workspace is the one that its disk has."""

    def __init__(self, link: GuestLink, workspace: str, base: Path, canaries: Canaries) -> None:
        super().__init__(_Nowhere(base), canaries, frozenset(), {})
        self._link, self._workspace = link, workspace

    def workspace(self, shape: str) -> str:
        """Return the guest's."""
        del shape
        return self._workspace

    @contextlib.contextmanager
    def session(self, workspace: str) -> Iterator[Session]:
        """Yield what asks in the guest."""
        del workspace
        yield _Asking(self._link)


def attack(link: GuestLink, workspace: str, base: Path, names: Sequence[str]) -> dict[str, Result]:
    """Try cases in a guest in which a run has begun with `carried()`; return results by id."""
    cases = load()
    with Canaries(str(base), str(base)) as canaries:
        results = GuestBattery(link, workspace, base, canaries).run([cases[name] for name in names])
    return {result.case.id: result for result in results}
