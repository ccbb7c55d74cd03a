"""The part `images` of the benchmarks: building the smallest shipped image, and finding out that nobody changed it.

About four minutes, nearly all of them Debian's packages. Named in `make bench ARGS=images`.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from benchmarks.report import Grid, Line
from benchmarks.world import World

from cloister.host.image_store import INITRAMFS, KERNEL, ROOT
from cloister.images.manifest import Manifest
from cloister.images.verity import BLOCK

ROUNDS = 3
CHECKS = 5
NAME = "minimal"
CLOCK, PROCESSOR, MEDIAN, COUNT = "clock, s", "processor, s", "median clock, s", "rounds"
COLUMNS = (CLOCK, PROCESSOR, MEDIAN, COUNT)
_STAMP = re.compile(r"\s*([0-9.]+) s  (.*)")
_STAGES = (
    ("Debian's packages: fetched, unpacked, configured", ""),
    ("the file system (erofs, lz4hc) and its hash tree", "writing the file system"),
    ("kernel, modules, lists, signature", "taking kernel and modules"),
)
"""What a build spends its time on, and the words by which it says that this begins."""


class Spent(NamedTuple):
    """What one command took, in seconds, and what it said on standard error."""

    clock: float
    processor: float
    said: str = ""


def images() -> list[Grid]:
    """Measure building, renewing and verifying."""
    world = World("images")
    try:
        lock = str(world.home / f".local/share/cloister/images/{NAME}/1/lock.json")
        built, again = [], []
        for _ in range(ROUNDS):
            built.append(spend(["cloister", "image", "build", NAME], world))
            again.append(spend(["cloister", "image", "build", NAME, "--locked", lock], world))
        renewed = [spend(["cloister", "image", "renew", NAME], world) for _ in range(ROUNDS)]
        newest = max((world.home / f".local/share/cloister/images/{NAME}").iterdir(), key=lambda path: int(path.name))
        return [_building(built, again, renewed, newest), _verifying(world, newest)]
    finally:
        world.close()


def spend(argv: Sequence[str], world: World) -> Spent:
    """Run a command to its end; the processor's time is that of all that it started.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(
        argv, cwd=world.project, env=world.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(time.perf_counter() - began, used, done.stderr)


def stages(said: str, whole: float) -> list[float]:
    """Return how long each of `_STAGES` took, by the times that a build has told."""
    told = [(float(found[1]), found[2]) for found in map(_STAMP.fullmatch, said.splitlines()) if found]
    begins = [0.0, *(next(when for when, what in told if what == words) for _, words in _STAGES[1:]), whole]
    return [end - begin for begin, end in itertools.pairwise(begins)]


def _building(built: Sequence[Spent], again: Sequence[Spent], renewed: Sequence[Spent], version: Path) -> Grid:
    manifest = msgspec.json.decode((version / "manifest.json").read_bytes(), type=Manifest)
    parts = zip(*(stages(one.said, one.clock) for one in built), strict=True)
    # Its programs live in jails of their own, so their processor time does not come back to who waits for it.
    whole = _line(f"`cloister image build {NAME}`", [one._replace(processor=0) for one in built])
    names = [f"of it: {name}" for name, _ in _STAGES]
    pieces = [_line(name, [Spent(taken, 0) for taken in part]) for name, part in zip(names, parts, strict=True)]
    others = {"build NAME --locked, all kept": again, "renew NAME": renewed}
    lines = [
        whole, *pieces,
        *(_line(f"`cloister image {verb.replace('NAME', NAME)}`", [one._replace(processor=0) for one in spent])
          for verb, spent in others.items()),
    ]  # fmt: skip
    return Grid(
        "Building an image", (CLOCK, MEDIAN, COUNT), lines,
        f"By an ordinary user; the root has {manifest.root.size / (1 << 20):.0f} MiB. Each build fetches Debian's "
        "packages from this machine's mirror, which is near, so add your own network's time; with `--locked` they are "
        "those of an earlier build. The host's page cache is warm. Minima, and the median of the clock.",
    )  # fmt: skip


def _verifying(world: World, version: Path) -> Grid:
    manifest = msgspec.json.decode((version / "manifest.json").read_bytes(), type=Manifest)
    root = str(version / ROOT)
    size = manifest.root.size + manifest.kernel.size + manifest.initramfs.size
    bare = ["sha256sum", root, str(version / KERNEL), str(version / INITRAMFS)]
    offset = f"--hash-offset={manifest.root.data_blocks * BLOCK}"
    plain = ["veritysetup", "verify", root, root, manifest.root.root_hash, offset]
    cases = {
        "sha256sum of the same files": bare,
        "veritysetup verify, the root only": plain,
        f"`cloister image verify {NAME}`": ["cloister", "image", "verify", NAME],
    }  # fmt: skip
    found: dict[str, list[Spent]] = {name: [] for name in cases}
    for _ in range(CHECKS):
        for name, argv in cases.items():
            found[name].append(spend(argv, world))
    lines = [_line(name, spent) for name, spent in found.items()]
    return Grid(
        "Verifying every byte of an image", COLUMNS, lines,
        f"{size / (1 << 20):.0f} MiB, in the page cache. Ours has the signature, kernel, initramfs and the whole tree "
        "in it, and Python's start; veritysetup reads the root against its tree.",
    )  # fmt: skip


def _line(name: str, spent: Sequence[Spent]) -> Line:
    clocks = [one.clock for one in spent]
    values: dict[str, float] = {CLOCK: min(clocks), MEDIAN: statistics.median(clocks)}
    if used := min(one.processor for one in spent):
        values[PROCESSOR] = used
    return Line(name, values | {COUNT: len(spent)})
