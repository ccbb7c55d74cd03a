"""What each request may hold, from the public description of the API (firecracker.yaml, 1.8 to 1.17).

Like Firecracker it refuses what it does not know, what is missing, and what has another type. `since` is the first
version that knows a field or a path, so that a client's gates can be tried.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

Version = tuple[int, int, int]
ALWAYS: Version = (0, 0, 0)
PARSING = "An error occurred when deserializing the json body of a request: "


class FaultError(Exception):
    """A refusal, in the words of the answer's `fault_message`."""


class F(NamedTuple):
    """A field: its kind (`string`, `bool`, `int`, a model's name, or `[MODEL]`), and what is asked of it."""

    kind: str
    required: bool = False
    among: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    since: Version = ALWAYS


MODELS: dict[str, dict[str, F]] = {
    "InstanceActionInfo": {
        "action_type": F("string", required=True, among=("FlushMetrics", "InstanceStart", "SendCtrlAltDel"))
    },
    "Balloon": {
        "amount_mib": F("int", required=True, least=0),
        "deflate_on_oom": F("bool", required=True),
        "stats_polling_interval_s": F("int", least=0),
        "free_page_hinting": F("bool", since=(1, 14, 0)),
        "free_page_reporting": F("bool", since=(1, 14, 0)),
    },
    "BalloonUpdate": {"amount_mib": F("int", required=True, least=0)},
    "BootSource": {
        "kernel_image_path": F("string", required=True),
        "initrd_path": F("string"),
        "boot_args": F("string"),
    },
    "Drive": {
        "drive_id": F("string", required=True),
        "is_root_device": F("bool", required=True),
        "partuuid": F("string"),
        "cache_type": F("string", among=("Unsafe", "Writeback")),
        "is_read_only": F("bool"),
        "path_on_host": F("string"),
        "rate_limiter": F("RateLimiter"),
        "io_engine": F("string", among=("Sync", "Async")),
        "socket": F("string"),
    },
    "PartialDrive": {
        "drive_id": F("string", required=True),
        "path_on_host": F("string"),
        "rate_limiter": F("RateLimiter"),
    },
    "RateLimiter": {"bandwidth": F("TokenBucket"), "ops": F("TokenBucket")},
    "TokenBucket": {
        "size": F("int", required=True, least=0),
        "refill_time": F("int", required=True, least=0),
        "one_time_burst": F("int", least=0),
    },
    "Logger": {
        "level": F("string", among=("Error", "Warning", "Info", "Debug", "Trace", "Off")),
        "log_path": F("string"),
        "show_level": F("bool"),
        "show_log_origin": F("bool"),
        "module": F("string"),
    },
    "Metrics": {"metrics_path": F("string", required=True)},
    "MachineConfiguration": {
        "vcpu_count": F("int", required=True, least=1, most=32),
        "mem_size_mib": F("int", required=True, least=1),
        "smt": F("bool"),
        "track_dirty_pages": F("bool"),
        "cpu_template": F("string", among=("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")),
        "huge_pages": F("string", among=("None", "2M")),
    },
    "NetworkInterface": {
        "iface_id": F("string", required=True),
        "host_dev_name": F("string", required=True),
        "guest_mac": F("string"),
        "mtu": F("int", least=68, most=65535, since=(1, 16, 0)),
        "rx_rate_limiter": F("RateLimiter"),
        "tx_rate_limiter": F("RateLimiter"),
    },
    "EntropyDevice": {"rate_limiter": F("RateLimiter")},
    "SerialDevice": {"serial_out_path": F("string"), "rate_limiter": F("TokenBucket", since=(1, 16, 0))},
    "SnapshotCreateParams": {
        "mem_file_path": F("string", required=True),
        "snapshot_path": F("string", required=True),
        "snapshot_type": F("string", among=("Full", "Diff")),
    },
    "MemoryBackend": {
        "backend_type": F("string", required=True, among=("File", "Uffd")),
        "backend_path": F("string", required=True),
    },
    "NetworkOverride": {"iface_id": F("string", required=True), "host_dev_name": F("string", required=True)},
    "VsockOverride": {"uds_path": F("string", required=True)},
    "SnapshotLoadParams": {
        "snapshot_path": F("string", required=True),
        "mem_file_path": F("string"),
        "mem_backend": F("MemoryBackend"),
        "enable_diff_snapshots": F("bool"),
        "track_dirty_pages": F("bool", since=(1, 13, 0)),
        "resume_vm": F("bool"),
        "network_overrides": F("[NetworkOverride]", since=(1, 12, 0)),
        "vsock_override": F("VsockOverride", since=(1, 16, 0)),
        "clock_realtime": F("bool", since=(1, 16, 0)),
    },
    "Vm": {"state": F("string", required=True, among=("Paused", "Resumed"))},
    "Vsock": {
        "guest_cid": F("int", required=True, least=3, most=2**32 - 2),
        "uds_path": F("string", required=True),
        "vsock_id": F("string"),
    },
}


class Route(NamedTuple):
    """A call: when it is allowed (`before` or `after` the start, or both), and the model of its body."""

    model: str
    before: bool = True
    after: bool = False
    since: Version = ALWAYS


ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/"): Route("", after=True),
    ("GET", "/version"): Route("", after=True),
    ("GET", "/machine-config"): Route("", after=True),
    ("PUT", "/actions"): Route("InstanceActionInfo", after=True),
    ("GET", "/balloon"): Route("", after=True),
    ("PUT", "/balloon"): Route("Balloon"),
    ("PATCH", "/balloon"): Route("BalloonUpdate", before=False, after=True),
    ("PUT", "/boot-source"): Route("BootSource"),
    ("PUT", "/drives/{id}"): Route("Drive"),
    ("PATCH", "/drives/{id}"): Route("PartialDrive", before=False, after=True),
    ("PUT", "/entropy"): Route("EntropyDevice"),
    ("PUT", "/logger"): Route("Logger", after=True),
    ("PUT", "/machine-config"): Route("MachineConfiguration"),
    ("PUT", "/metrics"): Route("Metrics", after=True),
    ("PUT", "/network-interfaces/{id}"): Route("NetworkInterface"),
    ("PUT", "/serial"): Route("SerialDevice", since=(1, 14, 0)),
    ("PUT", "/snapshot/create"): Route("SnapshotCreateParams", before=False, after=True),
    ("PUT", "/snapshot/load"): Route("SnapshotLoadParams"),
    ("PATCH", "/vm"): Route("Vm", before=False, after=True),
    ("PUT", "/vsock"): Route("Vsock"),
}
_ID = re.compile(r"[A-Za-z0-9_]+")


def route(method: str, path: str, version: Version) -> tuple[str, str, Route]:
    """Return the pattern of a path, the id in it, and what the call is.

    Raises:
        FaultError: there is no such call.
    """
    parts = path.split("/")
    for pattern, given in ((path, ""), ("/".join([*parts[:-1], "{id}"]), parts[-1])):
        found = ROUTES.get((method, pattern))
        if found is None or version < found.since:
            continue
        if pattern != path and not _ID.fullmatch(given):
            raise FaultError("API Resource IDs can only contain alphanumeric characters and underscores.")
        return pattern, given, found
    raise FaultError(f"Invalid request method and/or path: {method} {path}.")


def check(model: str, value: object, version: Version) -> dict[str, Any]:
    """Return the body of a request, held against its model.

    Raises:
        FaultError: it does not fit.
    """
    if not isinstance(value, dict):
        raise FaultError(f"{PARSING}invalid type: expected struct {model}")
    fields = {name: field for name, field in MODELS[model].items() if field.since <= version}
    for name, item in value.items():
        if name not in fields:
            raise FaultError(f"{PARSING}unknown field `{name}`, expected one of {', '.join(fields)}")
        _check_field(name, fields[name], item, version)
    for name, field in fields.items():
        if field.required and name not in value:
            raise FaultError(f"{PARSING}missing field `{name}`")
    return value


def _check_field(name: str, field: F, item: object, version: Version) -> None:
    kinds = {"string": str, "bool": bool, "int": int}
    if field.kind in kinds:
        if type(item) is not kinds[field.kind]:
            raise FaultError(f"{PARSING}invalid type for `{name}`, expected {field.kind}")
        if field.among and item not in field.among:
            raise FaultError(f"{PARSING}unknown variant `{item}`, expected one of {', '.join(field.among)}")
        if isinstance(item, int):
            _check_range(name, field, item)
    elif field.kind.startswith("["):
        if not isinstance(item, list):
            raise FaultError(f"{PARSING}invalid type for `{name}`, expected a sequence")
        for one in item:
            check(field.kind[1:-1], one, version)
    else:
        check(field.kind, item, version)


def _check_range(name: str, field: F, item: int) -> None:
    if (field.least is not None and item < field.least) or (field.most is not None and item > field.most):
        raise FaultError(f"{PARSING}invalid value for `{name}`: {item}")
