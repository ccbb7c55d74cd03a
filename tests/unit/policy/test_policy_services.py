"""`[services]`: what a gateway inherits, and each condition on it with its twin that is right."""

from __future__ import annotations

import pytest

from cloister.errors import PolicyError
from cloister.policy.document import read
from cloister.policy.load import load, load_document
from cloister.policy.presets import BUILTIN
from cloister.policy.service_instances import Gateway, gateways

HEAD = """\
schema = 1
[providers.anthropic]
key = "file:/etc/cloister/keys/anthropic"
[providers.openrouter]
protocol = "openai"
base_url = "https://openrouter.ai/api"
[agents.claw]
preset = "openclaw"
isolation = "unit"
llm.providers = ["anthropic"]
[agents.near]
preset = "openclaw"
[agents.own]
preset = "openclaw"
isolation = "unit"
[agents.router]
preset = "openclaw"
isolation = "unit"
llm.providers = ["openrouter"]
[agents.other]
command = ["/usr/bin/true"]
isolation = "unit"
"""
SWAPPED = 'channels.other.x.token = "{{secret:y}}"\nsecrets.y = {{secret = "{}", inject = {{{}}}}}'
HOME = '[services.home]\nagent = "claw"\nenable = true\nauth.token = "file:/etc/cloister/keys/gateway"\n'


def messages(text: str) -> list[str]:
    """Return what is wrong with a policy: where, and the message."""
    try:
        load(HEAD + text, "p.toml", preset_names=BUILTIN)
    except PolicyError as error:
        return [f"{problem.where.split(' ', 1)[-1]} {problem.message}" for problem in error.problems]
    return []


def declared(text: str) -> dict[str, Gateway]:
    """Return the gateways of a good policy by their labels."""
    document = read(HEAD + text, "p.toml")
    load_document(document, preset_names=BUILTIN)
    return {gateway.label: gateway for gateway in gateways(document.tables)}


def test_a_service_without_instances_is_one_named_default():
    """O38: no instances mean one, named default, which is off until the service says enable."""
    one = declared(HOME)["home"]
    assert (one.name, one.settings.enable, one.settings.port) == ("default", True, 18789)
    assert not declared(HOME.replace("enable = true\n", ""))["home"].settings.enable


def test_an_instance_inherits_everything_and_overrides_single_keys():
    """O36, OF14: providers, channels, auth, model and routing reach the instance; one key of a table may differ."""
    text = HOME + (
        'model.thinking = "low"\n'
        'routing.queue.mode = "collect"\n'
        'config_overrides.logging = {level = "info", file = "x"}\n'
        'channels.telegram = {enable = true, bot_token = "file:/k/t", allow_from = [1, "@ann"]}\n'
        "instances.a = {}\n"
        'instances.b = {port = 19000, channels.telegram.allow_from = [2], config_overrides.logging.level = "debug"}\n'
        "instances.c = {enable = false, port = 20000}\n"
    )
    found = declared(text)
    assert list(found) == ["home/a", "home/b", "home/c"]
    a, b = found["home/a"].settings, found["home/b"].settings
    assert (a.model.thinking, a.routing.queue.mode, a.auth.token) == (
        "low",
        "collect",
        "file:/etc/cloister/keys/gateway",
    )
    assert a.channels.telegram.allow_from == (1, "@ann")
    assert b.channels.telegram.allow_from == (2,)
    assert b.channels.telegram.bot_token == "file:/k/t"
    assert b.config_overrides == {"logging": {"level": "debug", "file": "x"}}
    assert not found["home/c"].settings.enable


def test_instances_are_on_without_a_word_of_their_service():
    """O38: a service that only has instances is active; each of them can be off."""
    text = HOME.replace("enable = true\n", "") + "instances.a = {}\ninstances.b = {enable = false, port = 19000}\n"
    assert {label: one.settings.enable for label, one in declared(text).items()} == {"home/a": True, "home/b": False}
    off = HOME.replace("enable = true", "enable = false") + "instances.a = {}\n"
    assert not declared(off)["home/a"].settings.enable


def test_telegram_works_at_the_top_level():
    """OF1: telegram on the service itself, with no instances, is a policy that loads, groups or not."""
    text = HOME + 'channels.telegram = {enable = true, bot_token = "file:/k/t", allow_from = [1]}\n'
    assert declared(text)["home"].settings.channels.telegram.groups == {}


def test_providers_are_optional():
    """OR1: no Anthropic, or no provider at all, is no mistake; a model of a provider that is not allowed is one."""
    assert messages(HOME.replace('"claw"', '"own"')) == []
    assert messages(HOME.replace('"claw"', '"router"') + 'model.primary = "openrouter/x/y"\n') == []
    (refused,) = messages(HOME.replace('"claw"', '"router"'))
    assert refused == ".services.home.model.primary the agent may not use a provider 'anthropic'"


@pytest.mark.parametrize(
    ("bad", "good", "where"),
    [
        ('agent = "gone"', "", ".agent"),
        ('agent = "near"', "", ".agent"),
        (
            "channels.telegram = {enable = true, allow_from = [1]}",
            'channels.telegram = {enable = true, allow_from = [1], bot_token = "systemd:bot"}',
            ".channels.telegram.bot_token",
        ),
        (
            'channels.telegram = {enable = true, bot_token = "file:/k"}',
            'channels.telegram = {enable = true, bot_token = "file:/k", dm_policy = "pairing"}',
            ".channels.telegram.allow_from",
        ),
        (
            'channels.telegram = {enable = true, bot_token = "file:/k", allow_from = ["*"]}',
            'channels.telegram = {enable = true, bot_token = "file:/k", allow_from = ["*"], dm_policy = "open"}',
            ".channels.telegram.allow_from",
        ),
        ('auth.mode = "password"', 'auth = {mode = "password", password = "file:/k"}', ".auth.password"),
        ("auth = {}", 'auth.token = "systemd:gateway"', ".auth.token"),
        ('auth.token = "env:TOKEN"', 'auth.token = "file:/k"', ".auth.token"),
        ('auth.token = "file:~/k"', 'auth.token = "file:/k"', ".auth.token"),
        (
            'skills = [{name = "a", source = "/etc/a"}, {name = "a", source = "/etc/b"}]',
            'skills = [{name = "a", source = "/etc/a"}, {name = "b", source = "/etc/b"}]',
            ".skills[1].name",
        ),
        ('skills = [{name = "a"}]', 'skills = [{name = "a", mode = "inline"}]', ".skills[0]"),
        (
            'skills = [{name = "../a", mode = "inline"}]',
            'skills = [{name = "a_b", mode = "inline"}]',
            ".skills[0].name",
        ),
        ('documents.directory = "docs"', 'documents.directory = "/etc/cloister-docs"', ".documents.directory"),
        ('documents.writable = ["SOUL.md"]', "", ".documents.directory"),
        (
            'config_overrides.gateway.auth.mode = "none"',
            "config_overrides.gateway.tls = {}",
            ".config_overrides.gateway.auth",
        ),
        ('config_overrides.x = "{secret:y}"', "", ".config_overrides.x"),
        ('secrets.y = "file:/y"', 'secrets.y = "file:/y"\nconfig_overrides.x = "{secret:y}"', ".secrets.y"),
        (
            'secrets.y = "file:/y"\nconfig_overrides = {x = "a{secret:y}", z = "{secret:y}"}',
            'secrets.y = "file:/y"\nchannels.other.discord.token = "{secret:y}"',
            ".config_overrides.x",
        ),
        (
            'channels.telegram = {enable = true, bot_token = "file:/k", allow_from = [1], api_root = "http://bots.lan"}',
            'channels.telegram = {enable = true, bot_token = "file:/k", allow_from = [1], api_root = "https://b.lan:8443"}',
            ".channels.telegram.api_root",
        ),
        (
            'channels.telegram = {enable = true, bot_token = "file:/k", allow_from = [1], api_root = "https://10.0.0.1"}',
            "",
            ".channels.telegram.api_root",
        ),
        (
            'config_overrides.channels.telegram.apiRoot = "https://elsewhere.example"',
            "config_overrides.channels.telegram.mediaMaxMb = 5",
            ".config_overrides.channels.telegram.apiRoot",
        ),
        (SWAPPED.format("file:/y", "host = '*.slack.com', scheme = 'bearer'"), "", ".secrets.y.inject"),
        (SWAPPED.format("env:Y", "host = 'x.org', scheme = 'bearer'"), "", ".secrets.y.secret"),
        (
            SWAPPED.format("file:/y", "host = 'x.org', scheme = 'path', value = '../{secret}'"),
            SWAPPED.format("file:/y", "host = 'x.org', scheme = 'path', value = 'bot{secret}'"),
            ".secrets.y.inject.value",
        ),
        ('ready = "/healthz"', "", ".ready"),
        ("config_overrides.x = 1979-05-27", 'config_overrides.x = "1979-05-27"', ".config_overrides.x"),
        ("channels.other.telegram = {}", "channels.other.discord = {}", ".channels.other.telegram"),
        ('tools.include = ["/bin/ls"]', 'tools.include = ["ls"]', ".tools.include[0]"),
        (
            'tools = {include = ["ls"], exclude = ["ls"]}',
            'tools = {include = ["ls"], exclude = ["curl"]}',
            ".tools.exclude",
        ),
        ('environment.LD_PRELOAD = "/x"', 'environment.LANG = "C"', ".environment.LD_PRELOAD"),
        ('environment.OPENCLAW_STATE_DIR = "/x"', 'environment.OPENCLAW_LOG_LEVEL = "debug"', ".environment.OPENCLAW"),
        ('environment_files = ["x"]', 'environment_files = ["-/etc/default/claw"]', ".environment_files[0]"),
        ('plugins.p.source = "p"', 'plugins.p.source = "/etc/p"', ".plugins.p.source"),
        (
            'plugins.p = {source = "/etc/p", env.KEY = "x"}',
            'plugins.p = {source = "/etc/p", env.KEY = "file:/k"}',
            ".plugins.p.env.KEY",
        ),
    ],
)
def test_each_condition_names_its_key(bad, good, where):
    """O70 to O77 and those beside them: one mistake, at the key it is about, and none in its right twin."""
    own = {line.split(" = ")[0].split(".")[0] for line in (bad or good).splitlines()}
    base = "".join(
        f"{line}\n"
        for line in HOME.splitlines()
        if not (line.split(" = ")[0].split(".")[0] in own and line != "[services.home]")
    )
    (found,) = messages(base + bad + "\n")
    assert found.startswith(f".services.home{where}")
    assert messages((base if good else HOME) + good + "\n") == []


def test_messages_name_the_instance():
    """O70: what is wrong with an instance is said with its path."""
    (found,) = messages(HOME + "instances.b.channels.telegram = {enable = true, allow_from = [1]}\n")
    assert found == ".services.home.instances.b.channels.telegram.bot_token telegram is enabled and has no bot_token"


@pytest.mark.parametrize(("port", "mistakes"), [(18789, 1), (18790, 1), (18908, 1), (18909, 0), (18669, 0), (18670, 1)])
def test_gateways_keep_their_distance(port, mistakes):
    """OF2: OpenClaw derives 110 ports from its own, so instances and services of it are 120 apart."""
    assert len(messages(f"{HOME}instances.a = {{}}\ninstances.b.port = {port}\n")) == mistakes
    other = HOME.replace("home", "work")
    assert len(messages(f"{HOME}{other}port = {port}\n")) == mistakes


def test_the_default_port_is_not_shared_in_silence():
    """OF2: two instances that say nothing of ports would both serve 18789."""
    (found,) = messages(HOME + "instances.a = {}\ninstances.b = {}\n")
    assert found.endswith("18789 is the same port as that of the gateway home/a")


def test_other_programs_need_one_port_only():
    """A gateway that is no OpenClaw derives no ports; what only OpenClaw has is refused for it."""
    plain = '[services.plain]\nagent = "other"\nenable = true\nport = 18790\n'
    assert messages(HOME + plain) == []
    assert len(messages(HOME + plain.replace("18790", "18789"))) == 1
    assert len(messages(plain + 'model.thinking = "low"\n')) == 1


@pytest.mark.parametrize(("ready", "good"), [("/healthz?full=1", True), ("healthz", False), ("/a b", False)])
def test_another_program_says_how_it_is_ready(ready, good):
    """A path of its port; anything else is a mistake at the key."""
    found = messages(f'[services.x]\nagent = "other"\nready = "{ready}"\n')
    assert found == ([] if good else [".services.x.ready this is a path, such as /healthz"])


def test_names_of_units_do_not_collide():
    """The service a-b and the instance b of a would share unit, user and state."""
    text = HOME.replace("home", "a") + "instances.b = {}\n" + HOME.replace("home", "a-b") + "port = 20000\n"
    assert messages(text) == [".services.a.instances.b two gateways would both be called a-b"]


def test_mistakes_of_form_come_first():
    """A misspelt key is reported once, with what was meant, and nothing made up beside it."""
    (found,) = messages(HOME.replace("auth.token", "auth.tokn"))
    assert found == ".services.home.auth.tokn unknown key"


def test_a_gateway_in_a_guest_is_pointed_to_its_own_way():
    """A service is a unit; whoever names an agent in a guest is told how a gateway is started there."""
    text = HEAD + '[agents.guest]\npreset = "openclaw"\nisolation = "microvm"\n' + HOME.replace('"claw"', '"guest"')
    with pytest.raises(PolicyError) as caught:
        load(text, "p.toml", preset_names=BUILTIN)
    (problem,) = caught.value.problems
    assert "cloister vm start" in problem.remedy
    with pytest.raises(PolicyError) as caught:
        load(HEAD + HOME.replace('"claw"', '"near"'), "p.toml", preset_names=BUILTIN)
    assert "vm start" not in caught.value.problems[0].remedy
