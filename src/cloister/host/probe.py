"""Learn the facts of this host. Reads, asks and tries; changes nothing and judges nothing.

`probe` only reads files and asks the kernel: it never starts a program and takes a few hundred
microseconds, so every compilation may call it. `probe_deep` also does what a run would do, once,
in processes of their own with a time limit; it is for `cloister doctor`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cloister.host import programs
from cloister.host.kernel_features import landlock_abi, seccomp_errno
from cloister.host.mounts import cgroup_of, proc_masks
from cloister.host.systemd_manager import private_socket
from cloister.plan.facts import Cgroup, HostFacts, Program, Trial

SHIM = Path(__file__).parent / "shim" / "cloister-shim"
TRIAL = Path(__file__).with_name("trial.py")
SYSTEM_NAMES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "opt", "nix", "gnu", "run", "var")
TRIAL_LIMIT_S = 5.0
# What a run has: every namespace, a fresh /proc, and a network namespace whose loopback comes up.
NAMESPACE_TRIAL = ("--unshare-all", "--unshare-user", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev")
VERSION = re.compile(r"\d[\w.~-]*")


def probe() -> HostFacts:
    """Return what can be known without starting anything. Trials and versions stay unknown."""
    name = os.uname()
    search = os.environ.get("PATH", "")
    links, directories = _root_layout()
    mounts = _read("/proc/self/mountinfo")
    return HostFacts(
        kernel=name.release,
        arch=name.machine,
        uid=os.geteuid(),
        bwrap=programs.find("bwrap", search),
        shim=Program(path=str(SHIM)) if os.access(SHIM, os.X_OK) else Program(),
        pasta=programs.find("pasta", search),
        nft=programs.find("nft", search),
        tun=os.access("/dev/net/tun", os.R_OK | os.W_OK, effective_ids=True),
        systemd=programs.find("systemctl", search),
        systemd_booted=os.path.isdir("/run/systemd/system"),
        systemd_user=os.path.exists(private_socket(os.geteuid())),
        pid1=_read("/proc/1/comm").strip(),
        container=_container(),
        user_namespaces_max=int(_read("/proc/sys/user/max_user_namespaces") or 0),
        userns_clone=_read("/proc/sys/kernel/unprivileged_userns_clone").strip() != "0",
        apparmor_userns=_read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1",
        proc_masked=proc_masks(mounts),
        seccomp=seccomp_errno(name.machine),
        landlock_abi=landlock_abi(),
        lsms=tuple(filter(None, _read("/sys/kernel/security/lsm").strip().split(","))),
        cgroup=_cgroup(mounts),
        btf=os.access("/sys/kernel/btf/vmlinux", os.R_OK),
        root_links=links,
        root_directories=directories,
    )


def probe_deep() -> HostFacts:
    """Return the facts of `probe` and those that need trying: namespaces, overlay, KVM, program versions."""
    facts = probe()
    return msgspec.structs.replace(
        facts,
        bwrap=_with_version(facts.bwrap),
        pasta=_with_version(facts.pasta),
        nft=_with_version(facts.nft),
        systemd=_with_version(facts.systemd),
        namespaces=_try_namespaces(facts.bwrap.path),
        overlay=_try("overlay"),
        kvm=_try("kvm") if os.path.exists("/dev/kvm") else Trial(works="no", reason="no /dev/kvm"),
    )


def can_hold(shim: str) -> bool:
    """Try whether the outer shim can mount in a user namespace of its own (a millisecond)."""
    # PRIVILEGE: none beyond the caller's; what it mounts ends with it.
    return _run([shim, "trial"])[0] == 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _container() -> str:
    marks = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
    for path, name in marks.items():
        if os.path.exists(path):
            return name
    return _read("/run/systemd/container").strip()


def _cgroup(mounts: str) -> Cgroup:
    """Find a place for cgroups of ours: our own one or, where controllers are on for its children, the one above.

    Our own can only be one of the kernel's root: elsewhere a cgroup with processes in it cannot hand controllers
    down (cgroup-v2.rst, "No Internal Process Constraint").
    """
    found = cgroup_of(mounts, _read("/proc/self/cgroup"))
    places = (found.path, os.path.dirname(found.path)) if found.path else ()
    base = next((place for place in places if _may_make_cgroups(place)), "")
    return msgspec.structs.replace(
        found,
        base=base,
        controllers=tuple(_read(f"{base}/cgroup.subtree_control").split()) if base else (),
        manager=_manager_controllers() if found.layout == "unified" else (),
    )


def _may_make_cgroups(place: str) -> bool:
    """Return whether cgroups made in `place` have controllers, and processes may be moved between them."""
    names = ("", "/cgroup.procs", "/cgroup.subtree_control")
    writable = all(os.access(f"{place}{name}", os.W_OK, effective_ids=True) for name in names)
    return writable and bool(_read(f"{place}/cgroup.subtree_control").split())


def _manager_controllers() -> tuple[str, ...]:
    """Return what our systemd manager can limit; the paths are systemd's own (org.freedesktop.systemd1(5))."""
    uid = os.geteuid()
    if not os.access(private_socket(uid), os.W_OK, effective_ids=True):
        return ()
    place = f"user.slice/user-{uid}.slice/user@{uid}.service/" if uid else ""
    return tuple(_read(f"/sys/fs/cgroup/{place}cgroup.controllers").split())


def _root_layout() -> tuple[dict[str, str], tuple[str, ...]]:
    links, directories = {}, []
    for name in SYSTEM_NAMES:
        path = Path("/", name)
        if path.is_symlink():
            links[name] = str(path.readlink())
        elif path.is_dir():
            directories.append(name)
    return links, tuple(directories)


def _with_version(program: Program) -> Program:
    if not program.path:
        return program
    # PRIVILEGE: none beyond the caller's; the program is one `programs.find` trusts.
    status, output = _run([program.path, "--version"])
    found = VERSION.search(output.partition("\n")[0]) if status == 0 else None
    return msgspec.structs.replace(program, version=found.group() if found else "")


def _try_namespaces(bwrap: str) -> Trial:
    if not bwrap:
        return Trial(works="no", reason="bubblewrap is not installed")
    # /proc/self/exe is bubblewrap itself until it executes: the one program sure to be there.
    status, output = _run([bwrap, *NAMESPACE_TRIAL, "--proc", "/proc", "--", "/proc/self/exe", "--version"])
    return Trial(works="yes") if status == 0 else Trial(works="no", reason=output.strip() or f"exit status {status}")


def _try(name: str) -> Trial:
    status, output = _run([sys.executable, "-I", str(TRIAL), name])
    answer, _, reason = output.strip().partition(": ")
    if status != 0 or answer not in {"yes", "no"}:
        return Trial(works="no", reason=f"the trial did not end well: {output.strip() or status}")
    return Trial(works="yes" if answer == "yes" else "no", reason=reason)


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Return exit status and first output; 124 after the time limit, as timeout(1) has it."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TRIAL_LIMIT_S,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": os.environ.get("HOME", "")},
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {TRIAL_LIMIT_S:.0f} s"
    except OSError as error:
        return 126, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace")[:2000]
