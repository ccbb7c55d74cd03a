"""Goldens of plans for units, at the oldest and the newest version of systemd: what root is asked to do, as a diff.

`PYTHONPATH=src:tests python tests/golden/test_unit_plans.py` writes them anew (tests themselves write nothing).
"""

from pathlib import Path

import pytest

from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.plan import render
from cloister.plan.facts import HostFacts, Program
from cloister.plan.steps import Plan
from cloister.plan.unit import Account
from cloister.plan.workspace import Mount, Node, Placeholder, WorkspaceLayout
from cloister.policy.document import read
from cloister.policy.merge import resolve
from cloister.policy.model import Agent
from cloister.policy.presets import builtin_presets
from cloister.runs.compile_unit import UnitFacts, compile_unit, unit_home
from cloister.runs.unit_internet import UnitInternet, unit_internet

FOLDER = Path(__file__).parent / "unit_plans"
VERSIONS = (252, 257)
POLICIES = sorted(path.stem for path in FOLDER.glob("*.toml"))
ROOT = "/home/alice/src/p"


def facts(**changes: object) -> UnitFacts:
    """Return the facts of a start by alice, changed as asked."""
    account = Account(name="cl-agent-alice", uid=1_900_000_001, agent="agent", user="alice")
    layout = WorkspaceLayout(
        root=ROOT,
        mounts=(
            Mount("bind", ROOT, ROOT),
            Mount("pin", f"{ROOT}/.git", f"{ROOT}/.git"),
            Mount("ro", f"{ROOT}/.git/hooks", f"{ROOT}/.git/hooks"),
            Mount("content", f"{ROOT}/.mcp.json", content="{}\n"),
            Mount("mask", f"{ROOT}/secret", node=Node("directory", 1, 2)),
        ),
        placeholders=(Placeholder(ROOT, Mount("bind", "/").node, ".mcp.json", "socket"),),
    )
    values: dict[str, object] = {
        "run": "0123456789ab", "agent_name": "agent", "policy_digest": "0" * 64, "user": "alice", "caller_uid": 1000,
        "account": account, "home": unit_home(account), "run_state": "/var/lib/cloister/proxy/runs/0123456789ab",
        "run_runtime": "/run/cloister/proxy/runs/0123456789ab", "shim": "/opt/cloister/bin/cloister",
        "etc_directory": "/run/cloister/etc/00", "merged_usr": True, "directory": ROOT, "layout": layout,
        "program_path": "/opt/agent/bin/agent", "program_binds": ("/opt/agent",),
        "program_names": (("agent", "/opt/agent/bin/agent"),), "landlock_abi": 7, "git": (("user.name", "Alice"),),
        "carried": ((".claude/CLAUDE.md", "file"),), "read": ("/srv/docs",), "systemd": 252,
        "machine": "x86_64", "project_id": "0011223344556677",
    }  # fmt: skip
    return UnitFacts(**(values | changes))  # type: ignore[arg-type]


def plan_of(text: bytes, **changes: object) -> Plan:
    """Compile the agent `agent` of a policy."""
    resolved = resolve(read(text, "cloister.toml"), "agent", presets=builtin_presets())
    allow = tuple(str(entry) for entry in resolved.agent.egress.allow)
    changes = {"direct": _direct(resolved.agent), **changes}
    return compile_unit(resolved.agent, resolved.preset, resolved.agent.command, allow, facts(**changes))


def _direct(agent: Agent) -> UnitInternet | None:
    """Return how an agent in mode `internet` gets its network, on a host that asks 192.168.1.1 for names."""
    if agent.egress.mode != "internet":
        return None
    host = HostFacts(
        kernel="6.12", arch="x86_64", uid=900, pasta=Program(path="/usr/bin/pasta"), nft=Program(path="/usr/sbin/nft")
    )
    rules, guard = compile_ruleset(agent.egress, agent="agent"), compile_guard(agent.egress, agent="agent")
    return unit_internet((agent, agent), rules, guard, host, ("192.168.1.1",))


def _compiled(name: str, version: int) -> str:
    return render.as_json(plan_of((FOLDER / f"{name}.toml").read_bytes(), systemd=version)).decode()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_still_means_this_unit(name: str, version: int) -> None:
    """The compiled plan is the stored one, to the byte."""
    assert _compiled(name, version) == (FOLDER / f"{name}.{version}.json").read_text(encoding="utf-8")


def test_the_text_shows_what_root_is_asked_for() -> None:
    """`cloister plan` shows the account, every property and every mount, in order."""
    lines = render.as_text(plan_of((FOLDER / "claude.toml").read_bytes())).splitlines()

    assert "unit cloister-run-0123456789ab.service, as cl-agent-alice (1900000001)" in lines
    assert "  NoNewPrivileges=yes" in lines
    assert f"  ro {ROOT}/.git/hooks from workspace:.git/hooks" in lines
    assert "  tmpfs /tmp, 2147483648 bytes" in lines


def test_the_text_shows_the_network_and_what_is_given_up() -> None:
    """In mode `internet` the plan shows pasta's unit, its argv, and that direct connections have no names."""
    text = render.as_text(plan_of((FOLDER / "internet.toml").read_bytes()))

    assert "unit of its network cloister-net-0123456789ab.service, as cl-agent-alice, behind the packet filter" in text
    assert "  BindsTo=cloister-watchdog.service" in text
    assert "  /usr/bin/pasta -f -q --config-net --no-map-gw" in text
    assert "egress.mode = internet: public addresses are reachable without names" in text


if __name__ == "__main__":
    for one in POLICIES:
        for systemd in VERSIONS:
            (FOLDER / f"{one}.{systemd}.json").write_text(_compiled(one, systemd), encoding="utf-8")
