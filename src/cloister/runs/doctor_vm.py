"""What the doctor says about `isolation = "microvm"`: the monitors, what accelerates them, and the tools around them.

Unless it shall be quick it boots the guest of an image, verified as for a run, and says how long that took: on a host
whose /dev/kvm opens and boots nothing, only a boot tells. The judgement on the rest of the host is `doctor`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from cloister.errors import CloisterError, UnsupportedError
from cloister.host import firecracker_probe, programs, vm_probe
from cloister.isolation import firecracker_api
from cloister.policy.model import Images
from cloister.runs import remedies, vm_monitor
from cloister.runs.doctor import Finding, State
from cloister.runs.images import open_for_run, places, stores
from cloister.runs.paths import Paths
from cloister.runs.policies import PolicyFiles
from cloister.runs.vm_accelerator import Guest, accelerator, boot_time

NEED = 'isolation = "microvm"'
FIRECRACKER = 'microvm.monitor = "firecracker"'
BUILD = "cloister image build"
_DISK_TOOLS = ("mke2fs", "debugfs", "e2fsck", "resize2fs", "prlimit")
_IMAGE_TOOLS = ("mmdebstrap", "mkfs.erofs")
_QEMU = "qemu-system-x86_64"


def vm_findings(paths: Paths, environment: Mapping[str, str], *, quick: bool) -> tuple[Finding, ...]:
    """Return the findings, in the order in which a reader would mend them.

    Args:
        paths: this user's places.
        environment: of this process.
        quick: boot nothing.
    """
    search = environment.get("PATH", "")
    qemu = programs.find(_QEMU, search)
    if not qemu.path:
        meaning = f"{qemu.refused} is not used: others than root could change it" if qemu.refused else "no QEMU"
        found = [_finding("microvm-monitor", "missing", meaning, remedies.INSTALL_QEMU)]
    else:
        found = [_finding("microvm-monitor", "ok", qemu.path), _boots(qemu.path, paths, environment, quick=quick)]
    found.append(_firecracker(paths, environment, quick=quick))
    found.append(_tools("microvm-disks", NEED, _DISK_TOOLS, search, remedies.INSTALL_DISK_TOOLS))
    found.append(_tools("image-tools", BUILD, _IMAGE_TOOLS, search, remedies.INSTALL_IMAGE_TOOLS))
    return tuple(found)


def _finding(name: str, state: State, meaning: str, remedy: str = "", need: str = NEED) -> Finding:
    return Finding(name=name, state=state, needed_for=need, meaning=meaning, remedy=remedy)


def _tools(name: str, need: str, wanted: tuple[str, ...], search: str, remedy: str) -> Finding:
    missing = [tool for tool in wanted if not programs.find(tool, search).path]
    if missing:
        return _finding(name, "missing", f"not installed: {', '.join(missing)}", remedy, need)
    return _finding(name, "ok", ", ".join(wanted), need=need)


def _boots(qemu: str, paths: Paths, environment: Mapping[str, str], *, quick: bool) -> Finding:
    """Boot a guest, by whichever accelerator a run would get."""
    name = "microvm-boot"
    if quick:
        return _finding(name, "degraded", "nobody tried", "cloister doctor")
    for guest in _guests(paths, environment):
        verdict = accelerator(qemu, guest, paths.runtime)
        heard = boot_time(qemu, guest, verdict.accelerator)
        if not heard.seconds:
            return _finding(name, "missing", heard.why, remedies.INSTALL_QEMU)
        came = f"a guest came up in {heard.seconds:.2f} s"
        if verdict.accelerator == "kvm":
            return _finding(name, "ok", f"{came}, by KVM")
        return _finding(name, "degraded", f"{came}, emulated: {verdict.why}", remedies.KVM_MACHINE)
    return _finding(name, "degraded", "nobody tried: there is no image that may be used", remedies.FIRST_IMAGE)


def _firecracker(paths: Paths, environment: Mapping[str, str], *, quick: bool) -> Finding:
    """Say whether there is a Firecracker that a run could have, which one, and why not: it has no emulation."""

    def finding(state: State, meaning: str, remedy: str = "") -> Finding:
        return _finding("microvm-firecracker", state, meaning, remedy, need=FIRECRACKER)

    search = environment.get("PATH", "")
    program = vm_monitor.find(search, owner=os.geteuid())
    if not program:
        if other := vm_monitor.passed_over(search, owner=os.geteuid()):
            meaning = f"{other} is not used: others than you and root could change it"
            return finding("missing", meaning, remedies.OWN_FIRECRACKER)
        return finding("missing", "not installed; guests run in QEMU", remedies.INSTALL_FIRECRACKER)
    try:
        said = firecracker_probe.ask_version(program)
        version = firecracker_api.name(firecracker_api.parse_version(said))
    except UnsupportedError as error:
        return finding("missing", f"{program}: {error.message}", error.remedy)
    about = f"{program} {version}"
    if why := vm_probe.why_not_kvm():
        return finding("missing", f"{about} cannot run without KVM: {why}", remedies.KVM_MACHINE)
    if quick:
        return finding("degraded", f"{about}: nobody tried", "cloister doctor")
    for guest in _guests(paths, environment):
        verdict = firecracker_probe.try_boot(program, guest.kernel, guest.initramfs)
        if not verdict.seconds:
            return finding("missing", f"{about} boots no guest here: {verdict.why}", remedies.KVM_MACHINE)
        return finding("ok", f"{about}: a guest came up in {verdict.seconds:.2f} s")
    return finding("degraded", f"{about}: nobody tried, there is no image that may be used", remedies.FIRST_IMAGE)


def _guests(paths: Paths, environment: Mapping[str, str]) -> Iterator[Guest]:
    """Yield what a run could boot: newest versions, opened and verified; closed when the next one is asked for."""
    policy = _image_policy(paths)
    where = places(environment, paths, policy)
    names = dict.fromkeys(name for store in stores(where) for name in store.names())
    for name in names:
        try:
            opened = open_for_run(where, policy, name, uid=os.getuid())
        except (CloisterError, OSError):
            continue  # `cloister image list` says what is wrong with it
        with opened:
            # By descriptor: what was verified is what boots.
            own = f"/proc/{os.getpid()}/fd"
            yield Guest(f"{own}/{opened.kernel}", f"{own}/{opened.initramfs}", opened.manifest.digest())


def _image_policy(paths: Paths) -> Images:
    try:
        return PolicyFiles(paths, os.getuid()).images()
    except CloisterError:
        return Images()
