"""The doctor's judgement: from host facts to findings, each with what it means and a line to type.

Pure: facts come in, findings go out; the same facts always give the same findings. Taking the
facts is `host/probe.py`, printing is `cli/doctor.py`. What one policy needs from this host is
decided when it is compiled; here stands what any policy could ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from cloister.isolation.seccomp_table import table
from cloister.plan.facts import HostFacts
from cloister.runs import remedies
from cloister.runs.limits import means

State = Literal["ok", "degraded", "missing"]
EVERY_RUN = "every run"
MINIMAL_BWRAP = (0, 5)  # --perms and --file; Debian 12 has 0.8, Ubuntu 22.04 0.6
FULL_LANDLOCK_ABI = 6  # Linux 6.12: signals and abstract sockets too (landlock(7))
OLDEST_SYSTEMD = (252,)  # Debian 12; below it properties are missing that units need
LIMIT_CONTROLLERS = ("memory", "pids", "cpu")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing a host may or may not offer."""

    name: str
    state: State
    """`degraded`: works, with less than one could have. `missing`: what `needed_for` names is refused."""
    needed_for: str
    """`every run`, or the policy key that needs it."""
    meaning: str
    remedy: str = ""
    """What to type or do; empty when there is nothing to do."""


def judge(facts: HostFacts) -> tuple[Finding, ...]:
    """Return all findings in the order in which a reader would mend them."""
    return tuple(check(facts) for check in CHECKS)


def can_run(findings: tuple[Finding, ...]) -> bool:
    """Return whether runs with `isolation = "namespace"` are possible: nothing that every run needs is missing."""
    return not any(finding.state == "missing" and finding.needed_for == EVERY_RUN for finding in findings)


def _bubblewrap(facts: HostFacts) -> Finding:
    def finding(state: State, meaning: str, remedy: str = "") -> Finding:
        return Finding(name="bubblewrap", state=state, needed_for=EVERY_RUN, meaning=meaning, remedy=remedy)

    if not facts.bwrap.path:
        if facts.bwrap.refused:
            meaning = f"{facts.bwrap.refused} is not used: others than root could change it or its directory"
            return finding("missing", meaning, remedies.INSTALL_BWRAP)
        return finding("missing", "bubblewrap is not installed", remedies.INSTALL_BWRAP)
    if (version := _numbers(facts.bwrap.version)) and version < MINIMAL_BWRAP:
        wanted = ".".join(map(str, MINIMAL_BWRAP))
        return finding("missing", f"version {facts.bwrap.version} is older than {wanted}", remedies.INSTALL_BWRAP)
    return finding("ok", f"{facts.bwrap.path} {facts.bwrap.version}".rstrip())


def _helper(facts: HostFacts) -> Finding:
    if facts.shim.path:
        return Finding(name="helper", state="ok", needed_for=EVERY_RUN, meaning=facts.shim.path)
    return Finding(
        name="helper",
        state="missing",
        needed_for=EVERY_RUN,
        meaning="cloister-shim was not built with this installation",
        remedy=remedies.REINSTALL,
    )


def _namespaces(facts: HostFacts) -> Finding:
    """Name the cause, most certain first: a switch that is off, then what the trial ran into."""

    def missing(meaning: str, remedy: str) -> Finding:
        return Finding(name="namespaces", state="missing", needed_for=EVERY_RUN, meaning=meaning, remedy=remedy)

    reason = facts.namespaces.reason
    if facts.namespaces.works == "yes":
        return Finding(name="namespaces", state="ok", needed_for=EVERY_RUN, meaning="a sandbox was made and ran")
    if facts.user_namespaces_max == 0:
        return missing("user.max_user_namespaces is 0: user namespaces are off", remedies.MAX_USER_NAMESPACES)
    if not facts.userns_clone:
        return missing("kernel.unprivileged_userns_clone is 0: user namespaces are off", remedies.USERNS_CLONE)
    if facts.namespaces.works == "unknown":
        return Finding(
            name="namespaces",
            state="degraded",
            needed_for=EVERY_RUN,
            meaning="nothing speaks against it, but nobody tried",
            remedy="cloister doctor",
        )
    if not facts.bwrap.path:
        return missing("cannot be tried without bubblewrap", remedies.INSTALL_BWRAP)
    if facts.apparmor_userns:
        meaning = f"AppArmor takes the rights from user namespaces of programs without a profile ({reason})"
        return missing(meaning, remedies.apparmor_profile("bwrap", facts.bwrap.path))
    if facts.proc_masked and "mount proc" in reason:
        meaning = f"parts of /proc are masked by a container ({', '.join(facts.proc_masked[:3])} …): {reason}"
        return missing(meaning, remedies.UNMASK_PROC)
    if facts.container:
        return missing(f"the {facts.container} container forbids it: {reason}", remedies.CONTAINER)
    return missing(f"bubblewrap failed: {reason}", remedies.RETRY_BWRAP.format(bwrap=facts.bwrap.path))


def _seccomp(facts: HostFacts) -> Finding:
    arches = sorted(table().machines)
    if facts.arch not in arches:
        meaning = f"there is no system call table for {facts.arch}"
        remedy = f"use a machine of {', '.join(arches)}"
    elif not facts.seccomp:
        meaning, remedy = "the kernel loads no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER"
    else:
        return Finding(name="seccomp", state="ok", needed_for=EVERY_RUN, meaning=f"filters for {facts.arch}")
    return Finding(name="seccomp", state="missing", needed_for=EVERY_RUN, meaning=meaning, remedy=remedy)


def _user(facts: HostFacts) -> Finding:
    if facts.uid != 0:
        return Finding(name="user", state="ok", needed_for="a second line of defence", meaning=f"uid {facts.uid}")
    return Finding(
        name="user",
        state="degraded",
        needed_for="a second line of defence",
        meaning="you are root: whoever broke out of a sandbox would be root too",
        remedy="run cloister as an ordinary user",
    )


def _landlock(facts: HostFacts) -> Finding:
    need = 'hardening.landlock = "required"'
    if facts.landlock_abi >= FULL_LANDLOCK_ABI:
        return Finding(name="landlock", state="ok", needed_for=need, meaning=f"ABI {facts.landlock_abi}")
    if facts.landlock_abi > 0:
        meaning = f"ABI {facts.landlock_abi}: files, but not signals and abstract sockets (ABI {FULL_LANDLOCK_ABI})"
        return Finding(name="landlock", state="degraded", needed_for=need, meaning=meaning, remedy=remedies.NEW_KERNEL)
    meaning = "the kernel has no Landlock; runs have one layer less"
    if facts.lsms and "landlock" not in facts.lsms:
        remedy = remedies.LANDLOCK_LSM.format(lsms=",".join(("landlock", *facts.lsms)))
    else:
        remedy = remedies.NEW_KERNEL
    return Finding(name="landlock", state="missing", needed_for=need, meaning=meaning, remedy=remedy)


def _limits(facts: HostFacts) -> Finding:
    def finding(state: State, meaning: str, remedy: str = "") -> Finding:
        need = 'limits.enforce = "cgroup"'
        return Finding(name="limits", state=state, needed_for=need, meaning=meaning, remedy=remedy)

    way = means(facts)
    place = "scopes of the systemd manager" if way.by == "scope" else f"cgroups in {way.base}"
    lacking = [name for name in LIMIT_CONTROLLERS if name not in way.controllers]
    if not lacking:
        return finding("ok", place)
    fallback = "memory and tasks are limited per process (rlimits), cpu_quota is refused"
    if facts.cgroup.layout in {"hybrid", "legacy"}:
        return finding("missing", f"the cgroup layout is {facts.cgroup.layout}; {fallback}", remedies.UNIFIED_CGROUPS)
    if way.by:
        remedy = remedies.DELEGATE if way.by == "scope" else remedies.CONTAINER_CGROUP
        state: State = "degraded" if lacking == ["cpu"] else "missing"
        return finding(state, f"{place}, without {', '.join(lacking)}: a limit that needs it has no cgroup", remedy)
    if facts.systemd_booted:
        return finding("missing", f"no systemd manager of this user runs; {fallback}", remedies.LINGER)
    return finding("missing", f"no cgroup is to be had; {fallback}", remedies.CONTAINER_CGROUP)


def _overlay(facts: HostFacts) -> Finding:
    need = 'workspace.mode = "overlay"'
    if facts.overlay.works == "yes":
        return Finding(name="overlay", state="ok", needed_for=need, meaning="mounted in a user namespace")
    if facts.overlay.works == "unknown":
        return Finding(
            name="overlay", state="degraded", needed_for=need, meaning="nobody tried", remedy="cloister doctor"
        )
    remedy = remedies.NEW_KERNEL_OVERLAY
    if facts.apparmor_userns:
        remedy = remedies.apparmor_profile("cloister-shim", facts.shim.path or "/path/to/cloister-shim")
    return Finding(name="overlay", state="missing", needed_for=need, meaning=facts.overlay.reason, remedy=remedy)


def _internet(facts: HostFacts) -> Finding:
    need = 'egress.mode = "internet"'
    lacking = [name for name, program in (("pasta", facts.pasta), ("nft", facts.nft)) if not program.path]
    if not lacking and not facts.tun:
        meaning = "you may not open /dev/net/tun, with which pasta makes its tap device"
        return Finding(name="internet", state="missing", needed_for=need, meaning=meaning, remedy=remedies.TUN)
    if not lacking:
        return Finding(name="internet", state="ok", needed_for=need, meaning=f"{facts.pasta.path}, {facts.nft.path}")
    return Finding(
        name="internet",
        state="missing",
        needed_for=need,
        meaning=f"{' and '.join(lacking)} not installed; the other modes of egress need neither",
        remedy=remedies.INSTALL_INTERNET,
    )


def _systemd(facts: HostFacts) -> Finding:
    need = 'isolation = "unit"'
    if facts.systemd_booted:
        meaning = f"systemd {facts.systemd.version}".rstrip()
        if (version := _numbers(facts.systemd.version)) and version < OLDEST_SYSTEMD:
            meaning += f" is older than {OLDEST_SYSTEMD[0]}"
            return Finding(
                name="systemd", state="missing", needed_for=need, meaning=meaning, remedy=remedies.NEW_SYSTEMD
            )
        return Finding(name="systemd", state="ok", needed_for=need, meaning=meaning)
    meaning = f"the service manager is {facts.pid1 or 'unknown'}, not systemd"
    return Finding(name="systemd", state="missing", needed_for=need, meaning=meaning, remedy=remedies.BOOT_SYSTEMD)


def _btf(facts: HostFacts) -> Finding:
    need = "audit of system calls"
    if facts.btf:
        return Finding(name="btf", state="ok", needed_for=need, meaning="/sys/kernel/btf/vmlinux")
    meaning = "the kernel does not describe its types"
    return Finding(name="btf", state="missing", needed_for=need, meaning=meaning, remedy=remedies.BTF)


def _kvm(facts: HostFacts) -> Finding:
    need = 'isolation = "microvm" at full speed'
    if facts.kvm.works == "yes":
        return Finding(name="kvm", state="ok", needed_for=need, meaning="a guest ran and halted")
    if facts.kvm.works == "unknown":
        return Finding(name="kvm", state="degraded", needed_for=need, meaning="nobody tried", remedy="cloister doctor")
    remedy = remedies.KVM_GROUP if "Permission denied" in facts.kvm.reason else remedies.KVM_MACHINE
    meaning = f"{facts.kvm.reason}; guests would be emulated"
    return Finding(name="kvm", state="missing", needed_for=need, meaning=meaning, remedy=remedy)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


CHECKS: tuple[Callable[[HostFacts], Finding], ...] = (
    _bubblewrap, _helper, _namespaces, _seccomp, _user, _landlock, _limits, _overlay, _internet, _systemd, _btf, _kvm,
)  # fmt: skip
