"""Asking `cloister-hostd` for runs under systemd: the side of the user's own broker.

The user's broker reads the words, looks at the workspace, holds absent names in it and sends all that with
descriptors; root's daemon and the system's broker do the rest (ARCHITECTURE, "Runs under systemd"). The
connection it asks on stays open as the run's lease. One object per broker; one `UnitRun` per run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec

from cloister.errors import CloisterError, RetryError, UnsupportedError
from cloister.host import apply as host_apply
from cloister.host import overlay_apply
from cloister.host.frames import encode_list
from cloister.host.workspace_copy import copy_workspace
from cloister.plan.steps import Plan
from cloister.plan.unit import COPY_UPPER, HOSTD_SOCKET
from cloister.runs.detached import detach
from cloister.runs.links import Connect
from cloister.runs.prepare import Kitchen, Looked, mapping
from cloister.runs.protections import Protections
from cloister.runs.request import RunRequest
from cloister.runs.starter import Starter
from cloister.runs.store import Record, Store, new_id
from cloister.runs.unit_part import (
    COPY,
    OfHome,
    carried_environment,
    first_plan,
    keeps_aside,
    of_home_for,
    part_of,
    refuse_unfit,
    repository_of,
)
from cloister.runs.unit_run import UnitRun, gone
from cloister.runs.workspaces import real_path

_LOOK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class UnitRuns:
    """The runs of one user that are units of the system."""

    def __init__(  # noqa: PLR0913  # made in one place
        self, loop: asyncio.AbstractEventLoop, kitchen: Kitchen, connect: Connect, protections: Protections,
        on_ended: Callable[[], None], hostd: str = HOSTD_SOCKET,
    ) -> None:  # fmt: skip
        """Ask nobody yet; `on_ended` is called when a run is over."""
        self._loop, self._kitchen, self._connect = loop, kitchen, connect
        self._protections, self._on_ended, self._hostd = protections, on_ended, hostd
        self._store = Store(kitchen.paths.runs)
        self._runs: dict[str, UnitRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether any of them is alive."""
        return bool(self._runs)

    def names(self) -> tuple[str, ...]:
        """Return the ids of those that are alive."""
        return tuple(self._runs)

    def find(self, name: str) -> UnitRun | None:
        """Return a living run by its id."""
        return self._runs.get(name)

    async def start(self, request: RunRequest, looked: Looked, link: Any, stdio: tuple[int, ...]) -> None:
        """Ask for a run; what comes of it is told to `link`.

        Raises:
            CloisterError: nobody was asked, and everything is as before.
        """
        refuse_unfit(looked, self._kitchen.policies, request.profile)
        home = of_home_for(looked, self._kitchen)
        try:
            await self._ask(request, looked, (link, stdio), home)
        finally:
            os.close(home.packed.memory)

    async def _ask(
        self, request: RunRequest, looked: Looked, caller: tuple[Any, tuple[int, ...]], home: OfHome
    ) -> None:
        policies, paths = self._kitchen.policies, self._kitchen.paths
        part = part_of(looked, request, policies, self._kitchen.git(), home)
        name = request.run or new_id(time.time())
        plan = first_plan(name, request, looked, policies.digest, paths.run_state(name))
        lease = connect_hostd(self._hostd)
        try:
            record = Record(
                id=name, agent=plan.agent, workspace=plan.workspace, command=plan.asked, status="starting",
                started=time.time(), broker_pid=os.getpid(), detached=request.detach,
                mode="overlay" if keeps_aside(looked) else "direct",
            )  # fmt: skip
            self._store.create(plan, record)
            host_apply.apply(plan, paths.state)
            if part.copied:
                await self._copy(plan, caller[0])
        except BaseException:
            lease.close()
            raise
        run = UnitRun(self._loop, self._store, paths.state, plan, record, looked.layout, self._ended)
        self._runs[name] = run
        if not keeps_aside(looked) and (warning := self._protections.add(name, looked.layout)):
            run.warn(warning)
        try:
            self._hand_over(run, request, looked, caller, (lease, home.packed.memory), msgspec.json.encode(part))
        except BaseException as error:
            lease.close()
            run.withdraw()
            if not isinstance(error, OSError):
                raise
            raise RetryError("unit-not-asked", f"the request could not be made: {error.strerror}") from error

    async def _copy(self, plan: Plan, caller: Any) -> None:
        """Copy the workspace into the run's directory for changes.

        Raises:
            CloisterError: it cannot be done, or nobody waits for it any more; then nothing of it is left.
        """
        copy = f"{self._kitchen.paths.run_state(plan.run)}/{COPY}"
        try:
            await self._loop.run_in_executor(None, copy_workspace, plan.workspace, f"{copy}/{COPY_UPPER}")
            _refuse_alone(caller)
        except BaseException:
            with contextlib.suppress(OSError):
                overlay_apply.discard(copy)
            self._store.remove(plan.run)
            raise

    def _hand_over(  # noqa: PLR0913  # one place, the parts of one request
        self, run: UnitRun, request: RunRequest, looked: Looked, caller: tuple[Any, tuple[int, ...]],
        sent: tuple[socket.socket, int], part: bytes,
    ) -> None:  # fmt: skip
        """Send the request with its descriptors; from now on the lease speaks."""
        (outer, stdio), (lease, carry) = caller, sent
        with contextlib.ExitStack() as stack:

            def opened(path: str, flags: int) -> int:
                descriptor = os.open(path, flags | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                return descriptor

            if request.detach:
                output = self._store.output_path(run.plan.run)
                run.starter = Starter(outer, os.dup(stdio[1]), request.json)
                outer, _ = detach(self._loop, self._connect, output, outer.peer_pid)
                said = opened(output, os.O_WRONLY | os.O_APPEND)
                stdio = (opened(os.devnull, os.O_RDONLY), said, said)
            run.link = outer
            places = (opened(looked.layout.root, _LOOK), opened(real_path(request.directory), _LOOK))
            run.lease = self._connect(lease, run.on_frame, run.on_close)
            brings = {"carry": carry}
            if keeps_aside(looked):
                brings["copy"] = opened(f"{self._kitchen.paths.run_state(run.plan.run)}/{COPY}", _LOOK)
            if repository := repository_of(looked.layout):
                brings["repository"] = opened(repository, _LOOK)
            named = _fields(request, run.plan.run) | {"brings": ",".join(brings)}
            fields = [os.fsencode(f"{key}={value}") for key, value in named.items()]
            run.lease.send("L", encode_list(fields), (outer.lend(), *stdio[:3], *places, *brings.values()))
            run.lease.send("U", part)
            run.lease.send("V", encode_list([os.fsencode(word) for word in request.words]))
            run.lease.send("N", encode_list(mapping(carried_environment(looked, request))))

    def _ended(self, run: UnitRun) -> None:
        self._protections.remove(run.plan.run)
        self._runs.pop(run.plan.run, None)
        self._on_ended()

    def wait_and_undo(self, plan: Plan) -> None:
        """Undo what a killed broker left in a workspace, once the unit that stands on it is gone."""

        async def undo() -> None:
            if await gone(plan.run):
                host_apply.undo(plan, self._kitchen.paths.state)

        task = self._loop.create_task(undo())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop_all(self) -> None:
        """Ask every run to end."""
        for run in list(self._runs.values()):
            run.stop(1.0)

    def close(self) -> None:
        """End those that are still there: their leases go with this process anyway."""
        for run in list(self._runs.values()):
            run.drop_lease()


def _refuse_alone(caller: Any) -> None:
    if caller.closed:
        raise RetryError("caller-gone", "nobody waits for the run any more")


def connect_hostd(path: str) -> socket.socket:
    """Return a connection to root's daemon.

    Raises:
        UnsupportedError: it is not installed.
        RetryError: it does not answer, or something else does.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)  # connect(2) on a Unix socket does not wait, it fails with EAGAIN
    try:
        sock.connect(path)
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        owner = 0 if path == HOSTD_SOCKET else os.stat(path).st_uid
        if uid != owner:
            raise RetryError("hostd-foreign", "the socket of cloister-hostd is not root's", where=path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        raise UnsupportedError(
            "hostd-missing", f"runs under systemd need cloister-hostd, which is not there: {error.strerror}",
            where=path, remedy="sudo cloister setup",
        ) from None  # fmt: skip
    except OSError as error:
        sock.close()
        raise RetryError("hostd-busy", f"cloister-hostd does not answer: {error.strerror}", where=path,
                         remedy="try again") from None  # fmt: skip
    except CloisterError:
        sock.close()
        raise
    return sock


def _fields(request: RunRequest, run: str) -> dict[str, str]:
    """Return the fields of the request to hostd."""
    fields = {"verb": "run", "agent": request.agent, "profile": request.profile, "run": run}
    flags = {"pty": request.pty, "detach": request.detach, "json": request.json, "replaced": request.replaced,
             "yes": request.yes}  # fmt: skip
    return fields | {name: "1" if value else "" for name, value in flags.items()}
