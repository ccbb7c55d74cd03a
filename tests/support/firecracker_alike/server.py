"""The API: what is allowed when, what it changes, and the answers in Firecracker's form."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from firecracker_alike.bridge import PORT, Bridge
from firecracker_alike.machine import Machine, MachineError
from firecracker_alike.models import PARSING, FaultError, Version, check, route

POST_BOOT = "The requested operation is not supported after starting the microVM."
PRE_BOOT = "The requested operation is not supported before starting the microVM."
LOAD_NOT_ALLOWED = "Loading a microVM snapshot not allowed after configuring boot-specific resources."
MAX_BODY = 51200
"""Firecracker's own limit, by default."""
_SECTOR = 512


class Firecracker:
    """One process's worth of state: before the start a configuration, afterwards a machine."""

    def __init__(self, name: str, version: Version, directory: Path, accelerator: str) -> None:
        """Begin with Firecracker's defaults."""
        self.name = name
        self.version = version
        self.state = "Not started"
        self.config: dict[str, Any] = {
            "machine": {"vcpu_count": 1, "mem_size_mib": 128},
            "drives": {},
            "networks": {},
        }
        self.machine: Machine | None = None
        self._directory = directory
        self._accelerator = accelerator
        self._bridge: Bridge | None = None
        self._touched = False
        self._order = threading.Lock()

    def answer(self, method: str, path: str, raw: bytes) -> dict[str, Any] | None:
        """Do what a request asks, and return what it is answered with (nothing: 204).

        Raises:
            FaultError: it is refused.
        """
        pattern, given, allowed = route(method, path, self.version)
        body: dict[str, Any] = {}
        if allowed.model:
            try:
                value = json.loads(raw)
            except ValueError as error:
                raise FaultError(f"{PARSING}{error}") from None
            body = check(allowed.model, value, self.version)
        with self._order:
            if self.state == "Not started" and not allowed.before:
                raise FaultError(PRE_BOOT)
            if self.state != "Not started" and not allowed.after:
                raise FaultError(POST_BOOT)
            try:
                return self._act(method, pattern, given, body)
            except (OSError, MachineError) as error:
                raise FaultError(str(error)) from None

    def configure(self, path: str) -> None:
        """Do what a configuration file says, and start (`--config-file`).

        Raises:
            FaultError: it is refused.
        """
        try:
            config = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise FaultError(f"the configuration file cannot be read: {error}") from None
        for key in ("boot-source", "drives"):
            if key not in config:
                raise FaultError(f"missing field `{key}`")
        for key, value in config.items():
            if key not in {
                "boot-source",
                "drives",
                "machine-config",
                "network-interfaces",
                "vsock",
                "entropy",
                "balloon",
            }:
                raise FaultError(f"unknown field `{key}`")
            for one in value if isinstance(value, list) else (value,):
                name = one.get("drive_id") or one.get("iface_id") if isinstance(value, list) else ""
                self.answer("PUT", f"/{key}/{name}".rstrip("/"), json.dumps(one).encode())
        self.answer("PUT", "/actions", b'{"action_type":"InstanceStart"}')

    def _act(self, method: str, pattern: str, given: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if method == "GET":
            return self._tell(pattern)
        action = {
            "/actions": self._action,
            "/balloon": self._balloon if method == "PUT" else self._inflate,
            "/boot-source": self._boot_source,
            "/logger": self._writable("log_path"),
            "/machine-config": self._machine_config,
            "/metrics": self._writable("metrics_path"),
            "/serial": self._writable("serial_out_path"),
            "/snapshot/create": self._create_snapshot,
            "/snapshot/load": self._load_snapshot,
            "/vm": self._set_state,
            "/vsock": self._vsock,
        }.get(pattern)
        if action is not None:
            action(body)
        elif pattern == "/drives/{id}":
            self._drive(method, given, body)
        elif pattern == "/network-interfaces/{id}":
            self._same_id(given, body["iface_id"])
            self._set("networks", {**self.config["networks"], given: body})
        else:
            self._set("entropy", body)
        return None

    def _tell(self, pattern: str) -> dict[str, Any]:
        version = ".".join(map(str, self.version))
        if pattern == "/version":
            return {"firecracker_version": version}
        if pattern == "/machine-config":
            return dict(self.config["machine"])
        if pattern == "/balloon":
            if "balloon" not in self.config:
                raise FaultError("No balloon device found.")
            return dict(self.config["balloon"])
        return {"id": self.name, "state": self.state, "vmm_version": version, "app_name": "Firecracker"}

    def _set(self, key: str, value: object) -> None:
        self.config[key] = value
        self._touched = True

    def _writable(self, key: str) -> Any:
        def act(body: dict[str, Any]) -> None:
            if key in body:
                os.close(os.open(body[key], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600))

        return act

    def _machine_config(self, body: dict[str, Any]) -> None:
        if body.get("smt") and body["vcpu_count"] != 1 and body["vcpu_count"] % 2:
            raise FaultError(
                "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled."
            )
        self._set("machine", body)

    def _boot_source(self, body: dict[str, Any]) -> None:
        for key, what in (("kernel_image_path", "kernel file"), ("initrd_path", "initrd file")):
            if key in body:
                _readable(body[key], f"The {what} cannot be opened")
        self._set("boot", body)

    def _drive(self, method: str, given: str, body: dict[str, Any]) -> None:
        self._same_id(given, body["drive_id"])
        if method == "PATCH":
            if given not in self.config["drives"]:
                raise FaultError("Invalid block device ID.")
            if "path_on_host" in body:
                raise FaultError("this look-alike keeps to the file of a drive")
            if "rate_limiter" in body:
                self._running().limit(given, body)
            return
        if "path_on_host" not in body or "socket" in body:
            raise FaultError("Unable to create the block device: this look-alike knows files only")
        mode = os.O_RDONLY if body.get("is_read_only") else os.O_RDWR
        try:
            descriptor = os.open(body["path_on_host"], mode)
        except OSError as error:
            raise FaultError(
                f"Unable to create the virtio block device: {error.strerror} {body['path_on_host']}"
            ) from None
        size = os.lseek(descriptor, 0, os.SEEK_END)
        os.close(descriptor)
        if size < _SECTOR:
            raise FaultError("Unable to create the virtio block device: the file is empty")
        others = [drive for name, drive in self.config["drives"].items() if name != given]
        if body["is_root_device"] and any(drive["is_root_device"] for drive in others):
            raise FaultError("A root block device already exists!")
        self._set("drives", {**self.config["drives"], given: body})

    def _vsock(self, body: dict[str, Any]) -> None:
        try:
            self._bridge = Bridge(body["uds_path"])
        except OSError as error:
            raise FaultError(f"Cannot create backend for vsock device: {error.strerror}") from None
        self._set("vsock", body)

    def _balloon(self, body: dict[str, Any]) -> None:
        if body["amount_mib"] > self.config["machine"]["mem_size_mib"]:
            raise FaultError("Amount of pages requested cannot exceed the guest memory size.")
        self._set("balloon", body)

    def _inflate(self, body: dict[str, Any]) -> None:
        if "balloon" not in self.config:
            raise FaultError("No balloon device found.")
        if body["amount_mib"] > self.config["machine"]["mem_size_mib"]:
            raise FaultError("Amount of pages requested cannot exceed the guest memory size.")
        self._running().balloon(body["amount_mib"])
        self.config["balloon"]["amount_mib"] = body["amount_mib"]

    def _action(self, body: dict[str, Any]) -> None:
        kind = body["action_type"]
        if kind == "InstanceStart":
            if self.state != "Not started":
                raise FaultError(POST_BOOT)
            if "boot" not in self.config:
                raise FaultError("Cannot start microvm without kernel configuration.")
            self._start()
            self.state = "Running"
        elif self.state == "Not started":
            raise FaultError(PRE_BOOT)
        elif kind == "SendCtrlAltDel":
            self._running().reset()

    def _set_state(self, body: dict[str, Any]) -> None:
        if body["state"] == "Paused":
            self._running().pause()
        else:
            self._running().resume()
        self.state = "Paused" if body["state"] == "Paused" else "Running"

    def _create_snapshot(self, body: dict[str, Any]) -> None:
        if self.state != "Paused":
            raise FaultError("Cannot create snapshot: the microVM is not paused.")
        self._running().save(body["mem_file_path"])
        Path(body["snapshot_path"]).write_text(json.dumps(self.config), encoding="utf-8")
        if self._bridge is not None:
            self._bridge.reset()

    def _load_snapshot(self, body: dict[str, Any]) -> None:
        if self._touched:
            raise FaultError(LOAD_NOT_ALLOWED)
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise FaultError(f"{PARSING}either `mem_backend` or `mem_file_path` is required")
        memory = body["mem_backend"]["backend_path"] if "mem_backend" in body else body["mem_file_path"]
        try:
            self.config = json.loads(_readable(body["snapshot_path"], "Load snapshot error").read_bytes())
        except ValueError:
            raise FaultError("Load snapshot error: the state cannot be read") from None
        if _readable(memory, "Load snapshot error").stat().st_size != self.config["machine"]["mem_size_mib"] << 20:
            raise FaultError("Load snapshot error: the memory file has another size than the guest's memory")
        if "vsock" in self.config:
            path = body.get("vsock_override", self.config["vsock"])["uds_path"]
            try:
                self._bridge = Bridge(path)
            except OSError as error:
                raise FaultError(f"Load snapshot error: vsock: {error.strerror}") from None
        self._start(memory)
        self.state = "Paused"
        if body.get("resume_vm"):
            self._set_state({"state": "Resumed"})

    def _start(self, incoming: str = "") -> None:
        machine = Machine(self.config, self._directory, accelerator=self._accelerator)
        machine.start(incoming)
        self.machine = machine
        if self._bridge is not None:
            self._bridge.lead_to(machine.channel, lambda: machine.port_is_open)
        threading.Thread(target=self._end_with, args=(machine,), daemon=True).start()

    def _end_with(self, machine: Machine) -> None:
        """Be gone when the guest is: Firecracker is the machine."""
        machine.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(0)

    def _running(self) -> Machine:
        if self.machine is None:
            raise FaultError(PRE_BOOT)
        return self.machine

    @staticmethod
    def _same_id(given: str, named: str) -> None:
        if given != named:
            raise FaultError("The id from the path does not match the id from the body!")


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Firecracker's API socket."""

    daemon_threads = True

    def __init__(self, path: str, firecracker: Firecracker) -> None:
        """Listen."""
        self.firecracker = firecracker
        super().__init__(path, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that hung up; everything else is a fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Answer one request."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            self._reply(400, {"fault_message": f"Request payload with size {length} is larger than the limit."})
            return
        try:
            answer = self.server.firecracker.answer(self.command, self.path, self.rfile.read(length))
        except FaultError as fault:
            self._reply(400, {"fault_message": str(fault)})
        else:
            self._reply(204 if answer is None else 200, answer)

    do_PUT = do_PATCH = do_DELETE = do_POST = do_GET  # noqa: N815  (names of the standard library)

    def address_string(self) -> str:
        """Say nothing about a peer that has no address."""
        return ""

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Keep standard error for what goes wrong."""

    def _reply(self, status: int, value: dict[str, Any] | None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        if body:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _readable(path: str, message: str) -> Path:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise FaultError(f"{message}: {error.strerror} {path}") from None
    return Path(path)


__all__ = ["PORT", "Firecracker", "Server"]
