"""Every finding of the doctor, from made-up facts: what is good, what is not, and what to type."""

from __future__ import annotations

import msgspec
import pytest

from cloister.plan.facts import Cgroup, HostFacts, Program, Trial
from cloister.runs.doctor import EVERY_RUN, can_run, judge

YES, NO = Trial(works="yes"), Trial(works="no", reason="bwrap: Operation not permitted")
GOOD = HostFacts(
    kernel="6.18.0",
    arch="x86_64",
    uid=1000,
    bwrap=Program(path="/usr/bin/bwrap", version="0.8.0"),
    shim=Program(path="/opt/cloister-shim"),
    pasta=Program(path="/usr/bin/pasta"),
    nft=Program(path="/usr/sbin/nft"),
    tun=True,
    systemd=Program(path="/usr/bin/systemctl", version="257"),
    systemd_booted=True,
    systemd_user=True,
    pid1="systemd",
    namespaces=YES,
    user_namespaces_max=30000,
    seccomp=True,
    landlock_abi=7,
    lsms=("lockdown", "landlock", "apparmor"),
    cgroup=Cgroup(layout="unified", path="/sys/fs/cgroup/x", manager=("cpu", "memory", "pids")),
    overlay=YES,
    btf=True,
    kvm=YES,
)


def finding(name, **changes):
    """Return one finding of the good host with some facts changed."""
    return next(each for each in judge(msgspec.structs.replace(GOOD, **changes)) if each.name == name)


def test_a_good_host_has_nothing_to_mend():
    """Where all is there, every finding is ok, none has a remedy, and agents can run."""
    findings = judge(GOOD)
    assert {each.state for each in findings} == {"ok"}
    assert {each.remedy for each in findings} == {""}
    assert can_run(findings)


MISSING_FOR_EVERY_RUN = {
    "no bubblewrap": ("bubblewrap", {"bwrap": Program()}, "apt-get install bubblewrap"),
    "old bubblewrap": ("bubblewrap", {"bwrap": Program(path="/usr/bin/bwrap", version="0.4.1")}, "bubblewrap"),
    "planted bubblewrap": ("bubblewrap", {"bwrap": Program(refused="/home/a/bin/bwrap")}, "bubblewrap"),
    "no helper": ("helper", {"shim": Program()}, "gcc"),
    "userns counted out": ("namespaces", {"namespaces": NO, "user_namespaces_max": 0}, "user.max_user_namespaces="),
    "userns off": ("namespaces", {"namespaces": NO, "userns_clone": False}, "unprivileged_userns_clone=1"),
    "AppArmor": ("namespaces", {"namespaces": NO, "apparmor_userns": True}, "apparmor_parser -r"),
    "masked proc": (
        "namespaces",
        {
            "namespaces": Trial(works="no", reason="bwrap: Can't mount proc on /newroot/proc"),
            "proc_masked": ("/proc/kcore",),
        },
        "systempaths=unconfined",
    ),
    "container": ("namespaces", {"namespaces": NO, "container": "docker"}, "docker run"),
    "unknown cause": ("namespaces", {"namespaces": NO}, "/usr/bin/bwrap --unshare-all"),
    "no seccomp": ("seccomp", {"seccomp": False}, "CONFIG_SECCOMP_FILTER"),
    "no table": ("seccomp", {"arch": "s390x"}, "x86_64"),
}


@pytest.mark.parametrize("case", MISSING_FOR_EVERY_RUN)
def test_what_every_run_needs_stops_every_run(case):
    """Each of these is missing, has the remedy of its cause, and is reason enough for exit status 69."""
    name, changes, remedy = MISSING_FOR_EVERY_RUN[case]
    found = finding(name, **changes)
    assert (found.state, found.needed_for) == ("missing", EVERY_RUN)
    assert remedy in found.remedy
    assert not can_run(judge(msgspec.structs.replace(GOOD, **changes)))


OPTIONAL = {
    "root": ("user", {"uid": 0}, "degraded", "ordinary user"),
    "no Landlock": ("landlock", {"landlock_abi": 0, "lsms": ()}, "missing", "Linux 6.12"),
    "Landlock off": ("landlock", {"landlock_abi": 0, "lsms": ("yama",)}, "missing", "lsm=landlock,yama"),
    "old Landlock": ("landlock", {"landlock_abi": 3}, "degraded", "Linux 6.12"),
    "hybrid cgroups": ("limits", {"cgroup": Cgroup(layout="hybrid")}, "missing", "unified_cgroup_hierarchy=1"),
    "no manager": ("limits", {"cgroup": Cgroup(layout="unified", path="/x")}, "missing", "enable-linger"),
    "no way to a cgroup": (
        "limits",
        {"cgroup": Cgroup(), "systemd_booted": False},
        "missing",
        "cgroup.subtree_control",
    ),
    "no memory controller": (
        "limits",
        {"cgroup": Cgroup(layout="unified", manager=("pids", "cpu"))},
        "missing",
        "Delegate=cpu memory pids",
    ),
    "no cpu controller": (
        "limits",
        {"cgroup": Cgroup(layout="unified", manager=("pids", "memory"))},
        "degraded",
        "Delegate=cpu",
    ),
    "no overlay": ("overlay", {"overlay": NO}, "missing", "modprobe overlay"),
    "overlay and AppArmor": ("overlay", {"overlay": NO, "apparmor_userns": True}, "missing", '"/opt/cloister-shim"'),
    "overlay not tried": ("overlay", {"overlay": Trial()}, "degraded", "cloister doctor"),
    "no pasta": ("internet", {"pasta": Program()}, "missing", "passt"),
    "no nft": ("internet", {"nft": Program()}, "missing", "nftables"),
    "no tap devices": ("internet", {"tun": False}, "missing", "/dev/net/tun"),
    "no systemd": ("systemd", {"systemd_booted": False, "pid1": "tini"}, "missing", "booted with systemd"),
    "no BTF": ("btf", {"btf": False}, "missing", "CONFIG_DEBUG_INFO_BTF"),
    "emulated KVM": ("kvm", {"kvm": Trial(works="no", reason="it is emulated")}, "missing", "nested"),
    "KVM of others": ("kvm", {"kvm": Trial(works="no", reason="Permission denied")}, "missing", "usermod -aG kvm"),
    "KVM not tried": ("kvm", {"kvm": Trial()}, "degraded", "cloister doctor"),
    "namespaces not tried": ("namespaces", {"namespaces": Trial()}, "degraded", "cloister doctor"),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_what_some_policies_need_does_not_stop_the_others(case):
    """Each of these is told with its remedy, and agents can run all the same."""
    name, changes, state, remedy = OPTIONAL[case]
    found = finding(name, **changes)
    assert found.state == state
    assert remedy in found.remedy
    assert can_run(judge(msgspec.structs.replace(GOOD, **changes)))


def test_every_finding_that_is_not_ok_says_what_to_do():
    """A host where nothing works gets a line to type or do for each finding, on one line."""
    bare = HostFacts(kernel="5.4", arch="x86_64", uid=0)
    for each in judge(bare):
        assert each.state != "ok"
        assert each.remedy
        assert "\n" not in each.remedy


def test_a_cause_is_named_before_a_symptom():
    """With user namespaces switched off, the trial's own error does not send the reader elsewhere."""
    found = finding("namespaces", namespaces=NO, user_namespaces_max=0, apparmor_userns=True, container="docker")
    assert "max_user_namespaces" in found.meaning


def test_the_apparmor_remedy_survives_odd_paths():
    """A path with a quote or a percent sign is data to the shell and to printf."""
    found = finding("overlay", overlay=NO, apparmor_userns=True, shim=Program(path="/a b'%s/cloister-shim"))
    assert found.remedy.startswith("printf '%s\\n' ")
    assert "'\"'\"'" in found.remedy
