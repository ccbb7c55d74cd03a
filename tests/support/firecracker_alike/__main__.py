"""The program: `firecracker --id NAME --api-sock PATH`, and `--version`.

Two variables of the environment are the look-alike's own: FIRECRACKER_ALIKE_VERSION (what it says it is, and knows)
and FIRECRACKER_ALIKE_ACCELERATOR (QEMU's, `tcg` by default).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path

from firecracker_alike.models import FaultError
from firecracker_alike.server import Firecracker, Server

VERSION = "1.16.1"
BAD_ARGUMENTS = 153
"""Firecracker's exit status for a command line that it does not understand."""


def main() -> int:
    """Serve the API until the guest ends."""
    version = os.environ.get("FIRECRACKER_ALIKE_VERSION", VERSION)
    parser = argparse.ArgumentParser(prog="firecracker", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    parser.add_argument("--no-api", action="store_true")
    parser.add_argument("--config-file")
    parser.add_argument("--start-time-us")
    parser.add_argument("--start-time-cpu-us")
    try:
        arguments, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        unknown, arguments = [str(error)], None
    if unknown or arguments is None:
        print(f"Arguments parsing error: Found argument '{unknown[0]}' which wasn't expected", file=sys.stderr)  # noqa: T201
        return BAD_ARGUMENTS
    if arguments.version:
        print(f"Firecracker v{version}")  # noqa: T201
        return 0
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", arguments.id):
        print(f"Invalid instance ID: {arguments.id}", file=sys.stderr)  # noqa: T201
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Beside the API's socket: in the jail of a run little else can be written to.
    beside = None if arguments.no_api else Path(arguments.api_sock).resolve().parent
    directory = Path(tempfile.mkdtemp(prefix=".alike-", dir=beside))
    accelerator = os.environ.get("FIRECRACKER_ALIKE_ACCELERATOR", "tcg")
    numbers = tuple(map(int, version.split(".")))
    firecracker = Firecracker(arguments.id, (numbers[0], numbers[1], numbers[2]), directory, accelerator)
    if arguments.config_file:
        try:
            firecracker.configure(arguments.config_file)
        except FaultError as fault:
            print(f"Configuration error: {fault}", file=sys.stderr)  # noqa: T201
            return 1
    if arguments.no_api:
        if not arguments.config_file:
            return BAD_ARGUMENTS
        threading.Event().wait()
    try:
        server = Server(arguments.api_sock, firecracker)
    except OSError as error:
        print(f"Failed to open the API socket at: {arguments.api_sock}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
