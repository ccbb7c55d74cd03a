"""The doctor's judgement of `isolation = "unit"`: from facts to findings, each with a line to type. Pure."""

from __future__ import annotations

from cloister.plan.system_facts import UnitFacts
from cloister.runs import remedies
from cloister.runs.doctor import Finding, State

NEED = 'isolation = "unit"'


def judge_units(facts: UnitFacts) -> tuple[Finding, ...]:
    """Return the findings in the order in which a reader would mend them; none where systemd does not run.

    That it does, and in which version, is one of `doctor.judge`.
    """
    if not facts.systemd_booted:
        return ()
    return (_addresses(facts), _idmap(facts), _filter(facts), _hostd(facts), *_bridge(facts), _kernel_events(facts))


def _finding(name: str, state: State, meaning: str, remedy: str = "") -> Finding:
    return Finding(name=name, state=state, needed_for=NEED, meaning=meaning, remedy=remedy)


def _addresses(facts: UnitFacts) -> Finding:
    """IPAddressDeny= needs programs on cgroups (v2): without them systemd only writes a line into the journal."""
    if facts.cgroup_layout in {"unified", "hybrid"}:
        meaning = f"cgroup v2 ({facts.cgroup_layout}): systemd can filter addresses, the third layer"
        return _finding("unit-addresses", "ok", meaning)
    meaning = "no cgroup v2: IPAddressDeny= has no effect; the empty network and the packet filter remain"
    return _finding("unit-addresses", "degraded", meaning, remedies.UNIFIED_CGROUPS)


def _idmap(facts: UnitFacts) -> Finding:
    if facts.idmapped:
        return _finding(
            "idmapped-mounts", "ok", f"Linux {facts.kernel}; the workspace's file system must have them too"
        )
    meaning = f"Linux {facts.kernel} has none (5.12 has): files of agents cannot become the user's by themselves"
    return _finding("idmapped-mounts", "degraded", meaning, '[agents.X.unit] ownership = "group"')


def _filter(facts: UnitFacts) -> Finding:
    if not facts.nft:
        return _finding("unit-firewall", "missing", "nft is not installed", "apt install nftables")
    if facts.hostd_there and not facts.firewall_loaded:
        meaning = "no packet filter is installed: no account needs one yet, or it was taken away"
        return _finding("unit-firewall", "degraded", meaning, "sudo cloister apply")
    return _finding("unit-firewall", "ok", facts.nft)


def _hostd(facts: UnitFacts) -> Finding:
    if not facts.hostd_there:
        return _finding("hostd", "missing", "it is not installed in this system", "sudo cloister setup")
    if facts.hostd_answers == "no":
        return _finding("hostd", "missing", "it does not answer", "systemctl status cloister-hostd.socket")
    meaning = "it answers" if facts.hostd_answers == "yes" else "its socket is there; nobody asked"
    return _finding("hostd", "ok" if facts.hostd_answers == "yes" else "degraded", meaning)


def _bridge(facts: UnitFacts) -> tuple[Finding, ...]:
    if not facts.bridge:
        return ()
    state: State = "degraded" if facts.bridge_moved else "ok"
    remedy = '[microvm] bridge = "ANOTHER/24", then: sudo cloister apply' if facts.bridge_moved else ""
    need = 'microvm.network = "bridge"'
    return (Finding(name="microvm-bridge", state=state, needed_for=need, meaning=facts.bridge, remedy=remedy),)


def _kernel_events(facts: UnitFacts) -> Finding:
    if facts.no_kernel_events:
        meaning = f"{facts.no_kernel_events}: the audit has no kernel events; lifecycle, egress and model calls remain"
        return _finding("kernel-events", "degraded", meaning, "apt install libbpf1 clang llvm libbpf-dev; make install")
    meaning = "programs can be loaded; what each sees here is told by: cloister audit query --kind log.tier"
    return _finding("kernel-events", "ok", meaning)
