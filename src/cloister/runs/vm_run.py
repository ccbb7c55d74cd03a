"""The virtual machine of one run, in the broker: image and disks before it starts, its beginning, what it leaves.

    verified image ─▶ disks ─▶ (the jail starts) ─▶ limits ─▶ `B` with the tar ─▶ … ─▶ changes handed back

Everything that may take its time happens beside the event loop. What the keeper says in between is for `active`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cloister.errors import CloisterError, RetryError, StepError, UsageError
from cloister.host import limits, vm_console, vm_snapshot, vm_state
from cloister.host.frames import Frame, decode_list, encode_list
from cloister.host.monitor_number import hand_over
from cloister.host.sandbox_pid import find_sandbox_pid
from cloister.host.vm_written import Written
from cloister.plan.steps import LimitCgroup, LimitScope
from cloister.plan.vm import CONSOLE, DIRECTORY, VmLaunch
from cloister.runs.attended import attended
from cloister.runs.vm_disks import SPARES, GuestDisks
from cloister.runs.vm_firecracker import keep_firecracker
from cloister.runs.vm_image import open_verified
from cloister.runs.vm_keeping import Keeping, memoryless
from cloister.runs.vm_living import LivingOf
from cloister.runs.vm_snapshots import memory_of, record_of
from cloister.runs.vm_standing import paused, standing_still
from cloister.runs.vm_tar import guest_files
from cloister.runs.vm_template import TemplateOf

if TYPE_CHECKING:
    from cloister.plan.vm_snapshot import Snapshot
    from cloister.runs.active import ActiveRun
    from cloister.runs.paths import Paths
    from cloister.runs.prepare import Prepared
    from cloister.runs.vm_network import GuestNetwork

BRIDGE_PROXY = "CLOISTER_BRIDGE_PROXY"
_FLAG_PTY, _FLAG_ADOPT = 1, 2
_JAIL_S = 20.0
_POLL_S = 0.005
_HELLO = ("kernel", "agent", "verity")
_LONGEST = 128
_FIGURES_S = 5.0
_MOST_WORDS, _MOST_LOGGED = 32, 10_000
"""Of one frame, and events of one guest: the keeper bounds them as well."""


class Guest:
    """One run's virtual machine. Whoever made it calls `drop`, or `ended` and `finish`, in the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, paths: Paths, prepared: Prepared) -> None:
        """Know what is to be done; open nothing."""
        plan = prepared.plan
        assert plan.launch.vm is not None  # noqa: S101  # only such runs come here
        self.vm: VmLaunch = plan.launch.vm
        self._loop, self._paths, self._plan = loop, paths, plan
        self._quiet = False
        self._images = prepared.policy.images
        self._disks = GuestDisks(paths, plan, prepared.layout, prepared.agent.workspace.mode)
        self._prepared = prepared
        self._template = LivingOf(paths, self.vm) if prepared.kept else TemplateOf(paths, prepared)
        self._keeping = Keeping(loop)
        self._written = Written()
        self._descriptors: list[int] = []
        self._listeners: list[socket.socket] = []
        self._network: GuestNetwork | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged = 0
        self._asked: asyncio.Future[dict[str, int]] | None = None

    # --- before it starts ------------------------------------------------------------------

    async def verify(self) -> None:
        """Open the image, see that it is what the plan says, take the ports and a place on the bridge.

        Nothing is changed before that.

        Raises:
            CloisterError: the image is not what was signed, a port is taken, or there is no place.
        """
        SPARES.want()
        try:
            self._descriptors += await self._loop.run_in_executor(
                None, open_verified, self._paths, self._images, self.vm, os.getuid()
            )
            await self._loop.run_in_executor(None, self._template.hold)
            for port in self.vm.ports:
                self._listeners.append(_listen(port))
            if self.vm.network == "bridge":
                self._network = await self._join()
        except BaseException:
            self.close()
            raise

    async def make_disks(self, link: Any, *, quiet: bool) -> None:
        """Make the guest's disks; the run's directories are there. Whoever asked is told how far that is.

        Raises:
            UsageError: `not-started`: whoever asked went away, and nothing was made.
            CloisterError: the disks cannot be made, or do not fit.
        """
        self._quiet = quiet
        async with attended(
            self._loop, link, "filling the virtual machine's disk", quiet=quiet, needed=True, spares=SPARES
        ) as watch:
            self._descriptors += await self._loop.run_in_executor(None, self._disks.make, watch)
        self._descriptors += self._template.descriptors()
        if self.vm.monitor != "firecracker":
            return
        self._descriptors += self._written.make(
            f"{self._paths.run_state(self._plan.run)}/{DIRECTORY}", self.vm.memory_mib
        )
        if self.vm.monitor_uid:  # it opens again what it gets
            for file, descriptor in zip(self.vm.files, self._descriptors, strict=True):
                hand_over(descriptor, self.vm.monitor_uid, write=file.write)

    async def _join(self) -> GuestNetwork:
        from cloister.runs.vm_network import join

        return await join(self._loop, self._plan.run)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the monitor and the keeper get, in the order of the plan."""
        tap = (self._network.device,) if self._network else ()
        return (*self._descriptors, *tap, *(one.fileno() for one in self._listeners))

    @property
    def environment(self) -> dict[str, str]:
        """What else its commands find in their environment: the run's proxy on the bridge."""
        return {BRIDGE_PROXY: self._network.proxy()} if self._network else {}

    # --- its beginning ---------------------------------------------------------------------

    def order(self, run: ActiveRun) -> bytes:
        """Return what lets the agent of a kept memory go on, and tell the run what that was; nothing for another."""
        memory = self._prepared.kept.memory if self._prepared.kept else None
        if memory is None:
            return b""
        run.findings, run.next_session = memory.findings, memory.commands + 1
        return (_FLAG_ADOPT | (_FLAG_PTY if memory.pty else 0)).to_bytes(4, "little")

    def begin(self, run: ActiveRun) -> None:
        """Put the jail under the limits of the run, then tell the keeper to start the monitor. Returns at once."""
        task = self._loop.create_task(self._begin(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, run: ActiveRun) -> None:
        box = f"{self._paths.run_runtime(self._plan.run)}/box"
        try:
            files = await self._loop.run_in_executor(None, guest_files, self.vm, box, self._paths.home)
        except (CloisterError, OSError) as error:
            run.live.refuse("guest-files", "what the guest shall hold could not be packed", [str(error)])
            return
        try:
            await self._confine(run)
            fields = (*self.vm.fields, *self._disks.fields)
            if self._network and run.egress:
                fields += self._network.fields()
                await self._network.serve(run.egress)
            payload = encode_list([os.fsencode(word) for word in fields])
            payload += encode_list([os.fsencode(word) for word in self.vm.inner])
            run.inner.send("B", payload, (files.memory,))
            self.close_descriptors()
        except StepError as error:
            words = [part for part in (error.message, error.where) if part]
            run.live.refuse(error.reference, "the limits could not be put in force", words)
            return
        finally:
            os.close(files.memory)
        if self.vm.monitor == "firecracker":
            await self._start_firecracker(run)

    async def _start_firecracker(self, run: ActiveRun) -> None:
        """Tell Firecracker its machine: the keeper has started it, and waits for the guest."""
        from cloister.runs.vm_firecracker import driver_of

        try:
            await driver_of(self.vm).configure()
        except CloisterError as error:
            run.live.refuse(error.reference, "the virtual machine could not be started", [error.message])

    async def _confine(self, run: ActiveRun) -> None:
        """Move the jail's first process into the run's cgroup while the monitor is not there yet.

        Raises:
            StepError: it is not limited.
        """
        step = next((step for step in self._plan.steps if isinstance(step, (LimitCgroup, LimitScope))), None)
        if step is None:
            return
        await self._loop.run_in_executor(None, _await_jail, run)
        run.cgroup = await self._loop.run_in_executor(None, limits.enter, step, run.outer_pid)
        if run.live.status != "starting":  # it ended meanwhile, and its undoing may have come before the scope
            with contextlib.suppress(OSError):
                limits.leave(step)

    def told(self, run: ActiveRun, frame: Frame) -> None:
        """Take what the keeper says beside the frames of every run."""
        if frame.kind == "Q":
            self._keeping.told()
            return
        words = dict(
            item.decode("utf-8", "replace").partition("=")[::2] for item in decode_list(frame.payload)[0][:_MOST_WORDS]
        )
        match frame.kind:
            case "D":
                run.count_limits()  # the keeper waits for that: with it goes the cgroup
                run.inner.send("D")
                reference, text = vm_console.verdict(words, vm_console.last_words(self.vm.directory))
                run.write_event("guest-died", {**words, "reason": reference})
                run.live.machine_died(reference, text)
            case "H":
                self._template.came_up()
                run.host |= {f"guest_{name}": value[:_LONGEST] for name, value in words.items() if name in _HELLO}
            case "T" if self._asked and not self._asked.done():
                self._asked.set_result({name: int(value) for name, value in words.items() if _is_figure(name, value)})
            case "L" if self._logged < _MOST_LOGGED:
                self._logged += 1
                # Its keys are the guest's too: none of them may stand for one of ours.
                run.write_event("guest", {f"guest_{name[:_LONGEST]}": value for name, value in words.items()})

    async def figures(self, run: ActiveRun) -> dict[str, int]:
        """Return what the guest says of itself: bytes, seconds, counts by name. It may say anything.

        Raises:
            RetryError: it did not answer in time.
        """
        if self._asked is None or self._asked.done():
            self._asked = self._loop.create_future()
            run.inner.send("T")
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked), _FIGURES_S)
        except TimeoutError:
            message = f"the guest gave no figures within {_FIGURES_S:g} s"
            raise RetryError("guest-silent", message, where=run.plan.run, remedy="the same again") from None

    async def snapshot(self, run: ActiveRun, name: str, placeholders: dict[str, str], *, memory: bool) -> Snapshot:
        """Hold the machine still and keep it: its disks, and its memory where that is wanted.

        Raises:
            CloisterError: the machine goes on as before; there is no snapshot.
        """
        agent, names = self._prepared.agent, self._prepared.extra_names
        before = self._prepared.kept.memory if self._prepared.kept else None
        told = memory_of(run, agent, placeholders, names, before) if memory else None
        record = partial(record_of, self._plan, self.vm, name, self._disks.fields, told)

        def take(go_on: Callable[[], None]) -> Snapshot:
            sources = self._disks.sources()
            try:
                if self.vm.monitor == "firecracker":
                    held = partial(paused, self.vm, go_on)
                    with contextlib.closing(self._written.lend()) as sheets:
                        kept = partial(keep_firecracker, sheets) if memory else None
                        return vm_snapshot.take(self._paths.snapshots, name, sources, record, held, kept)
                still = partial(standing_still, self.vm, go_on, stopped=not memory)
                state = partial(vm_state.keep_in, memory_mib=self.vm.memory_mib) if memory else None
                return vm_snapshot.take(self._paths.snapshots, name, sources, record, still, state)
            finally:
                for source in sources.values():
                    if isinstance(source, int):
                        os.close(source)

        return await self._keeping.keep(run, take, memory=memory)

    def memoryless(self, run: ActiveRun) -> str:
        """Return why the memory cannot be kept; nothing where it can."""
        return memoryless(self.vm, run.host.get("guest_agent"))

    # --- its end ----------------------------------------------------------------------------

    def ended(self) -> None:
        """The machine is gone: keep what it printed before the run's directory goes."""
        self.close()
        kept = f"{self._paths.run_state(self._plan.run)}/{DIRECTORY}/{CONSOLE}"
        vm_console.keep(self.vm.directory, kept)

    async def finish(self, started: float, link: Any) -> tuple[str, ...]:
        """Hand back what the guest has changed; return words for the receipt. Whoever waits is told how far that is."""
        self._template.make_later()
        async with attended(
            self._loop, link, "reading the virtual machine's disk", quiet=self._quiet, spares=SPARES
        ) as watch:
            return await self._loop.run_in_executor(None, self._disks.hand_back, started, watch)

    def close_descriptors(self) -> None:
        """Close our copies of what the jail has."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        for one in self._listeners:
            one.close()
        self._listeners.clear()
        if self._network:
            self._network.lent()

    def close(self) -> None:
        """Close everything; nothing of the machine runs."""
        self.close_descriptors()
        if self._network:
            self._network.close()
        self._template.release()
        self._written.close()
        self._disks.release()

    def drop(self) -> None:
        """The run did not come to be: nothing was changed on its disks."""
        self.close()
        self._disks.drop()


def _await_jail(run: ActiveRun) -> None:
    """Wait until the jail's first process is there, or will not come."""
    until = time.monotonic() + _JAIL_S
    while not find_sandbox_pid(run.outer_pid) and time.monotonic() < until and run.live.status == "starting":
        time.sleep(_POLL_S)


def _listen(port: int) -> socket.socket:
    """Listen on our 127.0.0.1.

    Raises:
        UsageError: `port-taken`.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        remedy = "end what listens there, or take it out of microvm.ports"
        if error.errno == errno.EACCES:
            remedy = "a user's ports begin at 1024: name one of those in microvm.ports"
        raise UsageError(
            "port-taken", f"the guest's port cannot be reachable here: {error.strerror}", where=f"127.0.0.1:{port}",
            remedy=remedy,
        ) from error  # fmt: skip
    return listener


def _is_figure(name: str, value: str) -> bool:
    return len(name) <= _LONGEST and value.isascii() and value.isdigit() and len(value) <= 18  # noqa: PLR2004  # 64 bits
