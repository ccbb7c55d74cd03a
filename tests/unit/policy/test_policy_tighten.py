"""A project file may only tighten: every key has a rule, and every rule refuses to widen."""

from __future__ import annotations

import msgspec
import pytest

from cloister.errors import PolicyError
from cloister.policy import model
from cloister.policy.document import read
from cloister.policy.load import load, load_project
from cloister.policy.tighten import RULES, tighten, tighten_project

BASE = load(
    """
schema = 1
[providers.one]
[providers.two]
[agents.a]
preset = "shell"
isolation = "unit"
command = ["sh"]
environment.A = "1"
pass_environment = ["EDITOR", "PAGER"]
carry = [".x", ".y"]
sandbox_note = false
environment_audit = false
workspace.roots = ["~/src", "~/p"]
workspace.protect = ["ci"]
workspace.unprotected = [".vscode", ".idea"]
filesystem.read = ["/srv/a", "/srv/b"]
filesystem.write = ["/srv/c"]
filesystem.hide = ["~/src/secret"]
egress.mode = "learn"
egress.allow = ["*.example.org", "a.example:80", { host = "api.example", methods = ["GET", "POST"], paths = ["/r/**"] },
  "10.0.0.0/8:443"]
egress.deny = ["bad.example"]
egress.private = ["10.0.0.0/8"]
credentials.g.secret = "env:G"
llm.providers = ["one", "two"]
llm.models = ["claude-*", "gpt-5"]
llm.requests_per_minute = 60
llm.cost_per_day_usd = 20
limits.memory_max = "4G"
limits.cpu_quota = "200%"
limits.runtime_max = "8h"
limits.tasks_max = 100
hardening.nested = true
hardening.ptrace = true
agent_sandbox.deny_read = ["~/.ssh"]
microvm.memory = "4G"
microvm.disk_rate = "100M"
microvm.cpus = 4
[agents.bare]
preset = "shell"
[agents.strict]
preset = "shell"
git_identity = false
workspace.mode = "overlay"
[agents.strict.llm]
concurrency = 2
max_tokens = 9
tokens_per_minute = 9
tokens_per_day = 9
cost_per_run_usd = 1
cost_per_month_usd = 1
[agents.strict.limits]
disk_max = "1G"
open_files = 64
enforce = "cgroup"
[agents.strict.hardening]
write_execute = false
netlink = false
landlock = "required"
[agents.strict.microvm]
disk = "1G"
""",
    "p.toml",
).agents


def narrowed(lines, agent="a"):
    """Apply a project file with these keys for every agent."""
    _, document = load_project("schema = 1\n[every_agent]\n" + lines + "\n", ".cloister.toml")
    return tighten(BASE[agent], document, ("every_agent",))


def refused(lines, agent="a"):
    """Return the problems of a project file that asks for more."""
    with pytest.raises(PolicyError) as caught:
        narrowed(lines, agent)
    assert caught.value.reference == "policy-widens"
    return caught.value.problems


def tables_of(kind):
    """Yield a table type and every table type that is a field of it."""
    yield kind
    for info in msgspec.structs.fields(kind):
        if isinstance(info.type, type) and issubclass(info.type, msgspec.Struct):
            yield from tables_of(info.type)


def test_every_key_of_an_agent_has_a_rule():
    """A key that is added to the model cannot be forgotten here."""
    for kind in tables_of(model.Agent):
        keys = {
            info.name
            for info in msgspec.structs.fields(kind)
            if not (isinstance(info.type, type) and issubclass(info.type, msgspec.Struct))
        }
        assert set(RULES[kind]) == keys, kind.__name__


WIDER_AND_NARROWER = [
    ("isolation = 'namespace'", "isolation = 'microvm'"),
    ("workspace.roots = ['~/src', '~/other']", "workspace.roots = ['~/src']"),
    ("workspace.roots = ['~/src/sub']", "workspace.roots = ['~/p', '~/src']"),
    ("workspace.roots = []", "workspace.roots = ['~/p']"),
    ("workspace.unprotected = ['.vscode', '.husky']", "workspace.unprotected = []"),
    ("filesystem.read = ['/srv/c']", "filesystem.read = ['/srv/a']"),
    ("filesystem.read = ['/srv/a/sub']", "filesystem.read = []"),
    ("filesystem.write = ['/srv/a']", "filesystem.write = []"),
    ("egress.mode = 'internet'", "egress.mode = 'ask'"),
    ("egress.mode = 'internet'", "egress.mode = 'deny'"),
    ("egress.allow = ['example.org']", "egress.allow = ['x.y.example.org']"),
    ("egress.allow = ['xexample.org']", "egress.allow = ['*.y.example.org']"),
    ("egress.allow = ['x.example.org:80']", "egress.allow = ['*.example.org:443']"),
    ("egress.allow = ['a.example']", "egress.allow = ['a.example:80']"),
    ("egress.allow = ['b.a.example:80']", "egress.allow = [{host = 'a.example', port = 80, methods = ['GET']}]"),
    ("egress.allow = ['api.example']", "egress.allow = [{host='api.example', methods=['GET'], paths=['/r/x/**']}]"),
    (
        "egress.allow = [{host='api.example', methods=['PUT'], paths=['/r/x']}]",
        "egress.allow = [{host='api.example', methods=['POST'], paths=['/r/x']}]",
    ),
    (
        "egress.allow = [{host='api.example', methods=['GET'], paths=['/rx']}]",
        "egress.allow = [{host='api.example', methods=['GET'], paths=['/r/**']}]",
    ),
    ("egress.allow = [{host='api.example', methods=['GET']}]", "egress.allow = []"),
    ("egress.allow = ['11.0.0.1']", "egress.allow = ['10.1.0.0/16']"),
    ("egress.allow = ['8.0.0.0/6']", "egress.allow = ['10.1.2.3']"),
    ("egress.private = ['192.168.0.1']", "egress.private = ['10.1.2.3']"),
    ("llm.providers = ['three']", "llm.providers = ['one']"),
    ("llm.models = ['*']", "llm.models = ['claude-haiku-*']"),
    ("llm.models = []", "llm.models = ['claude-x', 'gpt-5']"),
    ("llm.models = ['gpt-5-pro']", "llm.models = ['gpt-5']"),
    ("llm.requests_per_minute = 61", "llm.requests_per_minute = 60"),
    ("llm.cost_per_day_usd = 20.1", "llm.cost_per_day_usd = 0"),
    ("limits.memory_max = '4097M'", "limits.memory_max = '4096M'"),
    ("limits.memory_max = ''", "limits.disk_max = '1G'"),
    ("limits.cpu_quota = '201%'", "limits.cpu_quota = '50%'"),
    ("limits.runtime_max = '9h'", "limits.runtime_max = '30m'"),
    ("limits.tasks_max = 101", "limits.tasks_max = 1"),
    ("microvm.memory = '5G'", "microvm.memory = '1G'"),
    ("microvm.disk_rate = '200M'", "microvm.disk_rate = '50M'"),
    ("microvm.cpus = 5", "microvm.cpus = 1"),
    ("pass_environment = ['EDITOR', 'AWS_PROFILE']", "pass_environment = ['EDITOR']"),
    ("carry = ['.z']", "carry = []"),
    ("command = ['bash']", "command = ['sh']"),
    ("environment.B = '1'", "environment.A = '1'"),
    ("environment.A = '2'", "preset = 'shell'"),
    ("preset = 'claude'", "sandbox_note = true"),
    ("credentials.h.secret = 'env:H'", "environment_audit = true"),
    ("credentials.g.secret = 'file:/etc/shadow'", "credentials.g.secret = 'env:G'"),
    ("egress.upstream_proxy = 'env'", "egress.upstream_proxy = ''"),
    ("egress.preset_hosts = true", "git_identity = false"),
    ("agent_sandbox.managed = true", "agent_sandbox.deny_read = ['~/.aws']"),
    ("hardening.landlock = 'off'", "hardening.landlock = 'required'"),
]


@pytest.mark.parametrize(("wider", "narrower"), WIDER_AND_NARROWER)
def test_widening_is_refused_and_narrowing_is_not(wider, narrower):
    """For each key: more than the owner allows is an error that names the key, less is obeyed."""
    (problem,) = refused(wider)
    assert wider.split(" = ")[0].split(".")[0] in problem.where
    narrowed(narrower)


@pytest.mark.parametrize(
    "same",
    [
        "workspace.mode = 'direct'",
        "hardening.nested = true",
        "hardening.ptrace = true",
        "egress.mode = 'learn'",
        "limits.memory_max = '4096M'",
    ],
)
def test_what_holds_already_may_be_written(same):
    """Writing what holds anyway is no mistake, so that a project can state what it relies on."""
    narrowed(same)


@pytest.mark.parametrize("wider", ["hardening.nested = true", "hardening.ptrace = true", "workspace.roots = ['/s']"])
def test_opt_outs_cannot_be_made_by_a_project(wider):
    """A repository cannot weaken the sandbox of whoever clones it."""
    assert refused(wider, "bare")


@pytest.mark.parametrize(
    "wider",
    [
        "sandbox_note = false",
        "environment_audit = false",
        "git_identity = true",
        "workspace.mode = 'direct'",
        "llm.concurrency = 3",
        "llm.max_tokens = 10",
        "llm.tokens_per_minute = 10",
        "llm.tokens_per_day = 10",
        "llm.cost_per_run_usd = 1.5",
        "llm.cost_per_month_usd = 1.5",
        "limits.disk_max = '2G'",
        "limits.open_files = 65",
        "limits.enforce = 'available'",
        "hardening.write_execute = true",
        "hardening.netlink = true",
        "hardening.landlock = 'available'",
        "microvm.image = 'other'",
        "microvm.disk = '2G'",
        "microvm.monitor = 'qemu'",
    ],
)
def test_strictness_cannot_be_taken_back(wider):
    """What the owner made strict stays strict, whatever the project would like."""
    assert refused(wider, "strict")


def test_deny_lists_only_grow():
    """What was refused stays refused; the project adds to it."""
    agent = narrowed(
        "egress.deny = ['worse.example']\nfilesystem.hide = ['~/src/x']\nworkspace.protect = ['ci', 'deploy']\n"
        "agent_sandbox.deny_read = []"
    )
    assert agent.egress.deny == ("bad.example", "worse.example")
    assert agent.filesystem.hide == ("~/src/secret", "~/src/x")
    assert agent.workspace.protect == ("ci", "deploy")
    assert narrowed("workspace.protect = ['deploy']").workspace.protect == ("ci", "deploy")
    assert agent.agent_sandbox.deny_read == ("~/.ssh",)


def test_keys_that_were_not_written_stay_as_they_are():
    """Defaults of the model are not wishes of the project: only what is written counts."""
    agent = narrowed("limits.tasks_max = 5")
    assert msgspec.structs.replace(agent, limits=BASE["a"].limits) == BASE["a"]
    assert agent.limits.tasks_max == 5
    assert agent.limits.memory_max == "4G"


def test_all_attempts_are_reported_at_once():
    """A project file with three wishes gets three answers, with their lines."""
    problems = refused("hardening.landlock = 'off'\ncarry = ['.z']\nlimits.tasks_max = 500")
    assert [problem.where for problem in problems] == [
        ".cloister.toml:3 .every_agent.hardening.landlock",
        ".cloister.toml:4 .every_agent.carry",
        ".cloister.toml:5 .every_agent.limits.tasks_max",
    ]


def test_both_tables_of_a_project_file_hold():
    """`every_agent` first, then the agent's own table; each can only narrow what the other left."""
    _, document = load_project(
        "schema = 1\n[every_agent]\nlimits.tasks_max = 50\n[agents.a]\nlimits.tasks_max = 40\n"
        "[agents.other]\nlimits.tasks_max = 1\n",
        ".cloister.toml",
    )
    assert tighten_project(BASE["a"], "a", document).limits.tasks_max == 40
    assert tighten_project(BASE["bare"], "bare", document).limits.tasks_max == 50
    wrong = read("schema = 1\n[every_agent]\nlimits.tasks_max = 40\n[agents.a]\nlimits.tasks_max = 50\n", "x")
    with pytest.raises(PolicyError):
        tighten_project(BASE["a"], "a", wrong)


def test_a_system_policy_caps_a_users_file():
    """The same rules hold a user's own policy below the system's agent of that name."""
    user = read('schema = 1\n[agents.a]\npreset = "shell"\nlimits.memory_max = "2G"\n', "cloister.toml")
    assert tighten(BASE["a"], user, ("agents", "a")).limits.memory_max == "2G"
    greedy = read('schema = 1\n[agents.a]\nlimits.memory_max = "8G"\n', "cloister.toml")
    with pytest.raises(PolicyError):
        tighten(BASE["a"], greedy, ("agents", "a"))
