"""Find a property of the unit that is set and not in force."""

import os
import resource

from cloister.prove.inside.support import Box, syscall, write

ID = "unit-properties"
TITLE = "Find a property of the unit that is set and not in force"
PROMISE = "P-293"
CLASSES = (18, 61, 25, 36)
EXPECT = "the kernel's own words on this process say so: filter, capabilities, namespaces, mounts"
SHAPE = "any"
IF_POLICY = ("unit",)
LIFTED_BY = ("hardening.nested",)

CLOSED = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/net/ipv4/ip_forward", "/.evil",
          "/usr/evil", "/etc/evil", "/opt/evil", "/run/cloister/box/evil", "/.cloister/cloister-shim")  # fmt: skip


def attack(box: Box) -> None:
    """What /proc says of ourselves, which no property can pretend."""
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
    box.must(status["NoNewPrivs"] == "1", f"NoNewPrivs {status['NoNewPrivs']}")
    box.must(status["Seccomp"] == "2", f"Seccomp {status['Seccomp']}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        box.must(int(status[name], 16) == 0, f"{name} {status[name]}")
    box.must(status["Uid"].split() == [str(os.getuid())] * 4, "one uid")
    box.must(resource.getrlimit(resource.RLIMIT_CORE) == (0, 0), "no core files")
    lines = [line.split() for line in open("/proc/self/uid_map")]
    whole = any(int(words[2]) > 1 for words in lines)  # 0 and our own, one each (PrivateUsers=self)
    box.must(not whole, "no uids but ours and root's in the user namespace")
    sockets = [line.split()[-1] for line in open("/proc/self/net/unix") if "/systemd/" in line or "/dbus/" in line]
    box.must(not sockets, f"sockets of the host in our network namespace: {len(sockets)}")
    for words in map(str.split, open("/proc/self/mountinfo")):
        flags = words[5].split(",")
        box.must("nosuid" in flags, f"nosuid: {words[4]}")
        device = words[4] == "/dev" or words[4].startswith("/dev/")
        box.must(device or "nodev" in flags or "ro" in flags or words[4] in _COVERED, f"nodev: {words[4]}")
    for path in ("/sys/fs/cgroup", "/sys/kernel", "/sys/class/net"):
        box.refused(path, "ENOENT EACCES EPERM", os.listdir, path)
    for path in CLOSED:
        box.refused(path, "EROFS EACCES EPERM ENOENT ETXTBSY", write, path)
    # 1 << 28: CLONE_NEWUSER; 1 << 17: CLONE_NEWNS; 1 << 30: CLONE_NEWNET
    for flag in (1 << 28, 1 << 17, 1 << 30):
        box.refused(f"unshare({flag:#x})", "EPERM", syscall, "unshare", flag)


def twin(box: Box) -> None:
    """Devices that programs need are there, and so is room for temporary files."""
    write("/dev/null", "x")
    write("/tmp/twin", "x")  # the unit's own
    os.unlink("/tmp/twin")
    box.works("/dev/urandom", len(open("/dev/urandom", "rb").read(4)) == 4)


_COVERED = ("/run", "/var/tmp")
"""Of systemd 252 one lies below ours that may have devices; nobody inside can make any."""
