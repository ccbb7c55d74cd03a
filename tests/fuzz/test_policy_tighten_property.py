"""For any two agents: whatever a project file asks for, the result allows nothing that was not allowed before."""

from __future__ import annotations

import fnmatch
import ipaddress

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cloister.errors import PolicyError
from cloister.policy.document import Document
from cloister.policy.hosts import parse_rule
from cloister.policy.model import Agent
from cloister.policy.tighten import tighten
from cloister.policy.units import parse_duration, parse_size

HOSTS = ["a.example", "b.a.example", "c.b.a.example", "10.0.0.1", "10.1.0.1", "11.0.0.1"]
METHODS = ["GET", "POST"]
PATHS = ["/r", "/r/x", "/r/x/y", "/s"]

hosts = st.sampled_from(
    ["a.example", "*.a.example", "*.b.a.example", "b.a.example", "10.0.0.0/8", "10.0.0.1", "10.1.0.0/16"]
)
rules = hosts | st.builds(
    lambda host, port, methods, paths: {"host": host, "port": port, "methods": methods, "paths": paths},
    hosts, st.sampled_from([80, 443]), st.lists(st.sampled_from(METHODS), max_size=2),
    st.lists(st.sampled_from(["/r/**", "/r/x", "/r/x/**", "/r/*", "/**"]), max_size=2),
)  # fmt: skip
sizes = st.sampled_from(["", "1G", "2G", "1024M", "512M"])
names = st.lists(st.sampled_from(["one", "two", "three"]), max_size=3, unique=True)
numbers = st.integers(1, 4)


def table(**fields):
    """Build a table from some of these keys, so that keys are also absent."""
    return st.fixed_dictionaries({}, optional=fields)


agents = table(
    isolation=st.sampled_from(["namespace", "unit", "microvm"]),
    pass_environment=names,
    carry=names,
    sandbox_note=st.booleans(),
    git_identity=st.booleans(),
    environment_audit=st.booleans(),
    environment=st.dictionaries(st.sampled_from(["A", "B"]), st.just("1"), max_size=1),
    workspace=table(roots=names, mode=st.sampled_from(["direct", "overlay"]), protect=names, unprotected=names),
    filesystem=table(read=names, write=names, hide=names),
    egress=table(
        mode=st.sampled_from(["deny", "ask", "learn", "internet"]),
        allow=st.lists(rules, max_size=3),
        deny=st.lists(rules, max_size=2),
        private=st.lists(st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "192.168.0.1"]), max_size=2),
    ),
    llm=table(providers=names, concurrency=numbers,
              models=st.lists(st.sampled_from(["m-*", "m-1", "m-1*", "n"]), max_size=2)),
    limits=table(memory_max=sizes, tasks_max=numbers, runtime_max=st.sampled_from(["", "1h", "60m", "90s"]),
                 enforce=st.sampled_from(["available", "cgroup"])),
    hardening=table(nested=st.booleans(), ptrace=st.booleans(), netlink=st.booleans(), write_execute=st.booleans(),
                    landlock=st.sampled_from(["off", "available", "required"])),
    unit=table(block=st.lists(st.sampled_from(["198.51.100.0/24", "2001:db8::/32"]), unique=True), io_weight=numbers),
    environment_files=st.lists(st.sampled_from(["/etc/a.env", "/etc/b.env"]), unique=True),
)  # fmt: skip


def path_matches(pattern, path):
    """An oracle written apart from the code: `*` is one segment, `/**` everything below."""
    have, want = pattern.split("/"), path.split("/")
    if have[-1] == "**":
        have, want = have[:-1], want[: len(have) - 1] if len(want) >= len(have) else [None]
    return len(have) == len(want) and all(a in {"*", b} for a, b in zip(have, want, strict=True))


def matches(entry, request, *, deny):
    """Return whether one rule matches one request, judged by example rather than by comparison of rules."""
    host, port, method, path = request
    rule = parse_rule(entry, deny=deny)
    if rule.port not in {None, port} or (rule.methods and method not in rule.methods):
        return False
    if rule.paths and not any(path_matches(pattern, path) for pattern in rule.paths):
        return False
    if rule.kind == "below":
        return host.endswith("." + rule.host)
    if rule.kind == "name":
        return host == rule.host
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule.host)
    except ValueError:
        return False


def reachable(agent):
    """Return every request of a small world that the allow and deny lists let through."""
    world = [(h, p, m, q) for h in HOSTS for p in (80, 443) for m in METHODS for q in PATHS]
    return {
        each for each in world
        if any(matches(rule, each, deny=False) for rule in agent.egress.allow)
        and not any(matches(rule, each, deny=True) for rule in agent.egress.deny)
    }  # fmt: skip


def models(agent):
    """Return the models of a small world that the agent may use."""
    patterns = agent.llm.models or ("*",)
    return {model for model in ("m-1", "m-12", "m-2", "n") if any(fnmatch.fnmatchcase(model, p) for p in patterns)}


def power(agent):
    """Return sets and numbers of which a narrowed agent may never have more."""
    isolation = ["microvm", "unit", "namespace"]
    modes = ["deny", "ask", "learn", "internet"]
    limit = agent.limits
    sets = (
        set(agent.pass_environment), set(agent.carry), set(agent.environment.items()), set(agent.filesystem.read),
        set(agent.filesystem.write), set(agent.workspace.unprotected), set(agent.llm.providers), models(agent),
        {address for address in [*HOSTS[3:], "192.168.0.1"]
         if any(ipaddress.ip_address(address) in ipaddress.ip_network(net) for net in agent.egress.private)},
        reachable(agent), set(agent.workspace.roots) or {"project"}, {agent.unit.io_weight},
        set(agent.command), set(agent.environment_files),
    )  # fmt: skip
    scale = (
        isolation.index(agent.isolation), modes.index(agent.egress.mode), agent.workspace.mode == "direct",
        parse_size(limit.memory_max) if limit.memory_max else float("inf"), limit.tasks_max or float("inf"),
        parse_duration(limit.runtime_max) if limit.runtime_max else float("inf"), limit.enforce == "available",
        agent.hardening.nested, agent.hardening.ptrace, agent.hardening.netlink, agent.hardening.write_execute,
        ["required", "available", "off"].index(agent.hardening.landlock),
        agent.llm.concurrency or float("inf"), agent.git_identity,
    )  # fmt: skip
    refused = (
        set(agent.workspace.protect), set(agent.filesystem.hide), set(agent.agent_sandbox.deny_read),
        set(agent.unit.block),
    )  # fmt: skip
    return sets, scale, refused


@settings(max_examples=400, deadline=None)
@given(agents, agents)
def test_a_tightened_agent_has_no_power_the_base_had_not(base, wanted):
    """Accepted or refused, a project file never gives an agent anything."""
    agent = msgspec.convert(base, Agent)
    try:
        result = tighten(agent, Document(".cloister.toml", {"schema": 1, "every_agent": wanted}), ("every_agent",))
    except PolicyError:
        assume(False)  # refused is safe; hypothesis looks for accepted ones
        return
    before, after = power(agent), power(result)
    assert all(now <= then for then, now in zip(before[0], after[0], strict=True))
    assert all(now <= then for then, now in zip(before[1], after[1], strict=True))
    assert all(now >= then for then, now in zip(before[2], after[2], strict=True))


@settings(max_examples=200, deadline=None)
@given(agents, st.data())
def test_parts_of_what_holds_are_accepted(base, data):
    """The twin: a project file that repeats a part of the agent's own keys is obeyed, not refused."""
    agent = msgspec.convert(base, Agent)
    keys = data.draw(st.lists(st.sampled_from(sorted(base)), unique=True) if base else st.just([]))
    part = {key: base[key] for key in keys}
    result = tighten(agent, Document(".cloister.toml", {"schema": 1, "every_agent": part}), ("every_agent",))
    assert result == agent
