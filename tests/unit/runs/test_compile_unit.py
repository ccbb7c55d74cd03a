"""Plans of units: what is refused, what is mounted from where, and that nothing of a user's word leads root astray."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from cloister.errors import CloisterError
from cloister.isolation import seccomp
from cloister.plan.steps import Listen, MakeDirectory, MakeLink, Plan, Step, WriteBytes, WriteFile
from cloister.plan.unit import AGENTS, Account, UnitLaunch, UnitMount
from cloister.plan.workspace import Mount, Node, WorkspaceLayout
from cloister.policy.document import read
from cloister.policy.merge import resolve
from cloister.policy.presets import builtin_presets
from cloister.runs.compile_unit import UnitFacts, compile_unit, unit_home
from cloister.runs.credentials_places import writable_places
from cloister.runs.unenforced import refuse_unenforced
from cloister.runs.unit_prepare import refuse_visible

ACCOUNT = Account(name="cl-a-alice", uid=1_900_000_001, agent="a", user="alice")
ROOT = "/home/alice/p"
RUNTIME = "/run/cloister/proxy/runs/r1"


def _layout(*mounts: Mount, root: str = ROOT) -> WorkspaceLayout:
    return WorkspaceLayout(root=root, mounts=(Mount("bind", root, root), *mounts), placeholders=())


def _plan(table: str = "", *, preset: str = "shell", **changes: Any) -> Plan:
    text = f'schema = 1\n[agents.a]\npreset = "{preset}"\nisolation = "unit"\n{table}\n'
    resolved = resolve(read(text.encode(), "cloister.toml"), "a", presets=builtin_presets())
    values: dict[str, Any] = {
        "run": "r1", "agent_name": "a", "policy_digest": "0", "user": "alice", "caller_uid": 1000, "account": ACCOUNT,
        "home": unit_home(ACCOUNT), "run_state": "/var/lib/cloister/proxy/runs/r1", "run_runtime": RUNTIME,
        "shim": "/opt/cloister/bin/cloister", "etc_directory": "/run/cloister/etc/00", "merged_usr": True,
        "directory": ROOT, "layout": _layout(), "systemd": 257, "project_id": "0011223344556677",
        "machine": "x86_64",
    }  # fmt: skip
    command = resolved.agent.command or resolved.preset.command or ("true",)
    return compile_unit(resolved.agent, resolved.preset, command, (), UnitFacts(**(values | changes)))


def _unit(*arguments: Any, **changes: Any) -> UnitLaunch:
    unit = _plan(*arguments, **changes).launch.unit
    assert unit is not None
    return unit


def _mounts(*arguments: Any, **changes: Any) -> dict[str, UnitMount]:
    return {mount.target: mount for mount in _unit(*arguments, **changes).mounts}


REFUSED = {
    '[agents.a.filesystem]\nread = ["~/docs"]': "unit-path-of-user",
    '[agents.a.filesystem]\nwrite = ["/srv/data"]': "unit-path-of-user",
    '[agents.a.credentials.x]\nsecret = "keyring:x"\nenv = "X"': "unit-credential",
    '[agents.a.credentials.x]\nsecret = "login:x"\nenv = "X"': "unit-credential",
    '[agents.a.credentials.x]\nsecret = "pass:x"\nenv = "X"': "unit-credential",
    '[agents.a.credentials.x]\nsecret = "env:SOME"\nenv = "X"': "unit-credential",
    '[agents.a.credentials.x]\nkeys = ["gpg:0123456789ABCDEF0123456789ABCDEF01234567"]\nuses = ["gpg"]': "unit-credential",  # noqa: E501
    '[agents.a.unit]\nownership = "group"': "unit-group-missing",
    "[agents.a.microvm]\ncpus = 2": "policy-not-enforceable",
}
TAKEN = [
    '[agents.a.workspace]\nmode = "direct"',
    '[agents.a.workspace]\nmode = "overlay"',
    '[agents.a.egress]\nmode = "learn"',
    '[agents.a.filesystem]\nread = ["/srv/docs"]',
    '[agents.a.credentials.x]\nsecret = "file:/etc/cloister/keys/x"\nenv = "X"',
    '[agents.a.credentials.x]\nsecret = "systemd:x"\nenv = "X"',
    '[agents.a.credentials.x]\nsecret = "command:/usr/bin/x"\nenv = "X"',
    '[agents.a.unit]\nownership = "group"\nproject_group = "devs"',
]


@pytest.mark.parametrize(("table", "reference"), REFUSED.items(), ids=list(REFUSED))
def test_what_a_system_user_cannot_have_is_refused(table: str, reference: str) -> None:
    """A person's keys, logins, keyring and home are no system's; each refusal says what to do."""
    with pytest.raises(CloisterError) as caught:
        _plan(table)
    assert caught.value.reference == reference
    assert caught.value.remedy


@pytest.mark.parametrize("table", TAKEN)
def test_what_a_system_user_can_have_is_taken(table: str) -> None:
    """The positive twins."""
    assert _plan(table).launch.unit


def test_a_users_own_broker_never_starts_a_unit_as_less() -> None:
    """A policy that asks for a unit is refused where there is none, not run in a namespace instead."""
    text = b'schema = 1\n[agents.a]\npreset = "shell"\nisolation = "unit"\n'
    agent = resolve(read(text, "cloister.toml"), "a", presets=builtin_presets()).agent
    with pytest.raises(CloisterError) as caught:
        refuse_unenforced(agent)
    assert caught.value.reference == "unit-needs-system-policy"


def test_the_systems_broker_starts_nothing_but_units() -> None:
    """An agent with another isolation is not its business."""
    text = b'schema = 1\n[agents.a]\npreset = "shell"\n'
    resolved = resolve(read(text, "cloister.toml"), "a", presets=builtin_presets())
    with pytest.raises(CloisterError) as caught:
        compile_unit(resolved.agent, resolved.preset, ("true",), (), None)  # type: ignore[arg-type]
    assert caught.value.reference == "isolation-not-unit"


def test_the_workspace_lies_at_its_own_place_with_its_protections() -> None:
    """Below the descriptor of its root, by relative names: read-only, pinned, replaced and hidden as laid out."""
    found = _mounts(layout=_layout(
        Mount("pin", f"{ROOT}/.git", f"{ROOT}/.git"), Mount("ro", f"{ROOT}/.git/hooks", f"{ROOT}/.git/hooks"),
        Mount("content", f"{ROOT}/.env", content="x"), Mount("mask", f"{ROOT}/keys", node=Node("directory", 1, 2)),
        Mount("mask", f"{ROOT}/key", node=Node("file", 1, 3)),
    ))  # fmt: skip

    assert found[ROOT] == UnitMount(kind="rw", target=ROOT, base="workspace")
    assert found[f"{ROOT}/.git"].kind == "rw"
    assert found[f"{ROOT}/.git/hooks"] == UnitMount(
        kind="ro", target=f"{ROOT}/.git/hooks", base="workspace", source=".git/hooks"
    )
    assert (found[f"{ROOT}/.env"].base, found[f"{ROOT}/.env"].kind) == ("box", "ro")
    assert [found[f"{ROOT}/{name}"].kind for name in ("keys", "key")] == ["mask-directory", "mask-file"]


@pytest.mark.parametrize("target", ["/home/bob/x", "/etc", "/home/alice/p2", "/", "/home/alice"])
def test_what_a_layout_says_of_other_places_is_left_out(target: str) -> None:
    """A layout is the user's own word: it mounts nothing outside of the workspace, neither from nor onto it."""
    lies = (Mount("bind", target, target), Mount("ro", f"{ROOT}/x", target), Mount("bind", target, f"{ROOT}/y"))
    honest, lying = _unit(), _unit(layout=_layout(*lies))

    assert lying.mounts == honest.mounts
    assert any("does not work" in notice for notice in _plan(layout=_layout(*lies)).notices)


def test_mounts_come_after_what_they_stand_on() -> None:
    """Each target's parents that are mounts were made before it, also where the workspace lies in an odd place."""
    for root in (ROOT, "/srv/a/b", "/data/x", "/var/www/site", "/tmp/x", "/opt/a/b"):  # of the test
        changes: dict[str, Any] = {"layout": _layout(root=root), "directory": root, "program_binds": ("/opt/a",)}
        targets = [mount.target for mount in _unit(**changes).mounts]
        for index, target in enumerate(targets):
            assert not [later for later in targets[index + 1 :] if target.startswith(f"{later}/")], targets
        assert len(set(targets)) == len(targets)


def test_home_and_temporary_files_are_fresh_and_bounded() -> None:
    """The account's own tmpfs for home, /tmp and /var/tmp, each of the size that the policy allows."""
    found = _mounts('[agents.a.limits]\ndisk_max = "1M"')

    for place in (unit_home(ACCOUNT), "/tmp", "/var/tmp"):  # the unit's own
        assert found[place] == UnitMount(kind="tmpfs", target=place, private=True, size_bytes=1 << 20)
    assert not found["/home"].private


def test_state_carried_and_generated_files_come_from_their_places() -> None:
    """State from the account's own, carried files from the request, generated ones from the broker's; with points."""
    plan = _plan(preset="claude", carried=((".claude/CLAUDE.md", "file"), (".gitconfig", "file")))
    unit, home = plan.launch.unit, unit_home(ACCOUNT)
    assert unit
    found = {mount.target: mount for mount in unit.mounts}

    assert found[f"{home}/.claude"] == UnitMount(kind="rw", target=f"{home}/.claude", base="state", source=".claude")
    assert found[f"{home}/.claude/CLAUDE.md"].base == "carry"
    assert unit.state == (".claude",)
    assert unit.points == ((".claude/CLAUDE.md", "file"),), "what is not in the state needs no point there"
    assert dict(unit.seeds).keys() == {".claude/.claude.json"}


def test_the_box_is_readable_for_another_uid_and_nobody_else_gets_there() -> None:
    """The run's directory is the broker's alone; what lies in the box is readable, the socket can be connected to."""
    steps: tuple[Step, ...] = _plan(preset="claude", program_names=(("claude", "/opt/x/cli.js"),)).steps
    directories = {step.path: step.mode for step in steps if isinstance(step, MakeDirectory)}

    assert directories[RUNTIME] == 0o700
    assert directories[f"{RUNTIME}/box"] == directories[f"{RUNTIME}/box/bin"] == 0o755
    assert {step.mode for step in steps if isinstance(step, WriteFile | WriteBytes)} == {0o644}
    assert [step.mode for step in steps if isinstance(step, Listen)] == [0o666]
    assert MakeLink(path=f"{RUNTIME}/box/bin/claude", target="/opt/x/cli.js") in steps


@pytest.mark.parametrize("nested", [False, True])
def test_our_own_filter_is_in_the_box_and_the_shim_installs_it(nested: bool) -> None:
    """The same bytes as bubblewrap gets; systemd's filter alone cannot refuse TIOCSTI."""
    plan = _plan(f"[agents.a.hardening]\nnested = {str(nested).lower()}", machine=platform.machine())
    written = next(step for step in plan.steps if isinstance(step, WriteBytes))
    argv = plan.launch.argv

    assert written.data == seccomp.assemble(platform.machine(), nested=nested)
    assert argv[argv.index("--seccomp") + 1] == "/run/cloister/box/seccomp.bpf"
    assert ("--nested" in argv) is nested


def test_limits_are_the_units() -> None:
    """Each limit says which property keeps it; the unit's own time is longer than the broker's."""
    plan = _plan('[agents.a.limits]\nmemory_max = "1G"\nruntime_max = "10s"\ncpu_quota = "50%"')
    unit = plan.launch.unit
    assert unit

    assert dict(unit.properties).items() >= {
        ("MemoryMax", str(1 << 30)), ("CPUQuota", "50%"), ("RuntimeMaxSec", "40s"),
    }  # fmt: skip
    assert plan.launch.runtime_s == 10
    assert any("MemoryMax=" in words for words in plan.limits)


OVERLAY = '[agents.a.workspace]\nmode = "overlay"'


@pytest.mark.parametrize("table", [OVERLAY, f'{OVERLAY}\n[agents.a.unit]\nownership = "group"\nproject_group = "devs"'])
def test_kept_aside_by_the_policy(table: str) -> None:
    """Nothing of the workspace is writable but through the overlay, whatever the user's broker says of its layout."""
    lies = _layout(Mount("bind", f"{ROOT}/sub", f"{ROOT}/sub"), Mount("pin", "/home/alice/git", "/home/alice/git"))
    unit = _unit(table, layout=lies, repository="/home/alice/git")
    found = {mount.target: mount for mount in unit.mounts}
    assert found[ROOT] == UnitMount(kind="overlay", target=ROOT, base="workspace")
    assert [found[path].kind for path in (f"{ROOT}/sub", "/home/alice/git")] == ["ro", "ro"]
    assert unit.ownership == "idmap"
    assert "SupplementaryGroups" not in dict(unit.properties)


def test_kept_aside_by_the_user() -> None:
    """A user whose own policy or project narrows to an overlay gets one, where the system's policy does not ask."""
    layout = WorkspaceLayout(root=ROOT, mounts=(Mount("overlay", ROOT, ROOT),), placeholders=())
    assert _mounts(layout=layout)[ROOT].kind == "overlay"


def test_a_copy_stands_in_for_an_overlay_only() -> None:
    """What the user's broker has copied is mounted in overlay mode, and said; a direct run has the workspace itself."""
    plan = _plan(OVERLAY, copied=True)
    assert plan.launch.unit
    copy = UnitMount(kind="rw", target=ROOT, base="copy", source="upper")
    assert [mount for mount in plan.launch.unit.mounts if mount.target == ROOT] == [copy]
    assert any("copy" in notice for notice in plan.notices)
    assert _mounts(copied=True)[ROOT].base == "workspace"


def test_a_repository_elsewhere_is_mounted_where_root_has_walked_to_it() -> None:
    """It keeps its place and its protections; without root's word nothing of it is there."""
    git = "/srv/git/.git"
    layout = _layout(
        Mount("bind", git, git), Mount("ro", f"{git}/hooks", f"{git}/hooks"), Mount("content", f"{git}/x", content="y")
    )
    found = _mounts(layout=layout, repository=git)
    assert found[git] == UnitMount(kind="rw", target=git, base="repository")
    assert found[f"{git}/hooks"] == UnitMount(kind="ro", target=f"{git}/hooks", base="repository", source="hooks")
    assert found[f"{git}/x"].kind == "ro"
    assert found["/srv"].kind == "tmpfs"
    assert git not in _mounts(layout=layout)
    assert f"{git}/hooks" not in _mounts(layout=layout, repository="/srv/other")


def test_ownership_follows_policy_and_host() -> None:
    """`auto` maps ids where that works, else the group; the group joins the unit only where it is used."""
    group = '[agents.a.unit]\nproject_group = "devs"'
    assert _unit(group).ownership == "idmap"
    assert _unit(group, idmap=False).ownership == "group"
    assert ("SupplementaryGroups", "devs") in _unit(group, idmap=False).properties
    assert ("SupplementaryGroups", "devs") not in _unit(group).properties
    assert dict(_unit(group, idmap=False).properties)["UMask"] == "0007", "what an agent makes is the group's"
    assert dict(_unit(group).properties)["UMask"] == "0077"


def test_no_secret_and_no_program_is_taken_from_where_a_unit_can_write() -> None:
    """Its workspace, its own state and the broker's are no places for secrets; its argv, the shim's, is not read."""
    assert set(writable_places(_plan(), "/state")) == {ROOT, AGENTS, "/state"}
    git = "/srv/git/.git"
    plan = _plan(layout=_layout(Mount("bind", git, git)), repository=git)
    assert set(writable_places(plan, "/state")) == {ROOT, AGENTS, "/state", git}
    refuse_visible(_plan('[agents.a.credentials.x]\nsecret = "file:/srv/git/.git/key"\nenv = "X"'), "")
    told = '[agents.a.credentials.x]\nsecret = "file:/srv/git/.git/key"\nenv = "X"'
    with pytest.raises(CloisterError, match="could read the secret"):
        refuse_visible(_plan(told, layout=_layout(Mount("bind", git, git)), repository=git), "")


def test_no_secret_and_no_variable_of_the_caller_is_in_what_root_is_asked() -> None:
    """`systemctl show` prints properties to everybody: no Environment=, no credential, no path of the workspace."""
    plan = _plan('[agents.a.credentials.x]\nsecret = "file:/etc/cloister/keys/x"\nenv = "X"')
    unit = plan.launch.unit
    assert unit
    names = {name for name, _ in unit.properties}

    assert not names & {"Environment", "EnvironmentFile", "SetCredential", "LoadCredential", "PassEnvironment"}
    assert not any(name.startswith("Exec") for name in names)
    assert not any(ROOT in value for _, value in unit.properties)
