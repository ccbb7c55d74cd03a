"""What a start of a unit costs: against systemd-run with the same properties, by property, and stage by stage."""

from __future__ import annotations

from statistics import median

from benchmarks.figures import compare
from benchmarks.report import Grid, Line, Section
from benchmarks.starts import said
from benchmarks.units.machine import AGENT, CARRIED_FILES, MANY_FILES, Rig

BASE = "systemd-run, the same properties"
RUN = "cloister run"
TARGET = 1.2
NEEDED = frozenset({"BindReadOnlyPaths"})
"""Without these there is no program to run."""
SHOWN = 12
"""Rows of the table by property; the rest are summed up."""
_STATE, _HOSTD = "/home/alice/.local/state/cloister/runs", "/var/lib/cloister/hostd/runs"
_PROXY, _TRANSIENT, _UNITS = "/var/lib/cloister/proxy/runs", "/run/systemd/transient", "/run/cloister/units"
STAGES = (
    ("front door and the user's broker: words, layout, protections, record", _STATE, "make", "", 0),
    ("hostd: who, where; proxyd has compiled the plan", _PROXY, "make", "", 0),
    ("proxyd: records, sockets; hostd: the floor, its record", _HOSTD, "make", ".json", 0),
    ("hostd: the run's directories, the agent's state", _UNITS, "make", "", 0),
    ("systemd-run: the manager has heard of the unit", _TRANSIENT, "make", ".service", 0),
    ("systemd: the unit; hostd: verified, mounts; told to proxyd", _HOSTD, "delete", ".lock", 0),
    ("shim: walls proved, `true`; the unit's end; hostd has undone", _UNITS, "delete", "", 0),
    ("proxyd's and the user's records; the end is told", "", "end", "", 0),
)
"""What was reached, and by which name in which directory it is seen."""
COLUMNS = ("ms, min", "ms, median", "reached after, median")


def systemd_run(properties: list[tuple[str, str]]) -> list[str]:
    """Return the command that the starts are compared with."""
    words = ["systemd-run", "--pipe", "--wait", "--collect", "--quiet"]
    for name, value in properties:
        words += ["-p", f"{name}={value}"]
    return [*words, "--", "/usr/bin/true"]


def run(agent: str = AGENT) -> list[str]:
    """Return alice's command."""
    return ["cloister", "run", agent, "--", "true"]


def starts(rig: Rig, rounds: int) -> Section:
    """`true` in a unit, from a shell, with all daemons there."""
    cases = [
        {"name": BASE, "user": "root", "argv": systemd_run(rig.properties())},
        {"name": RUN, "user": "alice", "argv": run()},
        {"name": f"{RUN}, a workspace of {MANY_FILES:,} files", "user": "alice", "argv": run(),
         "folder": "/home/alice/src/large"},
        {"name": f"{RUN}, {CARRIED_FILES:,} files carried in", "user": "alice", "argv": run("carries")},
        {"name": "systemd-run, no properties", "user": "root", "argv": systemd_run([])},
    ]  # fmt: skip
    figures = compare(rig.ask("rounds", cases=cases, rounds=rounds, warm_up=2), BASE)
    ratio = next(figure.ratio_of_minima for figure in figures if figure.name == RUN)
    return Section(
        f"Units: starts, {rig.name}", "ms", figures,
        "`true` as a system user of its own in a hardened unit, from fork to exit, in a git project, with the user's "
        "broker and both daemons there, against `systemd-run --pipe --wait --collect` by root with the very properties "
        "of that unit. What is on top: two brokers that compile and keep records, the floor, the properties verified, "
        "some thirty mounts of the workspace, the walls proved from inside, and all of it undone. A workspace is "
        "mounted, never copied; what a larger one costs is the look for names to protect. Carried in is a `~/.claude` "
        f"of {CARRIED_FILES:,} files of 4 KiB, by descriptor.",
        f"{RUN} ≤ {TARGET:g} x systemd-run with the same properties", said(ratio, TARGET),
    )  # fmt: skip


def by_property(rig: Rig, rounds: int) -> Section:
    """systemd-run with each property left out once."""
    properties = rig.properties()
    names = [name for name in dict.fromkeys(name for name, _ in properties) if name not in NEEDED]
    cases = [{"name": BASE, "user": "root", "argv": systemd_run(properties)}]
    cases += [
        {"name": f"without {left}=", "user": "root",
         "argv": systemd_run([(name, value) for name, value in properties if name != left])}
        for left in names
    ]  # fmt: skip
    samples = rig.ask("rounds", cases=cases, rounds=rounds, warm_up=1)
    samples["none at all"] = rig.ask(
        "rounds", cases=[{"name": "", "user": "root", "argv": systemd_run([])}], rounds=rounds, warm_up=1
    )[""]
    all_of_them = compare(samples, BASE)
    least = sorted(all_of_them[1:-1], key=lambda figure: figure.ratio_of_medians)
    rest = [figure.ratio_of_medians for figure in least[SHOWN:]]
    return Section(
        f"Units: start by property, {rig.name}", "ms", [all_of_them[0], *least[:SHOWN], all_of_them[-1]],
        f"systemd-run with all of the unit's properties, and with one name left out at a time: the {SHOWN} that cost "
        f"most by the median. The other {len(rest)} have medians from {min(rest):.2f} to {max(rest):.2f} of the first "
        "row: so far does noise reach here, so believe what is clearly more in both columns. Where several need the "
        "same thing (a mount namespace, a filter), leaving one out saves nothing.",
    )  # fmt: skip


def stages(rig: Rig, rounds: int) -> Grid:
    """Where the time of a start goes, seen from outside by the names that each stage leaves."""
    folders = [_STATE, _HOSTD, _PROXY, _TRANSIENT, _UNITS]
    asked = [
        {"name": name, "folder": folder, "kind": kind, "ending": ending, "nth": nth}
        for name, folder, kind, ending, nth in STAGES
    ]
    found = rig.ask("stages", argv=run(), folders=folders, stages=asked, rounds=rounds)
    lines, before = [], [0.0] * rounds
    for name, *_ in STAGES:
        moments = found[name]
        if len(moments) == rounds:
            took = [now - then for now, then in zip(moments, before, strict=True)]
            lines.append(Line(name, dict(zip(COLUMNS, (min(took), median(took), median(moments)), strict=True))))
            before = moments
    return Grid(
        f"Units: where a start's time goes, {rig.name}", COLUMNS, lines,
        f"{rounds} starts, watched by inotify from outside: each stage leaves a name somewhere. Watching costs a "
        "little of a core, so the sum is more than above.",
    )  # fmt: skip
