"""A plan as text for people and as JSON for machines. Changes nothing, decides nothing."""

from __future__ import annotations

import shlex

import msgspec

from cloister.plan.steps import Launch, Placeholders, Plan
from cloister.plan.unit import UnitLaunch
from cloister.plan.vm import FIRST_FILE, VmLaunch


def as_json(plan: Plan) -> bytes:
    """Return the plan as indented JSON, keys in order: what `cloister plan --json` prints and goldens compare."""
    return msgspec.json.format(msgspec.json.encode(plan.recorded(), order="sorted"), indent=2) + b"\n"


def as_text(plan: Plan) -> str:
    """Return the plan as the page that `cloister plan` prints: steps, mounts, environment names, egress."""
    launch = plan.launch
    lines = [
        f"run {plan.run}: {plan.agent}" + (f" (preset {plan.preset})" if plan.preset else ""),
        f"isolation  {plan.isolation}",
        f"workspace  {plan.workspace}",
        f"policy     {plan.policy_digest[:16]}",
        f"plan       {plan.digest()[:16]}",
        "",
        "steps",
    ]
    for number, step in enumerate(plan.steps, 1):
        lines.append(f"  {number:>2}  {step.describe()}")
        if isinstance(step, Placeholders):
            lines += [f"        {point.kind:<9} {point.base}/{point.name}" for point in step.points]
    lines += _section("held before the sandbox is built", tuple(hold.describe() for hold in launch.holds))
    lines += _unit(launch.unit, launch.pasta)
    lines += _guest(launch.vm)
    lines += ["", "sandbox", *_wrapped_argv(launch)]
    lines += ["", "environment", *(f"  {name}" for name in sorted(_names(plan)))]
    lines += _section("egress", plan.egress or ("nothing is reachable",))
    lines += _section("credentials", tuple(credential.describe() for credential in plan.credentials))
    lines += _section("models", plan.models)
    lines += _section("limits", plan.limits or ("none",))
    lines += _section("opt-outs", plan.opt_outs)
    lines += _section("notices", plan.notices)
    return "\n".join(lines) + "\n"


def command_line(launch: Launch) -> str:
    """Return bubblewrap's argv as one line that a shell reads back unchanged."""
    return shlex.join(launch.argv)


def _names(plan: Plan) -> set[str]:
    placeholders = {name for credential in plan.credentials for name in credential.variables}
    return {*plan.launch.environment, *plan.launch.inherit, *placeholders}


def _unit(unit: UnitLaunch | None, pasta: tuple[str, ...]) -> list[str]:
    """Return what root is asked for a run under systemd: properties, then mounts, in their order, and its network."""
    if unit is None:
        return []
    named = tuple(f"{name}={value}" for name, value in unit.properties)
    title = f"unit {unit.unit}, as {unit.account} ({unit.uid})"
    lines = _section(title, named) + _section("mounts of the unit", tuple(one.describe() for one in unit.mounts))
    if unit.network is not None:
        title = f"unit of its network {unit.network.unit}, as {unit.account}, behind the packet filter of accounts"
        lines += _section(title, tuple(f"{name}={value}" for name, value in unit.network.properties))
        lines += _section("in it", (shlex.join(unit.network.argv), shlex.join(pasta)))
    return lines


def _guest(vm: VmLaunch | None) -> list[str]:
    """Return what a run in a microVM has: files by descriptor, what its guest is told, copies of what is carried in."""
    if vm is None:
        return []
    files = tuple(
        f"{FIRST_FILE + number}  {one.role}: {one.path}" + ("" if one.write else ", read-only")
        for number, one in enumerate(vm.files)
    )
    lines = _section(vm.describe(), files) + _section("told to the guest", vm.fields)
    lines += _section("first process of the agent's sandbox in it", (shlex.join(vm.inner),))
    copies = (*(f"{one.source} as ~/{one.name}" for one in vm.carried), *(f"~/{name}" for name, _ in vm.homed))
    ports = tuple(f"127.0.0.1:{port} of this host leads to 127.0.0.1:{port} of the guest" for port in vm.ports)
    return lines + _section("copies in its home", copies) + _section("ports", ports)


def _section(title: str, entries: tuple[str, ...]) -> list[str]:
    return ["", title, *(f"  {entry}" for entry in entries)] if entries else []


def _wrapped_argv(launch: Launch) -> list[str]:
    """Break the argv before each option, so that mounts stand one below the other."""
    lines: list[str] = []
    current = "  "
    for word in launch.argv:
        if word.startswith("--") and current.strip():
            lines.append(current.rstrip())
            current = "    "
        current += shlex.quote(word) + " "
    lines.append(current.rstrip())
    return lines
