"""The environment of an agent: from nothing, by name, without values of the caller's in the plan."""

import msgspec

from cloister.isolation.environment import Situation, compose
from cloister.isolation.managed import managed_settings
from cloister.isolation.note import sandbox_note
from cloister.policy.model import Agent, AgentSandbox, Egress, EgressRule, Preset

SITUATION = Situation(run="r", agent="a", user="me", home="/home/me", workspace="/w", git=(("user.name", "Me"),))


def test_nothing_but_the_named_is_inherited() -> None:
    """Only harmless terminal variables and names from the policy are taken from the caller."""
    literal, inherit = compose(Agent(pass_environment=("WANTED",)), Preset(schema=1), SITUATION)

    assert "WANTED" in inherit
    assert "TERM" in inherit
    assert not {"SSH_AUTH_SOCK", "LD_PRELOAD", "AWS_SECRET_ACCESS_KEY", "DBUS_SESSION_BUS_ADDRESS"} & {
        *literal,
        *inherit,
    }


def test_the_policys_own_values_win() -> None:
    """What the policy sets is neither inherited nor overridden."""
    literal, inherit = compose(Agent(environment={"TERM": "dumb", "HTTPS_PROXY": "x"}), Preset(schema=1), SITUATION)

    assert literal["TERM"] == "dumb"
    assert literal["HTTPS_PROXY"] == "x"
    assert "TERM" not in inherit


def test_placeholders_are_filled_and_other_braces_stay() -> None:
    """`{home}` is the home; JSON in a variable is left alone."""
    literal, _ = compose(Agent(environment={"A": "{home}/x", "B": '{"a": 1}'}), Preset(schema=1), SITUATION)

    assert (literal["A"], literal["B"]) == ("/home/me/x", '{"a": 1}')


def test_git_identity_travels_without_a_file() -> None:
    """git-config(1), GIT_CONFIG_COUNT."""
    literal, _ = compose(Agent(), Preset(schema=1), SITUATION)

    assert (literal["GIT_CONFIG_COUNT"], literal["GIT_CONFIG_KEY_0"], literal["GIT_CONFIG_VALUE_0"]) == (
        "1",
        "user.name",
        "Me",
    )


def test_managed_settings_leave_no_way_out() -> None:
    """Claude Code's own sandbox is on, must be there, and cannot be left; our allowlist and port stand in it."""
    agent = Agent(
        egress=Egress(allow=("api.example.org:443", EgressRule(host="*.example.net"), "10.0.0.0/8")),
        agent_sandbox=AgentSandbox(managed=True, deny_read=("~/private",)),
    )
    sandbox = msgspec.json.decode(managed_settings(agent))["sandbox"]

    assert (sandbox["enabled"], sandbox["failIfUnavailable"], sandbox["allowUnsandboxedCommands"]) == (
        True,
        True,
        False,
    )
    assert sandbox["network"]["allowedDomains"] == ["api.example.org", "*.example.net"]
    assert sandbox["network"]["httpProxyPort"] == 3128
    assert {"~/.ssh", "~/private"} <= set(sandbox["filesystem"]["denyRead"])


def test_the_note_names_what_is_reachable() -> None:
    """The model learns its limits, and that refusals are final."""
    note = sandbox_note(workspace="/w", egress=("api.example.org",), mode="deny", overlay=False)

    assert "/w" in note
    assert "api.example.org" in note
    assert "nothing" in sandbox_note(workspace="/w", egress=(), mode="deny", overlay=False)


def test_models_by_a_variable_for_the_address_and_one_for_the_socket() -> None:
    """A product that knows both gets both, unless the policy points it elsewhere: the socket would win over that."""
    preset = Preset(schema=1, base_url={"anthropic": "BASE"}, unix_socket="SOCKET")
    served = msgspec.structs.replace(SITUATION, protocols=("anthropic",))
    literal, _ = compose(Agent(), preset, served)
    own, _ = compose(Agent(environment={"BASE": "https://models.example.org"}), preset, served)
    without, _ = compose(Agent(), preset, SITUATION)

    assert (literal["BASE"], literal["SOCKET"]) == ("http://127.0.0.1:11435", "/run/cloister/box/egress.sock")
    assert own["BASE"] == "https://models.example.org"
    assert not {"SOCKET"} & {*own, *without}
    assert "BASE" not in without
