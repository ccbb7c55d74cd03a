"""The argv of the shim's inner half: the first process of a sandbox, whatever built that.

Both backends start it with the same words; what they mean stands in ARCHITECTURE.md, "Rules of the inner half".
"""

from __future__ import annotations

from typing import Literal

import msgspec

CLOISTER_DIR = "/run/cloister"
BOX = f"{CLOISTER_DIR}/box"
"""Where the run's own read-only directory appears: the egress socket and generated files."""
EGRESS_SOCKET = f"{BOX}/egress.sock"
PROXY_PORT = 3128
MODEL_PORT = 11435
"""Where model traffic is served inside, for programs that take a base URL."""
PROBE_ADDRESS = "192.0.2.1:9"
"""TEST-NET-1 (RFC 5737): routed nowhere, so a connect may only succeed or hang where a network exists."""


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    """What the inner half restricts, tries and serves."""

    control: int
    """The descriptor of its channel to the broker."""
    unit: bool = False
    """It is the main process of a unit: perhaps not PID 1, standard streams come with the go."""
    seccomp: str = ""
    """A file with the filter to install before anything else runs; empty where the backend has installed it."""
    models: bool = False
    nested: bool = False
    landlock: Literal["available", "required", "off"] = "available"
    landlock_rw: tuple[str, ...] = ()
    mdwe: bool = False
    rlimits: tuple[tuple[str, int], ...] = ()
    notify: Literal["", "calls", "files"] = ""
    """Which calls of its commands are told: launched programs and connections, or these and the programs' files."""
    probe_write: tuple[str, ...] = ()
    probe_connect: tuple[str, ...] = ()


def inner_argv(shim: str, inner: Inner) -> tuple[str, ...]:  # noqa: C901  # a flag per choice
    """Return the argv; `shim` is the program's path inside."""
    argv = [shim, "inner", *(["--unit"] if inner.unit else []), "--ctl", str(inner.control)]
    argv += ["--egress", EGRESS_SOCKET, "--listen", f"127.0.0.1:{PROXY_PORT}"]
    if inner.models:
        argv += ["--listen", f"127.0.0.1:{MODEL_PORT}"]
    for path in inner.probe_write:
        argv += ["--probe-write", path]
    for address in inner.probe_connect:
        argv += ["--probe-connect", address]
    argv += ["--landlock", inner.landlock]
    if inner.landlock != "off":
        argv += ["--landlock-ro", "/"]
        for path in inner.landlock_rw:
            argv += ["--landlock-rw", path]
    for name, value in inner.rlimits:
        argv += ["--rlimit", f"{name}={value}"]
    if inner.mdwe:
        argv.append("--mdwe")
    if inner.nested:
        argv.append("--nested")
    if inner.notify:
        argv += ["--notify", inner.notify]
    if inner.seccomp:
        argv += ["--seccomp", inner.seccomp]
    return tuple(argv)
