"""Rules and the decision about a target, for every protocol and mode."""

from ipaddress import ip_address, ip_network

import pytest

from cloister.egress.decision import Target, admit, decide
from cloister.egress.hosts import parse_host
from cloister.egress.rules import compile_guard, compile_ruleset
from cloister.errors import PolicyError
from cloister.policy.model import Egress, EgressRule

PROTOCOLS = ["http", "connect", "socks5"]


def verdict(egress, host, port=443, *, protocol="connect", method="GET", path="/", preset=(), **answers):  # noqa: PLR0913 - a target and a policy
    """Decide about one target."""
    rules, guard = compile_ruleset(egress, preset, agent="claude"), compile_guard(egress)
    visible = {"method": method, "path": path} if protocol == "http" else {}
    return decide(rules, guard, Target(protocol, parse_host(host), port, **visible), **answers)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_reachable_without_a_rule(protocol):
    """The default is a denial that names the line which would allow it, in every protocol."""
    denied = verdict(Egress(), "example.org", 8443, protocol=protocol)
    assert (denied.action, denied.reason) == ("deny", "not-in-allowlist")
    assert denied.remedy == 'add "example.org:8443" to allow in [agents.claude.egress]'


@pytest.mark.parametrize(
    ("rule", "allowed", "denied"),
    [
        ("example.org", ["example.org", "EXAMPLE.org."], ["a.example.org", "example.org.evil.test", "xexample.org"]),
        ("*.example.org", ["a.example.org", "a.b.example.org"], ["example.org", "xexample.org", "example.org.test"]),
        ("1.1.1.1", ["1.1.1.1", "0x01010101", "::ffff:1.1.1.1"], ["1.1.1.2", "one.one.one.one"]),
        ("1.1.0.0/16", ["1.1.1.1", "16843009"], ["1.2.0.1", "2606:4700::1"]),
        ("[2606:4700::]/32", ["2606:4700::1111"], ["2606:4701::1"]),
        ("2606:4700::/32", ["2606:4700::1111"], ["2606:4701::1"]),
        ("2606:4700::1", ["[2606:4700:0::1]"], ["2606:4700::2"]),
    ],
)
def test_rules_mean_what_they_name(rule, allowed, denied):
    """Exact names, names below a suffix, addresses and networks: nothing that only looks alike."""
    egress = Egress(allow=(rule,))
    assert [host for host in allowed if not verdict(egress, host).allowed] == []
    assert [host for host in denied if verdict(egress, host).allowed] == []


def test_ports_are_part_of_a_rule():
    """A rule opens its one port; 443 is the default."""
    egress = Egress(allow=("a.test", "b.test:22", "[2606::1]:8080"))
    assert verdict(egress, "a.test", 443).allowed
    assert verdict(egress, "b.test", 22).allowed
    assert verdict(egress, "2606::1", 8080).allowed
    assert verdict(egress, "a.test", 80).reason == "port-not-allowed"
    assert not verdict(egress, "b.test", 443).allowed


def test_deny_wins():
    """A deny rule beats allow rules, presets, answers and open modes; without a port it denies every port."""
    for mode in ("deny", "ask", "learn", "internet"):
        egress = Egress(mode=mode, allow=("*.example.org", "bad.example.org:8080"), deny=("bad.example.org",))
        for port in (443, 8080, 80):
            answers = {"granted": {("bad.example.org", port)}}
            denied = verdict(egress, "bad.example.org", port, preset=("bad.example.org",), **answers)
            assert denied.reason == "denied-by-rule"
        assert verdict(egress, "good.example.org").allowed
    only_80 = Egress(mode="internet", deny=("a.example.org:80",))
    assert not verdict(only_80, "a.example.org", 80).allowed
    assert verdict(only_80, "a.example.org", 443).allowed


def test_a_deny_network_holds_for_addresses_and_for_names_that_lead_there():
    """A denied network is refused as a literal and after resolution; other addresses pass."""
    egress = Egress(mode="internet", deny=("1.1.0.0/16",))
    assert not verdict(egress, "1.1.1.1").allowed
    rules, guard = compile_ruleset(egress), compile_guard(egress)
    target = Target("connect", parse_host("a.com"), 443)
    assert admit(rules, guard, target, ip_address("1.1.1.1")).reason == "denied-by-rule"
    assert admit(rules, guard, target, ip_address("1.2.1.1")) is None


def test_methods_and_paths_limit_visible_requests():
    """GET below /repos/ is allowed, other methods and paths are named as such, and queries do not matter."""
    rule = EgressRule(host="api.test", port=80, methods=("get",), paths=("/repos/**",))
    egress = Egress(allow=(rule,))

    def ask(method, path):
        return verdict(egress, "api.test", 80, protocol="http", method=method, path=path)

    assert ask("GET", "/repos/a?q=/../x").allowed
    assert ask("POST", "/repos/a").reason == "method-not-allowed"
    assert ask("GET", "/user").reason == "path-not-allowed"
    assert ask("GET", "/repos/%2e%2e/user").reason == "path-ambiguous"


@pytest.mark.parametrize("protocol", ["connect", "socks5"])
@pytest.mark.parametrize("mode", ["deny", "ask", "learn", "internet"])
def test_limits_on_methods_close_tunnels(protocol, mode):
    """What a tunnel hides cannot be checked, so a limited rule opens no tunnel in any mode; a second rule may."""
    limited = EgressRule(host="api.test", methods=("GET",))
    assert verdict(Egress(mode=mode, allow=(limited,)), "api.test", protocol=protocol).reason == "needs-inspection"
    assert verdict(Egress(mode=mode, allow=(limited, "api.test")), "api.test", protocol=protocol).allowed


def test_a_limited_deny_rule_closes_what_it_cannot_see():
    """Denying DELETE denies tunnels and ambiguous paths as well, and leaves GET alone."""
    deny = EgressRule(host="api.test", port=80, methods=("DELETE",))
    paths = EgressRule(host="p.test", port=80, paths=("/admin/**",))
    egress = Egress(allow=("api.test:80", "p.test:80"), deny=(deny, paths))
    assert verdict(egress, "api.test", 80, protocol="http", method="GET").allowed
    assert not verdict(egress, "api.test", 80, protocol="http", method="DELETE").allowed
    assert not verdict(egress, "api.test", 80, protocol="connect").allowed
    assert verdict(egress, "p.test", 80, protocol="http", path="/a").allowed
    assert not verdict(egress, "p.test", 80, protocol="http", path="/x/../admin/a").allowed


def test_modes():
    """`ask` asks, `learn` and `internet` open public names and addresses, and none opens local names or ranges."""
    assert verdict(Egress(mode="ask"), "example.org").action == "ask"
    for mode in ("learn", "internet"):
        egress = Egress(mode=mode)
        assert verdict(egress, "example.org").reason == "allowed-by-mode"
        assert verdict(egress, "1.1.1.1").allowed
        assert verdict(egress, "nas.local").reason == "local-name"
        assert verdict(egress, "router").reason == "local-name"
    for mode in ("ask", "learn", "internet"):
        assert verdict(Egress(mode=mode), "192.168.1.1").reason == "address-refused"


def test_answers_of_the_user():
    """What the user allowed or refused for this run holds for that place only."""
    egress, place = Egress(mode="ask"), ("example.org", 443)
    assert verdict(egress, "example.org", granted={place}).reason == "allowed-by-user"
    assert verdict(egress, "example.org", refused={place}).reason == "denied-by-user"
    assert verdict(egress, "example.org", 80, granted={place}).action == "ask"


def test_an_allowed_private_address_needs_its_exception_too():
    """A rule alone does not open a private address; rule and exception do; the exception alone does not."""
    assert verdict(Egress(allow=("192.168.1.20:22",)), "192.168.1.20", 22).reason == "address-refused"
    assert verdict(Egress(allow=("192.168.1.20:22",), private=("192.168.1.20/32",)), "192.168.1.20", 22).allowed
    assert not verdict(Egress(private=("192.168.1.20/32",)), "192.168.1.20", 22).allowed


@pytest.mark.parametrize("mode", ["deny", "ask", "learn", "internet"])
def test_reserved_names_obey_exact_rules_only(mode):
    """The host's loopback opens for a rule with that port; wildcards, modes, answers and other ports do not count."""
    name = "host.cloister.internal"
    wide = Egress(mode=mode, allow=("*.cloister.internal:11434", "*.internal:11434"))
    assert verdict(wide, name, 11434, granted={(name, 11434)}).action == "deny"
    egress = Egress(mode=mode, allow=(f"{name}:11434",))
    assert verdict(egress, name, 11434).allowed
    assert not verdict(egress, name, 11435).allowed
    assert not verdict(egress, f"x.{name}", 11434).allowed
    assert not verdict(Egress(allow=(f"{name}:1",), deny=(name,)), name, 1).allowed
    assert verdict(egress, "cloister.internal", 80, protocol="http").reason == "proxy-status"
    assert not verdict(egress, "cloister.internal", 80, protocol="connect").allowed


@pytest.mark.parametrize(
    "entry",
    [
        "", "*", "*.", "**.a.test", "a.*.test", "a.test:", "a.test:0", "a.test:x", "http://a.test", "a.test/path",
        "10.0.0.1/8", "1.2.3.4/33", "*.1.2.3.4", "host.cloister.internal", "b\xfccher.test", "a.test:80:90", "a b",
        EgressRule(host="a.test:80"), EgressRule(host="a.test", port=0), EgressRule(host="a.test", methods=("G T",)),
        EgressRule(host="a.test", paths=("repos",)),
    ],
)  # fmt: skip
def test_mistakes_in_rules_are_told(entry):
    """An entry that names nothing is a mistake with its place, never a rule that matches nothing."""
    with pytest.raises(PolicyError) as caught:
        compile_ruleset(Egress(allow=("good.test", entry)), agent="claude")
    assert caught.value.problems[0].where == "[agents.claude.egress] allow[1]"


def test_all_mistakes_are_told_at_once():
    """Allow, deny, preset and private entries are checked before anything is refused."""
    with pytest.raises(PolicyError) as caught:
        compile_ruleset(Egress(allow=("a:0",), deny=("b:0",)), ("c:0",))
    assert len(caught.value.problems) == 3
    with pytest.raises(PolicyError) as caught:
        compile_guard(Egress(private=("10.0.0.0/7", "nas", "8.8.8.8", "10.1.0.0/16")))
    assert len(caught.value.problems) == 3


def test_networks_the_host_is_attached_to_are_refused():
    """A public network at the host's own door is as near as a private one; its twin elsewhere is not refused."""
    attached = (ip_network("8.8.8.0/24"), ip_network("2606:4700::/48"))
    guard = compile_guard(Egress(), (), attached)
    assert guard.check(ip_address("8.8.8.8")) is not None
    assert guard.check(ip_address("2606:4700::1")) is not None
    assert guard.check(ip_address("8.8.9.8")) is None
    assert guard.check(ip_address("2606:4701::1")) is None

    lifted = compile_guard(Egress(private=("8.8.8.8/32",)), (), attached)
    assert lifted.check(ip_address("8.8.8.8")) is None
    assert lifted.check(ip_address("8.8.8.9")) is not None


def inspected(egress, method="", path="", protocol="https"):
    """Decide about a host whose TLS ends at the broker: the tunnel (no method), or a request inside."""
    rules, guard = compile_ruleset(egress, (), agent="claude"), compile_guard(egress)
    if not method:
        return decide(rules, guard, Target("connect", parse_host("api.com"), 443, inspected=True))
    return decide(rules, guard, Target(protocol, parse_host("api.com"), 443, method, path))


def test_limits_are_held_against_requests_where_tls_ends_here():
    """A tunnel that will be looked into is allowed by a limited rule, and each request in it is held to the rule."""
    egress = Egress(allow=(EgressRule(host="api.com", methods=("GET",), paths=("/v1/**",)),))
    assert inspected(egress).reason == "allowed-by-rule"
    assert inspected(egress, "GET", "/v1/x?secret=1").allowed
    assert inspected(egress, "POST", "/v1/x").reason == "method-not-allowed"
    assert inspected(egress, "GET", "/v2/x").reason == "path-not-allowed"
    assert inspected(egress, "GET", "/v1/../v2").reason == "path-ambiguous"
    assert verdict(egress, "api.com").reason == "needs-inspection"


def test_limited_deny_rules_are_held_against_requests_where_tls_ends_here():
    """A deny rule about paths leaves the tunnel to be looked into, and refuses the request it names."""
    egress = Egress(allow=("api.com",), deny=(EgressRule(host="api.com", paths=("/admin/**",)),))
    assert inspected(egress).allowed
    assert inspected(egress, "GET", "/v1").allowed
    assert inspected(egress, "GET", "/admin/x").reason == "denied-by-rule"
    assert verdict(egress, "api.com").reason == "denied-by-rule"
    everything = Egress(allow=("api.com",), deny=("api.com",))
    assert inspected(everything).reason == "denied-by-rule"
    assert inspected(Egress()).reason == "not-in-allowlist"
