"""What a tap takes of whoever holds it: frames, and nothing that the host's kernel would have to finish. Root only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.root]
HOLDER = """
import errno, fcntl, json, os, struct
from cloister.host import taps
from cloister.plan.bridge import Tap
tap = Tap(name="clvm7", mac="52:54:00:00:00:01", own_mac="06:c1:00:00:00:01", address="10.0.0.7", gateway="10.0.0.1",
          port=1, uid=os.getuid(), run="x")
held = taps._open(tap)
TUNSETIFF, TUNGETIFF, VNET_HDR = 0x400454CA, 0x800454D2, 0x4000
def flags():
    return struct.unpack("16sH22x", fcntl.ioctl(held, TUNGETIFF, bytes(40)))[1]
said = {"flags": flags(), "again": "allowed"}
try:
    fcntl.ioctl(held, TUNSETIFF, struct.pack("16sH22x", tap.name.encode(), said["flags"] | VNET_HDR))
except OSError as error:
    said["again"] = errno.errorcode[error.errno]
said["after"] = flags()
print(json.dumps(said))
"""
VNET_HDR = 0x4000


def test_a_tap_is_one_of_plain_frames_and_stays_one() -> None:
    """It was made without a virtio header, and its holder cannot ask for one: no half-made segment goes in by it."""
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", f"import sys; sys.path[:0] = {[*sys.path, source]!r}\n{HOLDER}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["flags"] & VNET_HDR
    assert said["again"] != "allowed"
    assert said["after"] == said["flags"]
