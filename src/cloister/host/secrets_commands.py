"""Commands that print a secret: no shell, no program from where an agent may write, bounded in time and output.

What the command writes to standard error is thrown away: it may quote the secret, and the
place where it would be shown may be the agent's terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from cloister.host.secrets_files import UnavailableError

MAX_BYTES = 64 * 1024
TIMEOUT_S = 60.0
"""Long enough for a person to unlock a keyring or touch a key."""
_LINGER_S = 2.0

_STEERING = ("LD_*", "PYTHON*", "NODE_*", "PERL5*", "RUBY*", "BASH_ENV", "ENV", "BASH_FUNC_*", "GCONV_PATH", "GIT_*")
"""Variables that make programs load other code: a tool set them for one project, not for this."""


def split(text: str) -> list[str]:
    """Return the argv of a command written as for a shell: quotes count, nothing is expanded.

    Raises:
        UnavailableError: a quote is not closed, or nothing is there.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UnavailableError(f"it is not a command: {error}") from None
    if not words:
        raise UnavailableError("it is not a command: nothing is there")
    return words


async def output_of(
    words: list[str], environment: Mapping[str, str], *, forbidden: Iterable[str] = (), timeout_s: float = TIMEOUT_S
) -> bytes:
    """Return what a command prints.

    Args:
        words: program and arguments; `~/` and PATH are understood for the program.
        environment: of the person whose secret it is.
        forbidden: directories that an agent can write: no program is taken from there.
        timeout_s: seconds after which it is killed, with all it started.

    Raises:
        UnavailableError: it is not there, failed, hung, or printed too much.
    """
    surroundings, program = prepare(words[0], environment, tuple(forbidden))
    try:
        process = await asyncio.create_subprocess_exec(
            program, *words[1:], stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, env=surroundings, cwd="/", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UnavailableError(f"{words[0]} cannot be started: {error.strerror}") from None
    try:
        async with asyncio.timeout(timeout_s):
            data = await _read(process)
            code = await process.wait()
    except TimeoutError:
        raise UnavailableError(
            f"{words[0]} did not end within {timeout_s:g} s", f"try it: {shlex.join(words)}"
        ) from None
    finally:
        await _end(process)
    if code:
        raise UnavailableError(f"{words[0]} ended with {code}", f"try it: {shlex.join(words)}")
    return data


def prepare(name: str, environment: Mapping[str, str], forbidden: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """Return the environment for a command and the program's path, both without what an agent could have written.

    Raises:
        UnavailableError: there is no such program, or it lies where an agent may write.
    """
    kept = {key: value for key, value in environment.items() if not any(fnmatchcase(key, one) for one in _STEERING)}
    search = kept.get("PATH") or os.defpath
    kept["PATH"] = os.pathsep.join(
        place for place in search.split(os.pathsep) if place.startswith("/") and not _within(place, forbidden)
    )
    home = kept.get("HOME", "")
    wanted = f"{home}/{name[2:]}" if name.startswith("~/") and home else name
    if "/" in wanted and not wanted.startswith("/"):
        raise UnavailableError(f"{name} is a relative path", "write the program's whole path")
    program = shutil.which(wanted, path=kept["PATH"])
    if program is None:
        raise UnavailableError(f"there is no program {name} on your PATH", f"command -v {name}")
    if _within(program, forbidden):
        raise UnavailableError(f"{program} lies where the agent may write", "use a program outside the workspace")
    return kept, program


def _within(path: str, places: tuple[str, ...]) -> bool:
    spellings = {os.path.normpath(path), os.path.realpath(path)}
    return any(one == place or one.startswith(f"{place}/") for one in spellings for place in places)


async def _read(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None  # noqa: S101  # a pipe was asked for
    data = b""
    while chunk := await process.stdout.read(MAX_BYTES):
        data += chunk
        if len(data) > MAX_BYTES:
            raise UnavailableError(f"it printed more than {MAX_BYTES // 1024} KiB")
    return data


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of its session (most commands have ended by now), and let go of its output."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while process.stdout is not None and await process.stdout.read(MAX_BYTES):
                continue
            await process.wait()
