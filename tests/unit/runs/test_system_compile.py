"""From a system's policy to what is installed: who gets what, and what is refused before anything is touched."""

import json

import msgspec
import pytest

from cloister.errors import PolicyError, UnsupportedError
from cloister.isolation import unit_files
from cloister.plan.system_diff import Desired
from cloister.plan.system_facts import KeyFile, SystemFacts
from cloister.plan.unit import FIRST_UID, SYSTEM_FILE, Account, System, VmBridge, delivered_name
from cloister.policy.load import load
from cloister.runs.system_compile import compile_system, give_accounts
from cloister.runs.system_judge import SystemPolicy, key_paths, references, unit_agents

POLICY = """
schema = 1
[providers.anthropic]
key = "file:/etc/cloister/keys/anthropic.key"
[providers.unused]
key = "file:/etc/cloister/keys/unused.key"
[agents.pi]
command = ["/usr/bin/pi"]
isolation = "unit"
[agents.pi.llm]
providers = ["anthropic"]
[agents.pi.credentials.github]
secret = "systemd:github"
[agents.own]
command = ["/usr/bin/true"]
[users.alice]
agents = ["pi", "own"]
roots = ["~/src", "/srv/x"]
"""
KEY = KeyFile(uid=0, mode=0o600, changed=1000.0, safe=True)
FACTS = SystemFacts(
    uid=0, systemd_booted=True, systemd_version=257, pid1="systemd", python="/opt/cloister/bin/python",
    shim="/opt/cloister/shim", nft="/usr/sbin/nft", sysusers="/usr/bin/systemd-sysusers",
    root_links={"bin": "usr/bin"}, root_directories=("usr", "etc"),
    users={"alice": 1000}, entries=(("root", 0), ("alice", 1000)),
    keys={"/etc/cloister/keys/anthropic.key": KEY},
)  # fmt: skip


def source(text: str = POLICY) -> SystemPolicy:
    """Return a policy as it is handed to the compiler."""
    policy = load(text, "cloister.toml")
    return SystemPolicy(policy=policy, agents=unit_agents(policy), digest="d1")


def compiled(text: str = POLICY, facts: SystemFacts = FACTS, recorded: tuple[Account, ...] = ()) -> Desired:
    """Return what a policy wants."""
    read = source(text)
    return compile_system(read, facts, give_accounts(read, facts, recorded))


def problems(text: str, facts: SystemFacts = FACTS) -> str:
    """Return the mistakes that are found, in words."""
    with pytest.raises(PolicyError) as caught:
        compiled(text, facts)
    assert caught.value.reference == "system-policy-invalid"
    return "\n".join(f"{one.where}: {one.message} -> {one.remedy}" for one in caught.value.problems)


def file(desired: Desired, path: str) -> str:
    """Return the text of a file that shall be there."""
    return next(one.text for one in desired.files if one.path == path)


def test_grants_are_for_agents_that_are_units() -> None:
    """Hostd learns who may start what where; an agent in a namespace needs no account and no grant."""
    system = msgspec.json.decode(file(compiled(), SYSTEM_FILE), type=System)
    assert [(one.user, one.agent, one.account, one.roots) for one in system.grants] == [
        ("alice", "pi", "cl-pi-alice", ("~/src", "/srv/x"))
    ]
    assert [(one.name, one.uid) for one in system.accounts] == [("cl-pi-alice", FIRST_UID)]
    assert system.policy_digest == "d1"


def test_a_grant_says_what_may_be_lifted() -> None:
    """Hostd takes it from the owner's policy, in which an agent or a profile builds sandboxes, and from no plan."""
    for more, nested in (
        ("", False),
        ("[agents.pi.hardening]\nnested = true", True),
        ("[agents.pi.agent_sandbox]\nmanaged = true", True),
        ("[profiles.deep.hardening]\nnested = true", True),
        ("[agents.own.hardening]\nnested = true", False),
    ):
        system = msgspec.json.decode(file(compiled(POLICY + more + "\n"), SYSTEM_FILE), type=System)
        assert [(one.nested, one.network) for one in system.grants] == [(nested, False)], more


def test_the_same_input_gives_the_same_system() -> None:
    """Otherwise every apply would find something to do."""
    assert compiled() == compiled()


def test_keys_of_root_reach_the_broker_by_name_and_only_those_in_use() -> None:
    """One LoadCredential= per key that an agent of the system uses; the policy goes on naming the file."""
    text = file(compiled(), f"{unit_files.UNITS}/cloister-proxyd.service")
    path = "/etc/cloister/keys/anthropic.key"
    lines = [line for line in text.splitlines() if line.startswith("LoadCredential")]
    assert lines == [f"LoadCredential={delivered_name(path)}:{path}", "LoadCredential=github"]
    assert key_paths(source()) == (path,)
    assert [one.where for one in references(source())] == [
        ".providers.anthropic.key",
        ".agents.pi.credentials.github.secret",
    ]


def test_a_key_of_the_brokers_own_user_is_read_by_itself() -> None:
    """So that a new one counts at once; systemd hands over only what the broker could not read."""
    key = KeyFile(uid=997, mode=0o600, changed=1.0, safe=True)
    own = msgspec.structs.replace(FACTS, keys={"/etc/cloister/keys/anthropic.key": key})
    text = file(compiled(facts=own), f"{unit_files.UNITS}/cloister-proxyd.service")
    assert delivered_name("/etc/cloister/keys/anthropic.key") not in text


def test_a_renewed_key_restarts_a_broker_that_has_the_old_one() -> None:
    """Systemd reads keys when it starts the unit."""
    later = msgspec.structs.replace(FACTS, proxyd_since=900.0)
    for facts, why in ((later, "/etc/cloister/keys/anthropic.key is newer than it"), (FACTS, "")):
        broker = next(one for one in compiled(facts=facts).units if one.unit == "cloister-proxyd.service")
        assert broker.restart_why == why


def test_who_is_not_granted_any_more_keeps_the_number_and_loses_the_rest() -> None:
    """Recorded accounts stay in hostd's list; runs of theirs are stopped; users are not made again."""
    gone = Account(name="cl-pi-bob", uid=FIRST_UID, agent="pi", user="bob")
    facts = msgspec.structs.replace(
        FACTS, runs=(("cloister-run-1.service", "cl-pi-bob"), ("cloister-run-2.service", "cl-pi-alice"))
    )
    desired = compiled(facts=facts, recorded=(gone,))
    system = json.loads(file(desired, SYSTEM_FILE))
    assert [one["name"] for one in system["accounts"]] == ["cl-pi-bob", "cl-pi-alice"]
    assert [one.name for one in desired.accounts] == ["cl-pi-alice"]
    assert desired.stop == (("cloister-run-1.service", "cl-pi-bob is not granted any more"),)
    assert "cl-pi-bob" not in file(desired, unit_files.SYSUSERS)
    assert desired.denied == ("cl-pi-bob", "cl-pi-alice")


def test_a_policy_without_units_installs_daemons_and_no_filter() -> None:
    """A fresh setup has nobody to hold back yet."""
    desired = compiled("schema = 1\n")
    assert desired.firewall is None
    keeper = ["cloister-auditd.service", "cloister-auditd.socket", "cloister-sensor.service"]
    sockets = ["cloister-proxyd.socket", "cloister-hostd.socket"]
    assert [one.unit for one in desired.units if one.active] == [*keeper, *sockets]
    assert compiled().firewall is not None
    assert "cloister-watchdog.service" in [one.unit for one in compiled().units]


def test_files_for_receivers_of_the_audit_have_whole_paths() -> None:
    """systemd, which reads them, knows no home; with whole paths there is a unit that sends the log."""
    sent = POLICY + '\n[audit]\nsyslog = "tls://siem:6514"\nca = "{}"\n'
    assert ".audit.ca: name the whole path" in problems(sent.format("~/ca.pem"))
    assert "cloister-audit-export.service" in [one.unit for one in compiled(sent.format("/etc/ca.pem")).units]


def test_users_must_be_named_and_exist() -> None:
    """P35 to P37: nobody, somebody unknown, an agent that nobody may start: each is told apart and mended by a line."""
    without = POLICY.split("[users", maxsplit=1)[0]
    assert "[users] must name at least one" in problems(without)
    assert "did you mean alice?" in problems(POLICY.replace("users.alice", "users.alicia"))
    nobody = POLICY.replace('agents = ["pi", "own"]', 'agents = ["own"]')
    assert ".agents.pi: nobody may start the agent pi" in problems(nobody)
    ours = msgspec.structs.replace(FACTS, users={"cl-pi-alice": FIRST_UID})
    assert "may start nothing" in problems(POLICY.replace("users.alice", "users.cl-pi-alice"), ours)


def test_keys_that_the_broker_could_not_have_are_refused_together() -> None:
    """A missing file, one that others can read, a home that the broker has not, a keyring that it has not."""
    text = POLICY.replace('"systemd:github"', '"keyring:github"')
    open_key = KeyFile(uid=0, mode=0o644, changed=1.0, safe=True)
    facts = msgspec.structs.replace(FACTS, keys={"/etc/cloister/keys/anthropic.key": open_key})
    found = problems(text, facts)
    assert ".providers.anthropic.key: others than its owner could read or change" in found
    assert ".agents.pi.credentials.github.secret: the system's broker has no desktop" in found
    assert "there is no file" in problems(POLICY, msgspec.structs.replace(FACTS, keys={}))
    assert "name the whole path" in problems(POLICY.replace("file:/etc/cloister/keys/anthropic", "file:~/a"))


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        ({"systemd_booted": False, "pid1": "runit"}, "no-systemd"),
        ({"systemd_version": 251}, "systemd-too-old"),
        ({"changeable": "/home/alice/venv"}, "installation-changeable"),
        ({"shim": ""}, "no-helper"),
        ({"sysusers": ""}, "no-sysusers"),
        ({"nft": ""}, "no-nftables"),
        ({"entries": (("mallory", FIRST_UID),)}, "uid-range-taken"),
        ({"subordinate": ("cl-pi-alice",)}, "account-changed"),
    ],
)
def test_a_host_that_cannot_have_it_is_refused_with_a_remedy(change: dict[str, object], reference: str) -> None:
    """Nothing weaker is installed instead; the unchanged host is fine."""
    with pytest.raises(UnsupportedError) as caught:
        compiled(facts=msgspec.structs.replace(FACTS, **change))
    assert caught.value.reference == reference
    assert caught.value.remedy
    assert compiled()


BRIDGED = POLICY + '[microvm]\nusers = ["alice"]\n'


def test_a_bridge_for_microvms_is_made_for_those_that_are_named():
    """Filter, unit and hostd's list; without users there is none, and nothing of it is installed."""
    desired = compiled(BRIDGED)
    files = {file.path: file for file in desired.files}

    assert "services.bridge 10.0.0.0/24" in files["/etc/systemd/system/cloister-bridge.service"].text
    assert files["/var/lib/cloister/bridge.nft"].mode == 0o600
    assert "cloister-bridge.service" in [one.unit for one in desired.units]
    assert msgspec.json.decode(files[SYSTEM_FILE].text, type=System).bridge == VmBridge(
        network="10.0.0.0/24", users=("alice",)
    )
    plain = compiled()
    assert "bridge" not in "".join(file.path for file in plain.files)
    assert "cloister-bridge.service" not in [one.unit for one in plain.units]


def test_a_bridge_needs_nft_and_users_that_there_are():
    """Without a packet filter there is no bridge; a user that the host does not know is a mistake."""
    with pytest.raises(UnsupportedError, match="nft is not installed"):
        compiled('schema = 1\n[microvm]\nusers = ["alice"]\n', msgspec.structs.replace(FACTS, nft=""))
    assert "there is no user bob" in problems(POLICY + '[microvm]\nusers = ["bob"]\n')
