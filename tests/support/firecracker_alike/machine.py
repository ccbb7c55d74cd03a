"""The machine behind the API: QEMU's microvm with the devices that were asked for, and QMP to hold it.

The guest sees what Firecracker would show it: virtio-mmio devices described by ACPI, disks in the order of the
requests, and a command line with Firecracker's own words behind ours. Its vsock is a virtio-serial port instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import threading
import time
from array import array
from pathlib import Path
from typing import Any, BinaryIO

QEMU = "qemu-system-x86_64"
PORT_NAME = "cloister"
PORT_ID = "channel"
_WAITS_S = 30.0
_PDEATHSIG = 1


def _bytes_per_second(drive: dict[str, Any]) -> int:
    """Return what the bandwidth's bucket of a drive lets through in a second; 0: everything."""
    bucket = drive.get("rate_limiter", {}).get("bandwidth", {})
    return bucket["size"] * 1000 // bucket["refill_time"] if bucket.get("refill_time") else 0


class MachineError(Exception):
    """QEMU did not do it."""


def _khz() -> int:
    """Return this machine's TSC, which an emulated guest must be told (FINDINGS: calibration hangs when busy)."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("bogomips"):
            return int(float(line.split(":")[1]) * 500)
    return 0


def own_words(devices: int) -> str:
    """Return what Firecracker adds to every command line on x86: it has no PCI, and names its devices a second time."""
    mmio = (f"virtio_mmio.device=4K@0x{0xC0001000 + 0x1000 * number:08x}:{5 + number}" for number in range(devices))
    return " ".join(("pci=off", *mmio))


class Machine:
    """One QEMU process."""

    def __init__(self, config: dict[str, Any], directory: Path, *, accelerator: str) -> None:
        """Say what it will be; `directory` is for sockets of ours."""
        self.config = config
        self.channel = directory / "channel"
        self._qmp_path = directory / "qmp"
        self._accelerator = accelerator
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: socket.socket
        self._answers: list[dict[str, Any]] = []
        self._ended = threading.Event()
        self._news = threading.Condition()
        self._order = threading.Lock()
        self.port_is_open = False
        """Whether the guest holds its end of the channel open: it listens, in terms of vsock."""

    def start(self, incoming: str = "") -> None:
        """Start it; with `incoming` it is one that was kept in this file."""
        kept: tuple[int, ...] = ()
        words = self._argv()
        if incoming:
            kept = (os.open(incoming, os.O_RDONLY),)
            words += ["-S", "-incoming", f"fd:{kept[0]}"]
        for number in kept:
            os.set_inheritable(number, True)
        begun = threading.Event()
        threading.Thread(target=self._run, args=(words, begun), daemon=True).start()
        begun.wait()
        for number in kept:
            os.close(number)
        self._connect()
        if incoming:
            self._await_status("paused", "prelaunch", "postmigrate")

    def _run(self, words: list[str], begun: threading.Event) -> None:
        """Start QEMU from a thread that lives as long as it: it shall die with us (PDEATHSIG asks for the thread)."""
        libc = ctypes.CDLL(None)

        def die_with_us() -> None:
            libc.prctl(_PDEATHSIG, signal.SIGKILL)

        try:
            # The files of a run are named by descriptors that were handed to us: QEMU gets all of them.
            # fmt: off
            self._process = subprocess.Popen(words, close_fds=False, stdin=subprocess.DEVNULL, preexec_fn=die_with_us)  # noqa: PLW1509
            # fmt: on
        finally:
            begun.set()
        self._process.wait()
        self._ended.set()

    def wait(self) -> None:
        """Return when it has ended."""
        self._ended.wait()

    def pause(self) -> None:
        """Hold it still."""
        self.ask("stop")

    def resume(self) -> None:
        """Let it go on."""
        self.ask("cont")

    def reset(self) -> None:
        """Do what Ctrl-Alt-Del does: without a keyboard the best there is, and it ends the process as well."""
        self.ask("system_reset")

    def balloon(self, mib: int) -> None:
        """Leave the guest so much less."""
        self.ask("balloon", value=(self.config["machine"]["mem_size_mib"] - mib) << 20)

    def limit(self, drive: str, body: dict[str, Any]) -> None:
        """Have a disk move no more than a request says."""
        nothing = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        self.ask("block_set_io_throttle", device=drive, bps=_bytes_per_second(body), **nothing)

    def save(self, path: str) -> None:
        """Write the paused machine into a file, as large as its memory."""
        size = self.config["machine"]["mem_size_mib"] << 20
        with Path(path).open("wb") as file:
            self._migrate(file)
            if file.seek(0, os.SEEK_END) > size:
                raise MachineError("the machine's state is larger than its memory")
            file.truncate(size)

    def _migrate(self, file: BinaryIO) -> None:
        self.ask("getfd", file.fileno(), fdname="snapshot")
        self.ask("migrate", uri="fd:snapshot")
        for _ in range(int(_WAITS_S / 0.02)):
            status = self.ask("query-migrate").get("status")
            if status == "completed":
                return
            if status in {"failed", "cancelled"}:
                raise MachineError("the machine's state could not be written")
            time.sleep(0.02)
        raise MachineError("writing the machine's state took too long")

    def ask(self, command: str, descriptor: int | None = None, **arguments: object) -> Any:
        """Ask QEMU for something, and return its answer."""
        message = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
        with self._order:
            self._qmp.sendmsg([message], rights)
            with self._news:
                if not self._news.wait_for(lambda: self._answers, _WAITS_S):
                    raise MachineError(f"QEMU did not answer {command}")
                answer = self._answers.pop(0)
        if "error" in answer:
            raise MachineError(str(answer["error"].get("desc")))
        return answer["return"]

    def _argv(self) -> list[str]:
        # QEMU's own bound for translated code, an eighth of the host's memory, makes starts a second slower.
        accelerator = "tcg,tb-size=256" if self._accelerator == "tcg" else self._accelerator
        config, words = self.config, [QEMU, "-accel", accelerator, "-cpu", "max"]
        words += ["-M", "microvm,auto-kernel-cmdline=off"]
        machine, boot = config["machine"], config["boot"]
        words += ["-smp", str(machine["vcpu_count"]), "-m", str(machine["mem_size_mib"])]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
        words += ["-qmp", f"unix:{self._qmp_path},server=on,wait=off", "-kernel", boot["kernel_image_path"]]
        if "initrd_path" in boot:
            words += ["-initrd", boot["initrd_path"]]
        devices = self._devices()
        clock = f" tsc_early_khz={_khz()}" if self._accelerator == "tcg" else ""
        count = devices.count("-device") - 1  # the port is a part of its bus
        words += ["-append", f"{boot.get('boot_args', '')} {own_words(count)}{clock}"]
        return words + devices

    def _devices(self) -> list[str]:
        config, words = self.config, list[str]()
        if "balloon" in config:
            words += ["-device", "virtio-balloon-device"]
        # A root device comes first, whatever the order of the requests; the others as they came.
        for drive in sorted(config["drives"].values(), key=lambda drive: not drive["is_root_device"]):
            readonly = "on" if drive.get("is_read_only") else "off"
            name, path = drive["drive_id"], drive["path_on_host"].replace(",", ",,")
            words += ["-drive", f"id={name},file={path},format=raw,if=none,readonly={readonly}"]
            rate = _bytes_per_second(drive)
            limit = f",throttling.bps-total={rate}" if rate else ""
            words[-1] += limit
            words += ["-device", f"virtio-blk-device,drive={name}"]
        for name, interface in config["networks"].items():
            tap = interface["host_dev_name"]
            words += ["-netdev", f"tap,id={name},ifname={tap},script=no,downscript=no"]
            mac = f",mac={interface['guest_mac']}" if "guest_mac" in interface else ""
            words += ["-device", f"virtio-net-device,netdev={name}{mac}"]
        words += ["-chardev", f"socket,id=vsock,path={self.channel},server=on,wait=off"]
        words += ["-device", "virtio-serial-device"]
        words += ["-device", f"virtserialport,chardev=vsock,name={PORT_NAME},id={PORT_ID}"]
        if config.get("entropy") is not None:
            words += ["-device", "virtio-rng-device"]
        return words

    def _connect(self) -> None:
        if self._process is None:
            raise MachineError(f"{QEMU} cannot be started")
        self._qmp = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until = time.monotonic() + _WAITS_S
        while True:
            try:
                self._qmp.connect(str(self._qmp_path))
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise MachineError("QEMU does not start") from None
                time.sleep(0.005)
        threading.Thread(target=self._listen, daemon=True).start()
        self.ask("qmp_capabilities")

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionError), self._qmp.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if message.get("event") == "VSERPORT_CHANGE" and message["data"]["id"] == PORT_ID:
                    self.port_is_open = message["data"]["open"]
                if "return" in message or "error" in message:
                    with self._news:
                        self._answers.append(message)
                        self._news.notify_all()

    def _await_status(self, *wanted: str) -> None:
        until = time.monotonic() + _WAITS_S
        while self.ask("query-status")["status"] not in wanted:
            if time.monotonic() > until:
                raise MachineError("the machine's state cannot be loaded")
            time.sleep(0.01)
