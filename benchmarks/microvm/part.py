"""The part `microvm` of the benchmarks: first replies, warm starts, many clones, the channel, the disks; all in TCG.

Bounded to about ten minutes. Guests are emulated where KVM boots none, as on the machine of the results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.figures import compare, interleave
from benchmarks.microvm.beside import latencies
from benchmarks.microvm.guests import AGENT, Alive, Guests, monitor_version
from benchmarks.report import Grid, Line, Section, Target
from benchmarks.world import World

from cloister.host.e2fs import Tools
from cloister.host.vm_fill import fill
from cloister.host.vm_hand_back import drop, hand_back
from cloister.host.vm_workspace import make_workspace_disk
from cloister.plan.workspace import WorkspaceLayout
from cloister.runs.disk_tools import disk_tools

ROUNDS = 4
PROGRAM_ROUNDS = 3
CLONES = 20
CHANNEL_MIB = 50
_PARTS = (("half", 0.5), ("95 %", 0.95), ("99 %", 0.99))
PLAIN = "QEMU alone, the same kernel and modules"
COLD, WARM = "Cloister's guest, booted", "Cloister's guest, from its template"
POLICY = "schema = 1\n\n" + AGENT.format(name="warm", warm="true") + AGENT.format(name="cold", warm="false")
POLICY += '[agents.shell]\npreset = "shell"\nenvironment_audit = false\n'


def versions() -> dict[str, str]:
    """Return what was measured with."""
    return {"QEMU": monitor_version()}


def microvm() -> list[Section | Grid]:
    """Measure everything about guests."""
    image = os.environ.get("CLOISTER_TEST_GUEST", "")
    if not image:
        raise RuntimeError("CLOISTER_TEST_GUEST is not set; run tools/bench microvm")
    world = World("microvm", POLICY)
    try:
        guests = Guests(world, image)
        parts: list[Section | Grid] = [
            replies(guests),
            clones(guests),
            programs(world),
            channel(world),
            verified(guests),
        ]
        return [*parts, disks(world), beside(world)]
    finally:
        world.close()


def replies(guests: Guests) -> Section:
    """From the start of the monitor to the guest's hello."""

    def case(start: Callable[[], Alive]) -> Callable[[], float]:
        def measured() -> float:
            guest = start()
            guest.end()
            return guest.taken_s * 1000

        return measured

    cases = {PLAIN: case(guests.plain), COLD: case(guests.cold), WARM: case(guests.warm)}
    rows = compare(interleave(cases, ROUNDS, 1), PLAIN)
    cold, warm = rows[1].ratio_of_minima, rows[2].minimum
    met = "Met" if cold <= 1.1 and warm <= 100 else "Missed"
    return Section(
        "First reply of a guest", "ms", rows,
        "From the start of the monitor to the guest's first frame over its channel, 256 MiB, one processor, emulated "
        "(TCG). The plain guest's init does nothing but load the same modules and answer; ours runs in its jail, has a "
        "verified root mounted and is ready for its orders.",
        "booted ≤ 1.1 x QEMU alone; from a template ≤ 100 ms",
        f"{met}: {cold:.2f} x and {warm:.0f} ms, minima.",
    )  # fmt: skip


def clones(guests: Guests) -> Grid:
    """Many guests from one template."""
    lines = []
    for count in (1, 5, CLONES):
        with ThreadPoolExecutor(count) as pool:  # a jail dies with the thread that made it
            began = time.perf_counter()
            living = list(pool.map(lambda _: guests.warm(), range(count)))
            taken = time.perf_counter() - began
            time.sleep(1)
            shares = [guest.proportional_mib() for guest in living]
            for guest in living:
                guest.end()
        values = {"all replied, s": taken, "PSS each, MiB": sum(shares) / count, "PSS together, MiB": sum(shares)}
        lines.append(Line(f"{count} clone{'s' * (count > 1)}", values))
    return Grid(
        "Clones of one template", ("all replied, s", "PSS each, MiB", "PSS together, MiB"), lines,
        "Started together; a second after the last reply all live, idle. PSS is that of the jail and the monitor with "
        "the guest's memory, of which the clones share what none of them has written; the broker's sealed copy, "
        "one for all, is not in it. Verifying the "
        f"template, once per broker, took {guests.verify_template_ms:.0f} ms for "
        f"{guests.template.stored_bytes / (1 << 20):.0f} MiB.",
        (Target("20 guests of 256 MiB on two processors", f"{lines[-1].values['PSS together, MiB'] / 1024:.1f} GiB."),),
    )  # fmt: skip


def programs(world: World) -> Section:
    """The whole program: prompt to exit."""
    namespace = "cloister run, namespace"
    cases = {
        namespace: world.timed(["cloister", "run", "shell", "--", "true"]),
        "cloister run, microVM from its template": world.timed(["cloister", "run", "warm", "--", "true"]),
        "cloister run, microVM booted": world.timed(["cloister", "run", "cold", "--", "true"]),
    }
    subprocess.run(["cloister", "vm", "warm", "warm"], cwd=world.project, env=world.environment, check=True)
    rows = compare(interleave(cases, PROGRAM_ROUNDS, 1), namespace)
    return Section(
        "A whole run in a microVM", "ms", rows,
        "`cloister run AGENT -- true` from fork to exit: disks made, guest started, self-probe, the command, "
        "changes of the workspace handed back, receipt.",
    )  # fmt: skip


def channel(world: World) -> Grid:
    """Bytes and round trips through shim, keeper, QEMU and the guest's link."""
    start = ["cloister", "vm", "start", "warm", "--", "sleep", "1000"]
    run = subprocess.run(
        start, cwd=world.project, env=world.environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    deadline = time.monotonic() + 60
    ask = ["cloister", "exec", "--no-pty", run, "--"]
    while subprocess.run([*ask, "true"], env=world.environment, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the machine did not come up"
        time.sleep(0.2)
    size = CHANNEL_MIB << 20
    times = [world.timed([*ask, "true"])() for _ in range(10)]
    out = min(_moved([*ask, "head", "-c", str(size), "/dev/zero"], world, None) for _ in range(3))
    into = min(_moved([*ask, "sh", "-c", "cat > /dev/null"], world, size) for _ in range(3))
    subprocess.run(["cloister", "stop", run, "--grace", "1s"], env=world.environment, check=True, capture_output=True)
    lines = [
        Line(f"{CHANNEL_MIB} MiB out of the guest", {"MiB/s": CHANNEL_MIB / out}),
        Line(f"{CHANNEL_MIB} MiB into the guest", {"MiB/s": CHANNEL_MIB / into}),
        Line("`cloister exec RUN -- true`", {"ms": min(times)}),
    ]
    return Grid(
        "The channel", ("MiB/s", "ms"), lines,
        "Through `cloister exec` with pipes: its start is in it. Minimum of three, and of ten. A virtio port alone "
        "carries 226 MB/s out and 207 in on this machine.",
    )  # fmt: skip


def _moved(argv: Sequence[str], world: World, into: int | None) -> float:
    null = subprocess.DEVNULL
    began = time.perf_counter()
    with subprocess.Popen(
        argv, env=world.environment, stdin=null if into is None else subprocess.PIPE, stdout=null, stderr=null
    ) as process:
        if process.stdin is not None and into is not None:
            piece = bytes(1 << 20)
            for _ in range(into >> 20):
                process.stdin.write(piece)
            process.stdin.close()
    assert process.returncode == 0, argv
    return time.perf_counter() - began


def verified(guests: Guests) -> Grid:
    """Opening an image for a run: signature, kernel and initramfs."""
    script = (
        "import os,sys,time\n"
        "from cloister.policy.model import Images\nfrom cloister.runs.images import ImagePlaces, open_for_run\n"
        "where = ImagePlaces(*sys.argv[1:])\n"
        "for _ in range(3):\n"
        " began = time.perf_counter()\n"
        " with open_for_run(where, Images(), 'test', uid=os.getuid()): pass\n"
        " print((time.perf_counter() - began) * 1000)\n"
    )
    argv = [sys.executable, "-c", script, *guests.where]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return Grid(
        "Verifying an image", ("ms",),
        [Line("the first start of a process", {"ms": float(told[0])}), Line("the next", {"ms": float(told[2])})],
        "Signature, kernel and initramfs are verified; the root is, block by block, by the guest's kernel.",
    )  # fmt: skip


def disks(world: World) -> Grid:
    """Filling a workspace disk and handing it back, against tar."""
    tools = disk_tools("/usr/bin/bwrap")
    lines = [_tree(world.home, tools, count) for count in (1_000, 100_000)]
    return Grid(
        "The workspace's disk", ("fill, s", "tar -c, s", "hand back, nothing changed, s", "tar -x, s"), lines,
        "Files of 1 KiB. Filling also makes the file system and its list of what was there; handing back reads the "
        "guest's file system without mounting it and compares all of it with that list.",
    )  # fmt: skip


def _tree(home: Path, tools: Tools, count: int) -> Line:
    tree, image, upper = (home / f"{name}{count}" for name in ("tree", "image", "upper"))
    for index in range(count):
        folder = tree / f"{index // 100:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:06d}.txt").write_bytes(b"some text of a source file\n" * 40)
    owner = {"uid": os.getuid(), "gid": os.getgid()}
    layout = WorkspaceLayout(root=str(tree), mounts=(), placeholders=())
    values = {
        "fill, s": _seconds(lambda: fill(tools, layout, str(image), room_bytes=1 << 28, **owner)),
        "hand back, nothing changed, s": _seconds(lambda: hand_back(tools, str(image), str(upper), root=str(tree))),
        "tar -c, s": _seconds(lambda: subprocess.run(["tar", "-cf", f"{image}.tar", "-C", str(tree), "."], check=True)),
    }
    upper.mkdir(exist_ok=True)
    values["tar -x, s"] = _seconds(lambda: subprocess.run(["tar", "-xf", f"{image}.tar", "-C", str(upper)], check=True))
    for path in (tree, upper):
        shutil.rmtree(path, ignore_errors=True)
    for path in home.glob(f"image{count}*"):
        path.unlink()
    return Line(f"{count:,} files", values)


def beside(world: World) -> Grid:
    """What others wait for meanwhile: requests of another run through the same broker."""
    tools, tree, image = disk_tools("/usr/bin/bwrap"), world.home / "tree", str(world.home / "image")
    for index in range(100_000):
        folder = tree / f"{index // 100:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:06d}.txt").write_bytes(b"some text of a source file\n" * 40)
    layout = WorkspaceLayout(root=str(tree), mounts=(), placeholders=())
    ways = {"nothing": lambda: time.sleep(5)} | {
        f"a fill of 100,000 files, by a {where}": partial(
            work, tools, layout, image, room_bytes=1 << 28, uid=os.getuid(), gid=os.getgid()
        )
        for where, work in (("child", fill), ("thread, as it was", make_workspace_disk))
    }
    lines = []
    for name, way in ways.items():
        took = latencies(world.home, way)
        lines.append(Line(f"meanwhile {name}", {f"{part}, ms": took[int(len(took) * at)] for part, at in _PARTS}))
        drop(image)
    shutil.rmtree(tree, ignore_errors=True)
    return Grid(
        "Another run's requests, while a disk is filled", tuple(f"{part}, ms" for part, _ in _PARTS), lines,
        "Plain HTTP through the relay to a server on loopback, one after the other, each with a connection of its own.",
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
