"""Root's daemon in a real systemd: who may start what where, and what stands then. The broker is a stand-in."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hostd_rig import ACCOUNT, SHIM, UID, Rig

from cloister.isolation import unit
from support.machines import PYTHON, TESTS, Machine

GOOD = [["J", {"receipt": {"exit": 0}}]]
STATE = f"/var/lib/cloister/agents/{ACCOUNT}/0123456789abcdef"


@pytest.fixture(scope="module")
def rig(machine: Machine) -> Iterator[Rig]:
    """Hostd and a broker's stand-in, for all tests of this file."""
    rig = Rig(machine)
    rig.start_broker()
    yield rig
    rig.close()


@pytest.fixture
def project(rig: Rig) -> Iterator[str]:
    """A directory of alice's below a granted root, with a name that no list of systemd's could hold."""
    path = "/home/alice/p/my proj:%x\\$HOME"
    rig.machine.run(["mkdir", "-p", path, "/home/alice/work"], user="alice")
    rig.machine.run(["sh", "-c", 'echo hers >"$0/hers"', path], user="alice")
    yield path
    rig.machine.run(["rm", "-rf", "/home/alice/p", "/home/alice/work"])


def shell(rig: Rig, script: str, **more: Any) -> None:
    """Have the broker answer with a plan that runs this script."""
    rig.answer(rig.plan(["/bin/sh", "-c", script], **more))


def test_a_run_in_the_own_project(rig: Rig, project: str) -> None:
    """Alice's agent runs as an account of ours in her project; what it makes is hers; nothing is left of the unit."""
    shell(rig, "id -un; pwd; cat hers; echo made >made; cat /run/cloister/box/note; ls -A /home/alice")
    answer, printed, run = rig.ask(project)
    assert answer == GOOD, rig.told()
    assert printed.splitlines() == [ACCOUNT, project, "hers", "of the broker", "p"]
    assert rig.machine.run(["stat", "-c", "%U %G", f"{project}/made"]).stdout.strip() == "alice alice"
    rig.nothing_left(run)


def test_the_broker_hears_who_asks_from_us(rig: Rig, project: str) -> None:
    """What the broker is told of the caller is the kernel's word and our own walk, not what the request says."""
    shell(rig, "true")
    rig.machine.run(["mkdir", f"{project}/sub"], user="alice")
    answer, _, _ = rig.ask(project, f"{project}/sub")
    assert answer == GOOD
    told = rig.events("fields")[-1]
    wanted = {"caller": "alice", "caller_uid": "1000", "home": "/home/alice", "account": ACCOUNT, "root": project}
    assert wanted.items() <= told.items()
    assert told["directory"] == f"{project}/sub"
    assert told["granted"] == "/home/alice/p"


def test_nobody_can_be_impersonated(rig: Rig, project: str) -> None:
    """PF1: bob cannot start anything in alice's project, and no field of a request names a user."""
    shell(rig, "cat hers")
    said = rig.machine.run(
        [PYTHON, "-m", "support.hostd_client", "pi", "x1", "/", "--extra", "caller=alice"],
        user="bob", env={"PYTHONPATH": TESTS}, cwd="/", check=False,
    )  # fmt: skip
    assert "request-malformed" in said.stderr
    assert "not allowed to use" in rig.refusal(project, agent="claude")


def test_descriptors_of_others_lead_nowhere(rig: Rig, project: str) -> None:
    """PF1: alice's directory in bob's hands is below no root of his; with root `/` his own rights do not reach it."""
    code = """
import os, socket, sys
from support import hostd_client
held = hostd_client.directory(sys.argv[1])
os.setgid(1001); os.setgroups([]); os.setuid(1001)
print(hostd_client.ask("pi", "x2", held, held))
"""
    shell(rig, "cat hers")
    rig.machine.run(["mkdir", "-p", "/home/bob/p"], user="bob")
    assert "no-project-root" not in (said := rig.machine.python(code, project, cwd="/").stdout)
    assert "outside-roots" in said
    rig.grant({"alice": ["~/p"], "bob": ["/"]})
    try:
        assert "workspace-not-reached" in rig.machine.python(code, project, cwd="/").stdout
    finally:
        rig.grant({"alice": ["~/p", "work", "/srv/shared"], "bob": ["~/p"]})


def test_outside_of_the_roots(rig: Rig, project: str) -> None:
    """P54, P55: a directory outside is refused in words that name the allowed roots, and those that are missing."""
    shell(rig, "true")
    said = rig.refusal("/home/alice")
    assert "'/home/alice' is outside allowed project roots for user 'alice'" in said
    assert "Allowed roots: /home/alice/work, /home/alice/p" in said
    assert "Configured but missing roots: /srv/shared" in said
    rig.machine.run(["rm", "-rf", "/home/alice/work"])
    rig.machine.run(["mv", "/home/alice/p", "/home/alice/q"], user="alice")
    try:
        assert "no valid existing project roots are configured" in rig.refusal("/home/alice/q")
    finally:
        rig.machine.run(["mv", "/home/alice/q", "/home/alice/p"], user="alice")


def test_root_slash_and_the_longest_root(rig: Rig, project: str) -> None:
    """PF8, P72: `/` is a root like any other, and the longest one that holds the directory is taken."""
    shell(rig, "true")
    rig.grant({"alice": ["/", "~/p"]})
    try:
        assert rig.ask("/home/alice/work")[0] == GOOD, rig.told()
        assert rig.events("fields")[-1]["granted"] == "/"
        assert rig.ask(project)[0] == GOOD
        assert rig.events("fields")[-1]["granted"] == "/home/alice/p"
    finally:
        rig.grant({"alice": ["~/p", "work", "/srv/shared"], "bob": ["~/p"]})


def test_a_root_that_became_a_link(rig: Rig, project: str) -> None:
    """PF7: a root that is replaced by a link to somebody else's directory is no root, and the words say so."""
    shell(rig, "ls")
    rig.machine.run(["sh", "-c", "mkdir -p /srv/other && echo x >/srv/other/secret && chmod -R a+rX /srv/other"])
    rig.machine.run(["sh", "-c", "mv p p.old && ln -s /srv/other p"], user="alice")
    try:
        said = rig.refusal("/home/alice/p")
        assert "/home/alice/p is or lies behind a symbolic link" in said
        assert "outside-roots" in said
    finally:
        rig.machine.run(["sh", "-c", "rm p && mv p.old p"], user="alice")
    assert rig.ask(project)[0] == GOOD


def test_a_workspace_of_somebody_else(rig: Rig, project: str) -> None:
    """PF7: a directory below a root that is not the caller's is refused, also when everybody may write it."""
    shell(rig, "true")
    rig.machine.run(["sh", "-c", "mkdir -p /srv/shared/roots && chmod 777 /srv/shared/roots"])
    try:
        assert "workspace-not-yours" in rig.refusal("/srv/shared/roots")
    finally:
        rig.machine.run(["rm", "-rf", "/srv/shared"])


def test_a_swapped_directory_never_shows_another(rig: Rig, project: str) -> None:
    """PF7: while a name changes between directory and link, a run sees the directory that was sent, or is refused."""
    rig.machine.run(["sh", "-c", "mkdir -p /srv/other && echo x >/srv/other/secret && chmod -R a+rX /srv/other"])
    rig.machine.run(["mkdir", "-p", "/home/alice/p/a"], user="alice")
    swap = "while :; do mv p/a p/b; ln -s /srv/other p/a; rm p/a; mv p/b p/a; done"
    shell(rig, "ls")
    swapping = rig.machine.popen(["sh", "-c", swap], user="alice")
    try:
        code = """
import os, sys
from support import hostd_client
found, told = set(), 0
for number in range(25):
    try:
        held = hostd_client.directory("/home/alice/p/a")
    except OSError:
        continue
    if os.readlink(f"/proc/self/fd/{held}").startswith("/srv"):
        told += 1
    for kind, said in hostd_client.ask("pi", f"swap{number}", held, held):
        found.add("good" if kind == "J" else said[1].split("[")[1].split("]")[0])
print(sorted(found))
"""
        done = rig.machine.python(code, user="alice", cwd="/", timeout=100)
    finally:
        swapping.kill()
        swapping.wait()
    assert "secret" not in done.stdout
    # The name is read more than once: "p/b" first and "p/a" then is refused as a directory outside.
    allowed = {"good", "outside-roots", "directory-outside", "workspace-not-reached", "workspace-changed"}
    assert set(eval(done.stdout.splitlines()[-1])) <= allowed, done.stdout  # noqa: S307  our own list


def test_a_state_that_the_agent_replaced(rig: Rig, project: str) -> None:
    """PF5, PF6: a link that an agent left in its own state makes root touch nothing: the start is refused."""
    shell(rig, "mkdir ~/.npm/made", mounts=[mount("rw", f"/home/{ACCOUNT}/.npm", "state", ".npm")], state=[".npm"])
    assert rig.ask(project)[0] == GOOD, rig.told()
    assert rig.machine.run(["stat", "-c", "%u %a", f"{STATE}/.npm/made"]).stdout.split() == [str(UID), "700"]
    before = rig.machine.run(["stat", "-c", "%u %g %a %Z", "/etc"]).stdout
    rig.machine.run(["sh", "-c", f"rm -rf {STATE}/.npm && ln -s /etc {STATE}/.npm && chown -h {UID} {STATE}/.npm"])
    try:
        said = rig.refusal(project)
        assert "state-replaced" in said
        assert rig.machine.run(["stat", "-c", "%u %g %a %Z", "/etc"]).stdout == before
    finally:
        rig.machine.run(["rm", "-f", f"{STATE}/.npm"])
    assert rig.ask(project)[0] == GOOD


def test_upper_levels_of_the_state_are_roots(rig: Rig, project: str) -> None:
    """PF5: an account cannot reach, rename or replace the directories above its own state."""
    shell(rig, "true")
    assert rig.ask(project)[0] == GOOD
    names = rig.machine.run(["stat", "-c", "%u %a", "/var/lib/cloister/agents", f"/var/lib/cloister/agents/{ACCOUNT}"])
    assert [line.split()[0] for line in names.stdout.splitlines()] == ["0", "0"]
    tried = rig.machine.run(["mv", STATE, f"{STATE}.x"], user=ACCOUNT, cwd="/", check=False)
    assert tried.returncode != 0


def mount(kind: str, target: str, base: str = "none", source: str = "", **more: Any) -> dict[str, Any]:
    """Return a mount of a plan."""
    return {"kind": kind, "target": target, "base": base, "source": source, **more}


def test_what_is_protected_in_the_workspace(rig: Rig, project: str) -> None:
    """Protected paths are read-only inside, masked ones unreadable, and the rest stays writable."""
    rig.machine.run(["mkdir", "-p", f"{project}/.git/hooks", f"{project}/secret"], user="alice")
    rig.machine.run(["touch", f"{project}/.env"], user="alice")
    shell(
        rig,
        "touch .git/ok; touch .git/hooks/evil; echo x >.env; ls secret; rmdir secret; mv .git/hooks .git/gone; true",
        mounts=[
            mount("ro", f"{project}/.git/hooks", "workspace", ".git/hooks"),
            mount("mask-file", f"{project}/.env"),
            mount("mask-directory", f"{project}/secret"),
        ],
    )
    answer, _, _ = rig.ask(project)
    assert answer == GOOD, rig.told()
    names = rig.machine.run(["sh", "-c", 'cd "$0"; ls -A . .git .git/hooks; wc -c <.env', project]).stdout
    assert "ok" in names
    assert "evil" not in names
    assert "hooks" in names
    assert names.strip().endswith("0")


@pytest.mark.parametrize(
    ("prepare", "wrong"),
    [
        ("ln -s /etc .git", mount("ro", "@ROOT@/.git/hooks", "workspace", ".git/hooks")),
        ("mkdir .git; ln -s /etc .git/hooks", mount("ro", "@ROOT@/.git/hooks", "workspace", ".git/hooks")),
        ("true", mount("ro", "@ROOT@/absent", "workspace", "absent")),
        ("true", mount("mask-file", "@ROOT@/absent")),
        ("true", mount("mask-directory", "@ROOT@/new/deep")),
        ("ln -s /etc/passwd .env", mount("mask-file", "@ROOT@/.env")),
        ("mkfifo pipe", mount("ro", "@ROOT@/pipe", "workspace", "pipe")),
    ],
)
def test_no_link_and_nothing_new_in_the_workspace(rig: Rig, project: str, prepare: str, wrong: dict[str, Any]) -> None:
    """PF4, PF6: where a mount would follow a link, or root would have to make its place, nothing starts."""
    rig.machine.run(["sh", "-c", f'cd "$0" && {prepare}', project], user="alice")
    before = rig.machine.run(["find", project]).stdout
    shell(rig, "true", mounts=[wrong])
    assert "unit-mount" in rig.refusal(project)
    assert rig.machine.run(["find", project]).stdout == before


def test_nothing_of_a_unit_appears_on_the_host(rig: Rig, project: str) -> None:
    """While a unit lives the host's mount table is as before, and the workspace's mounts are seen in the unit alone."""
    shell(rig, "cat", mounts=[mount("ro", "@ROOT@/sub", "workspace", "sub")])
    rig.machine.run(["mkdir", f"{project}/sub"], user="alice")

    def mounts() -> list[str]:
        # systemd's own mounts on its runtime directories come and go with any unit
        return [line for line in rig.machine.read("/proc/1/mountinfo").splitlines() if "/run/" not in line]

    before = mounts()
    asking = rig.begin(project, "lives")
    try:
        assert mounts() == before
        pid = rig.machine.show("cloister-run-lives.service", "MainPID")
        inside = rig.machine.read(f"/proc/{pid}/mountinfo")
        assert "idmapped" in inside or "/sub" in inside
    finally:
        _, said = asking.communicate("", timeout=20)
    assert json.loads(said.splitlines()[-1]) == GOOD
    rig.nothing_left("lives")


def test_what_is_carried_in(rig: Rig, project: str) -> None:
    """What the caller carries in appears at its place, root's and read-only, and is gone after the run."""
    home = f"/home/{ACCOUNT}"
    shell(
        rig,
        "cd; cat .pi/settings.json; echo x >.pi/settings.json; stat -c %u .pi/settings.json; touch free && echo free",
        mounts=[mount("ro", f"{home}/.pi/settings.json", "carry", ".pi/settings.json")],
    )
    answer, printed, run = rig.ask(project, "--carry", json.dumps({".pi/settings.json": "mine\n"}))
    assert answer == GOOD, rig.told()
    assert printed.split() == ["mine", "0", "free"] or printed.split() == ["mine", "65534", "free"]
    rig.nothing_left(run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("User", "root"), "User=root"),
        (("User", "alice"), "User=alice"),
        (("ExecStartPre", "/bin/sh"), "ExecStartPre"),
        (("Environment", "A=b"), "Environment"),
        (("SetCredential", "a:b"), "SetCredential"),
        (("NoNewPrivileges", "no"), "NoNewPrivileges=no"),
        (("CapabilityBoundingSet", "CAP_SYS_ADMIN"), "CapabilityBoundingSet"),
        (("RootDirectory", "/"), "RootDirectory"),
        (("BindReadOnlyPaths", "/home"), "/home"),
        (("BindReadOnlyPaths", "/home/alice"), "/home/alice"),
        (("BindReadOnlyPaths", "/tmp/evil:/.cloister/cloister-shim"), "cloister-shim"),
        (("SupplementaryGroups", "root"), "root"),
    ],
)
def test_a_broker_that_was_taken_over_gets_no_more(rig: Rig, project: str, change: tuple[str, str], named: str) -> None:
    """A plan below the floor starts nothing, and the refusal names the property (BF, PF16: no weaker unit)."""
    plan = rig.plan(["/bin/true"])
    unit = plan["steps"][-1]["unit"]
    unit["properties"] = [one for one in unit["properties"] if one[0] != change[0]] + [list(change)]
    rig.answer(plan)
    said = rig.refusal(project)
    assert "below-the-floor" in said
    assert named in said


def test_a_broker_in_wrong_hands_lifts_nothing(rig: Rig, project: str) -> None:
    """Properties for an agent that builds sandboxes are refused, except where the grant says that it may."""
    box = unit.UnitBox(
        systemd=rig.machine.version, account=ACCOUNT, shim=SHIM, etc_directory="/etc", merged_usr=True, nested=True
    )
    plan = rig.plan(["true"], properties=[list(one) for one in unit.properties(box)])
    rig.answer(plan)
    assert "below-the-floor" in rig.refusal(project)
    plan["steps"][-1]["argv"].append("--nested")
    rig.answer(plan)
    assert "below-the-floor" in rig.refusal(project)
    rig.grant({"alice": ["~/p", "work", "/srv/shared"]}, nested=True)
    try:
        assert rig.ask(project)[0] == GOOD, rig.told()
    finally:
        rig.grant({"alice": ["~/p", "work", "/srv/shared"], "bob": ["~/p"]})


def test_a_refusal_of_the_broker_is_handed_on(rig: Rig, project: str) -> None:
    """What the broker says instead of a plan reaches the caller word for word, and nothing was started."""
    rig.answer(rig.plan(["true"]), refuse=[78, "the policy has two mistakes"])
    answer, _, run = rig.ask(project)
    assert answer == [["F", [78, "the policy has two mistakes"]]]
    rig.nothing_left(run)


def test_an_agent_starts_nothing(rig: Rig, project: str) -> None:
    """An account of ours gets no answer but a refusal, whatever it asks, so no agent starts another."""
    shell(rig, "true")
    assert "caller-is-agent" in rig.refusal("/", user=ACCOUNT)


def test_only_the_broker_ends_runs(rig: Rig, project: str) -> None:
    """`end` and `recover` are the broker's and root's: a user's are refused, and the run lives on."""
    shell(rig, "cat")
    asking = rig.begin(project, "mine")
    code = "from support.fake_proxyd import ask_hostd as ask; print(ask('end', run='mine'), ask('recover', living=''))"
    try:
        said = rig.machine.python(code, user="bob", cwd="/").stdout
        assert "request-malformed" in said
        assert rig.machine.show("cloister-run-mine.service", "ActiveState") == "active"
    finally:
        asking.communicate("", timeout=20)
    rig.nothing_left("mine")


def test_root_ends_a_run(rig: Rig, project: str) -> None:
    """The end that root or the broker asks for stops everything in the unit, and tells systemd's word on it."""
    shell(rig, "sleep 1000 & cat; sleep 1000")
    asking = rig.begin(project, "ended")
    said = rig.machine.python(
        "from support.fake_proxyd import ask_hostd; print(ask_hostd('end', run='ended'))", cwd="/"
    )
    asking.kill()
    asking.wait()
    assert "Result" in said.stdout
    rig.nothing_left("ended")
    left = rig.machine.run(["pgrep", "-u", str(UID)], check=False)
    assert left.stdout == ""


def test_a_hostile_crowd_holds_up_nobody_else(rig: Rig, project: str) -> None:
    """Beyond what of one user is served and waits the next is told to try again, and another user is served."""
    shell(rig, "true")
    code = """
import socket, sys, time
held = [socket.socket(socket.AF_UNIX) for _ in range(160)]
for sock in held: sock.connect("/run/cloister/hostd.sock")
print("held", flush=True); sys.stdin.read()
"""
    crowd = rig.machine.popen(
        [PYTHON, "-c", code], user="bob", cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "held\n"
        rig.machine.run(["mkdir", "-p", "/home/bob/p/x"], user="bob")
        assert "hostd-busy" in rig.refusal("/home/bob/p/x", user="bob")
        begin = time.monotonic()
        assert rig.ask(project)[0] == GOOD
        assert time.monotonic() - begin < 5
    finally:
        crowd.communicate("", timeout=20)


def test_who_was_forked_ahead_may_die(rig: Rig, project: str) -> None:
    """Root's daemon forks for the next request; where that process is killed, another one serves."""
    shell(rig, "true")
    assert rig.ask(project)[0] == GOOD, rig.told()
    main = rig.machine.show("cloister-hostd.service", "MainPID")
    rig.machine.wait_for(f"test $(pgrep -c -P {main}) = 1", 10)
    rig.machine.run(["pkill", "-KILL", "-P", main])
    answer, _, run = rig.ask(project)
    assert answer == GOOD, rig.told()
    rig.nothing_left(run)
    assert rig.machine.show("cloister-hostd.service", "MainPID") == main


def test_hostd_ends_when_idle(rig: Rig) -> None:
    """Without requests the daemon ends by itself, and the next request starts it again."""
    words = [
        PYTHON,
        "-I",
        "-m",
        "cloister.services.hostd",
        "--socket",
        "/run/cloister-test/idle.sock",
        "--idle-s",
        "0.5",
    ]
    assert rig.machine.run(words, timeout=20).returncode == 0
    rig.machine.run(["systemctl", "stop", "cloister-hostd.service"])
    assert "caller-is-agent" in rig.refusal("/", user=ACCOUNT)
    assert rig.machine.show("cloister-hostd.service", "ActiveState") == "active"


def test_recovery_ends_what_is_not_living(rig: Rig, project: str) -> None:
    """A broker that starts anew says which runs live: the others are stopped and undone, those live on."""
    shell(rig, "cat")
    kept, lost = rig.begin(project, "kept"), rig.begin(project, "lost")
    code = "from support.fake_proxyd import ask_hostd as ask; print(ask('recover', living='kept,other'))"
    said = rig.machine.python(code, cwd="/").stdout
    assert said.strip() == "{'undone': ['lost']}"
    rig.nothing_left("lost")
    lost.communicate("", timeout=20)
    assert rig.machine.show("cloister-run-kept.service", "ActiveState") == "active"
    _, said = kept.communicate("", timeout=20)
    assert json.loads(said.splitlines()[-1]) == GOOD
    rig.nothing_left("kept")


def test_a_shared_workspace_gives_no_rights_of_its_owner(rig: Rig, project: str) -> None:
    """PF20: in a directory that bob shares with alice by a group, alice's agent does not become bob by mapped ids."""
    rig.machine.run(["sh", "-c", "groupadd -f team; usermod -aG team alice; usermod -aG team bob"])
    prepare = "mkdir -p /srv/shared/x && cd /srv/shared/x && chown bob:team . && chmod 2770 . && echo s >own"
    rig.machine.run(["sh", "-c", f"{prepare} && chown bob:bob own && chmod 600 own"])
    try:
        shell(rig, "cat own")
        assert "workspace-ownership" in rig.refusal("/srv/shared/x")
        properties = [*rig.plan([""])["steps"][-1]["unit"]["properties"], ["SupplementaryGroups", "team"]]
        rig.answer(rig.plan(["/bin/sh", "-c", "cat own; echo made >made"], properties=properties, ownership="group"))
        answer, printed, _ = rig.ask("/srv/shared/x")
        assert (answer, printed) == (GOOD, ""), rig.told()
        assert rig.machine.run(["stat", "-c", "%U %G", "/srv/shared/x/made"]).stdout.split() == [ACCOUNT, "team"]
        properties[-1][1] = "root"
        rig.answer(rig.plan(["true"], properties=properties, ownership="group"))
        assert "below-the-floor" in rig.refusal("/srv/shared/x")
    finally:
        rig.machine.run(["rm", "-rf", "/srv/shared"])
        rig.machine.run(["groupdel", "team"])
