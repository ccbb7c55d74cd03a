"""Firecracker, driven: from a monitor that only listens to a guest that boots, and what it is asked for later.

It is started by the keeper, within the jail (`isolation/monitor_jail.py`); this speaks to its API from outside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from cloister.host.firecracker import FirecrackerApi
from cloister.host.vm_written import Sheets
from cloister.isolation import firecracker, monitor_jail
from cloister.isolation.firecracker_api import Request, Version, parse_version
from cloister.plan.vm import VmLaunch


def driver_of(launch: VmLaunch) -> FirecrackerDriver:
    """Return the driver of a run's machine, in its jail."""
    api = FirecrackerApi(f"{launch.directory}/{firecracker.API_SOCKET}", owner=launch.monitor_uid or None)
    machine = firecracker.Machine(cmdline=launch.cmdline, disks=firecracker.Rate(bytes_per_s=launch.disk_rate))
    return FirecrackerDriver(api, launch, machine, firecracker.Place(directory=monitor_jail.VM))


def keep_firecracker(sheets: Sheets, driver: FirecrackerDriver, directory: str) -> Callable[[], tuple[str, ...]]:
    """Have a paused machine written down; return what copies that into a directory, and names the files.

    To be called beside an event loop, not in one.

    Raises:
        StepError: the monitor refuses, or is silent.
        UnsupportedError: it could not go on from what it writes.
    """
    sheets.empty()
    try:
        asyncio.run(driver.keep())
    except BaseException:
        sheets.empty()
        raise
    return partial(sheets.take, directory)


class FirecrackerDriver:
    """A `VmDriver`."""

    def __init__(
        self, api: FirecrackerApi, launch: VmLaunch, machine: firecracker.Machine, place: firecracker.Place
    ) -> None:
        """Drive the process behind `api`; `place` is where things lie as it sees them."""
        self._api = api
        self._launch = launch
        self._machine = machine
        self._place = place

    async def configure(self) -> None:
        """Wait for it, make the machine or load the template or memory that the plan names, start it.

        Raises:
            StepError: it refuses a request, or is silent.
            UnsupportedError: it is too old, or cannot have such a machine.
        """
        version = await self._version()
        warm = self._launch.template or self._launch.resumes
        requests = firecracker.warm_requests if warm else firecracker.start_requests
        for request in requests(self._launch, self._machine, self._place, version):
            await self._ask(request)

    async def pause(self) -> None:
        """Hold the guest still."""
        await self._ask(firecracker.set_state("Paused"))

    async def resume(self) -> None:
        """Let it go on."""
        await self._ask(firecracker.set_state("Resumed"))

    async def snapshot(self, state: str, memory: str) -> None:
        """Write the paused machine into two files of the run's directory; open connections of its vsock are cut."""
        await self._ask(firecracker.create_snapshot(self._place.inside(state), self._place.inside(memory)))

    async def keep(self) -> None:
        """Write the paused machine into the two files that it has for that.

        Raises:
            StepError: it refuses, or is silent.
            UnsupportedError: it could not go on from them.
        """
        await self._ask(firecracker.keep_request(self._launch, self._place, await self._version()))

    async def restore(self, state: str, memory: str, *, resume: bool) -> None:
        """Load such files into a fresh process; the memory's file must stay as it is while the guest lives."""
        version = await self._version()
        request = firecracker.load_snapshot(
            self._place.inside(state),
            self._place.inside(memory),
            self._place,
            version,
            resume=resume,
            tap=self._machine.tap,
        )
        await self._ask(request)

    async def balloon(self, mib: int) -> None:
        """Take so many MiB from the guest."""
        await self._ask(firecracker.set_balloon(mib))

    async def ballooned(self) -> int:
        """Return how many MiB are taken from the guest, as the monitor says."""
        return await self._api.balloon()

    async def ask_to_end(self) -> None:
        """Press Ctrl-Alt-Del."""
        await self._ask(firecracker.ask_to_end())

    async def _version(self) -> Version:
        await self._api.appear()
        return parse_version(await self._api.version())

    async def _ask(self, request: Request) -> None:
        await self._api.call(request.method, request.path, request.body)
