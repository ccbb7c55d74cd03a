"""Look into another run of the same account, which has the same uid."""

import os
import signal

from cloister.prove.inside.support import Box, read, syscall

ID = "unit-neighbours"
TITLE = "Look into another run of the same account, which has the same uid"
PROMISE = "P-292"
CLASSES = (35, 29, 63, 88)
EXPECT = "other runs are not seen, or only by name: Landlock keeps memory, files and signals apart"
SHAPE = "any"
NEEDS = ("sibling",)
IF_POLICY = ("unit",)
LIFTED_BY = ("hardening.ptrace",)


def attack(box: Box) -> None:
    """Every process in sight that is not of this run, by every door of /proc, and by signals."""
    box.fact("sibling")
    own = _family()
    others = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid not in own]
    for pid in others:
        for name in ("environ", "mem", "maps", "auxv", "stack", "syscall"):
            box.refused(f"{name} of a neighbour", "EACCES EPERM ENOENT ESRCH", _nonempty, f"/proc/{pid}/{name}")
        for name in ("root", "cwd", "fd", "map_files"):
            box.refused(f"{name} of a neighbour", "EACCES EPERM ENOENT ESRCH", os.listdir, f"/proc/{pid}/{name}/")
        for name in ("root/run/cloister/box/egress.sock", "root/tmp/cloister-prove-sibling", "fd/0"):
            box.refused(f"{name} of a neighbour", "EACCES EPERM ENOENT ESRCH", os.stat, f"/proc/{pid}/{name}")
        for name in ("mnt", "net", "pid", "user"):
            box.refused(f"ns/{name} of a neighbour", "EACCES EPERM ENOENT ESRCH", os.readlink, f"/proc/{pid}/ns/{name}")
        for number in (0, signal.SIGCONT):
            box.refused(f"signal {int(number)} to a neighbour", "EPERM ESRCH", os.kill, pid, number)
        for name, words in (("pidfd_getfd", (0, 0)), ("process_vm_readv", (0, 0, 0, 0, 0)), ("ptrace", (0, 0))):
            arguments = (0x10, pid, *words) if name == "ptrace" else (pid, *words)
            box.refused(f"{name} of a neighbour", "EPERM ESRCH ENOSYS EBADF", syscall, name, *arguments)
    box.stopped(f"{len(others)} processes of other runs in sight")
    reached = [pid for pid in _numbers() if pid not in own and _signalled(pid)]
    box.must(not [pid for pid in reached if pid not in _family()], f"signals by number reach {len(reached)} processes")
    for path in (
        "/tmp/cloister-prove-sibling",
        "/dev/shm/cloister-prove-sibling",
        f"{box.home}/cloister-prove-sibling",
    ):
        box.refused(path, "ENOENT EACCES", read, path)


def twin(box: Box) -> None:
    """Its own children are its own: memory, files and signals."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    box.works("its cwd", os.readlink(f"/proc/{child}/cwd") == os.getcwd())
    os.kill(child, signal.SIGKILL)
    box.works("its end", os.waitpid(child, 0)[1] == signal.SIGKILL)


def _numbers() -> range:
    """Return the numbers that processes have: a hidden one can still be named."""
    return range(2, min(int(read("/proc/sys/kernel/pid_max")), 1 << 18))


def _signalled(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _nonempty(path: str) -> str:
    """Read something; what reads as nothing has shown nothing."""
    text = read(path)
    if not text:
        raise PermissionError(13, "nothing to see")
    return text[:20]


def _family() -> set[int]:
    """Return our own ancestors as far as they have our uid, and whatever descends from the oldest of them.

    That is the unit's main process, which may be hidden: killing it ends our own run. A manager in sight is no
    ancestor of ours, or all its services would be family.
    """
    parents, mine = {}, set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(read(f"/proc/{name}/stat", 4000).rpartition(")")[2].split()[1])
            uids = next(line for line in read(f"/proc/{name}/status", 4000).splitlines() if line.startswith("Uid:"))
        except OSError:
            continue
        if uids.split()[1] == str(os.getuid()):
            mine.add(int(name))
    top = os.getpid()
    while parents.get(top) in mine:
        top = parents[top]
    family = {top} if parents.get(top) in parents else {top, parents.get(top, top)}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family
