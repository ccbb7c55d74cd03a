"""Directories that change while root looks: alice swaps names as fast as the kernel lets her, a hundred thousand times.

The function under attack is hostd's own, called as hostd calls it, as root, on descriptors that alice opened. It may
refuse, or return her project; anything else it ever opened would be mounted into her agent's sandbox.
"""

import json
import subprocess

import pytest

from support.machines import PYTHON, Machine

TRIES = 100_000

# A name and another one are exchanged at once: renameat2(2), RENAME_EXCHANGE.
SWAP = """
import ctypes, itertools, sys
libc = ctypes.CDLL(None, use_errno=True)
first, second = (name.encode() for name in sys.argv[1:3])
for count in itertools.count(1):
    if libc.renameat2(-100, first, -100, second, 2):
        sys.exit(f"swapping failed: {ctypes.get_errno()}")
    if count % 1000 == 0:
        print(count, flush=True)
"""

ASK = """
import collections, json, os, sys, time
from cloister.errors import CloisterError
from cloister.host.unit_caller import Caller
from cloister.host.unit_grants import open_place
from cloister.plan.unit import Grant

tries, own, inside = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
alice = Caller(1000, 1000, 1, "alice", "/home/alice", (1000,))
grant = Grant(user="alice", agent="pi", account="cl-pi-alice", roots=("~/race/granted",))
told = collections.Counter(granted=0)
def sent(name, number):
    # What alice sends is hers, whatever she does to its name meanwhile.
    while True:
        try:
            found = os.open(f"/home/alice/race/granted/{name}", os.O_PATH)
        except OSError:
            continue
        if os.fstat(found).st_ino == number:
            return found
        os.close(found)

workspace, directory = sent("project", own), sent("project/inside", inside)
for _ in range(tries):
    try:
        place = open_place(alice, grant, workspace, directory)
    except CloisterError as error:
        told[error.reference] += 1
    else:
        found = os.fstat(place.workspace).st_ino, os.fstat(place.directory).st_ino
        told["granted" if found == (own, inside) else f"BREACH {found}"] += 1
        os.close(place.workspace), os.close(place.directory)
    assert os.geteuid() == 0
print(json.dumps(told), len(os.listdir("/proc/self/fd")))
"""

TARGETS = {
    # What is exchanged with what, below ~/race; `decoy` leads, or is, where she has no business.
    "the project and a link to bob's": ("granted/project", "granted/decoy", "/srv/race/bobs"),
    "the project and a link to root's": ("granted/project", "granted/decoy", "/root"),
    "the root itself and a link": ("granted", "decoy", "/srv/race"),
    "the directory inside and a link": ("granted/project/inside", "granted/project/decoy", "/srv/race/bobs"),
    "the project and a directory of the same names": ("granted/project", "granted/other", ""),
}


@pytest.mark.parametrize("suite", ["trixie"], indirect=True)  # it is the kernel's work, and both have the same
@pytest.mark.parametrize("case", TARGETS)
def test_a_swapped_directory_is_never_granted(machine: Machine, case: str) -> None:
    """Whatever alice swaps meanwhile, what root holds in the end is her project, or nothing. Quiet, it is granted."""
    first, second, target = TARGETS[case]
    machine.run(["rm", "-rf", "/home/alice/race", "/srv/race"])
    machine.run(["sh", "-c", "mkdir -p race/granted/project/inside race/granted/other/inside"], user="alice")
    machine.run(["sh", "-c", "mkdir -p /srv/race/bobs/inside /srv/race/project/inside; chown -R bob /srv/race/bobs"])
    if target:
        machine.run(["ln", "-s", target, f"race/{second}"], user="alice")
    project = machine.path("/home/alice/race/granted/project")
    own, inside = project.stat().st_ino, (project / "inside").stat().st_ino

    def ask(tries: int) -> dict[str, int]:
        done = machine.python(ASK, str(tries), str(own), str(inside), timeout=110).stdout
        told, descriptors = done.rsplit(maxsplit=1)
        assert int(descriptors) < 12, "descriptors are left open"
        return dict(json.loads(told))

    assert ask(10) == {"granted": 10}
    names = [f"/home/alice/race/{name}" for name in (first, second)]
    swapper = machine.popen([PYTHON, "-c", SWAP, *names], user="alice", stdout=subprocess.PIPE, text=True)
    try:
        assert swapper.stdout
        swapper.stdout.readline()
        told = ask(TRIES // len(TARGETS))
    finally:
        swapper.kill()
        swaps = int(swapper.stdout.read().split()[-1])
        swapper.wait()
        swapper.stdout.close()

    assert not [reference for reference in told if reference.startswith("BREACH")], told
    assert swaps >= TRIES, "the attack was too slow to mean anything"
    assert told["granted"] > 0, told
    assert sum(told.values()) - told["granted"] > 0, "no try met the other name"
