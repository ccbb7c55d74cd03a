"""Starting and ending pasta, which carries a network namespace's traffic to the host's sockets.

One process per run, a child of the broker, in the foreground: so its end is seen and nothing is
written down but the file that lets a later broker end it. When it ends, the tap device is gone
and with it the network. When pasta is to start is for `runs/attach.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NamedTuple

RECORD = "pasta.pid"
"""Name of the record in the run's runtime directory."""
_STARTTIME = 19  # proc_pid_stat(5), field 22, counted behind the name


class Started(NamedTuple):
    """A pasta that was started. The descriptors are the caller's."""

    pid: int
    pidfd: int
    ready: int
    """Readable once: with a line when the network is up, at its end when pasta gave up."""
    words: int
    """What it says about failures."""


def start(argv: tuple[str, ...], target: int) -> Started:
    """Start pasta for the namespaces of process `target`.

    Raises:
        OSError: it cannot be started.
    """
    ready, ready_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    words, words_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    actions = [
        (os.POSIX_SPAWN_DUP2, source, target_fd) for source, target_fd in ((null, 0), (ready_end, 1), (words_end, 2))
    ]
    try:
        # PRIVILEGE: none beyond the caller's; the program is one `programs.find` trusts. pasta refuses to start where
        # SIGPIPE is ignored, as Python does.
        pid = os.posix_spawn(
            argv[0], [*argv, str(target)], {"PATH": "/usr/bin:/bin"}, file_actions=actions, setsigmask=(),
            setsigdef=(signal.SIGPIPE,), setsid=True,
        )  # fmt: skip
    except BaseException:
        os.close(ready)
        os.close(words)
        raise
    finally:
        for descriptor in (ready_end, words_end, null):
            os.close(descriptor)
    return Started(pid, os.pidfd_open(pid), ready, words)


def end(pidfd: int) -> None:
    """Kill it; one that has ended already is fine."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def record(directory: str, pid: int) -> None:
    """Write down which process serves the run, with its start time: a number alone may be somebody else's later."""
    with open(f"{directory}/{RECORD}", "w", encoding="ascii") as file:
        file.write(f"{pid} {_start_time(pid)}\n")


def end_recorded(directory: str) -> None:
    """Kill the process that `record` wrote down, if it is still that one.

    Raises:
        OSError: there is a record that cannot be read.
    """
    try:
        with open(f"{directory}/{RECORD}", encoding="ascii") as file:
            words = file.read().split()
    except FileNotFoundError:
        return
    if len(words) != 2 or not words[0].isdecimal():  # noqa: PLR2004  # process id and start time
        return
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(int(words[0]))
        try:
            if _start_time(int(words[0])) == words[1]:  # compared while the descriptor holds the process
                end(pidfd)
        finally:
            os.close(pidfd)


def _start_time(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[_STARTTIME]
    except (OSError, IndexError):
        return ""
