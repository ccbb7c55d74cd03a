"""What is installed for gateways: that it holds what was declared, and what a host must have for it."""

from __future__ import annotations

import json

import msgspec
import pytest

from cloister.errors import PolicyError
from cloister.plan.service_facts import SourceFile
from cloister.policy.document import read
from cloister.policy.services import Tools
from cloister.runs.service_documents import report
from cloister.runs.system_services import secrets
from support.gateways import FACTS, POLICY, SOURCES, files, rendered

SIGNS = "'a b' holds spaces or signs: a service is shown names of letters, digits and /._+@- only"


def config(joined: str = "home-a", policy: str = POLICY) -> dict[str, object]:
    """Return the configuration of a gateway."""
    found: dict[str, object] = json.loads(files(rendered(policy)[joined])["openclaw.json"].text)
    return found


def lines(joined: str = "home-a", policy: str = POLICY) -> list[str]:
    """Return the lines of a gateway's unit."""
    return files(rendered(policy)[joined])[f"cloister-service-{joined}.service"].text.splitlines()


def problems(policy: str = POLICY, **facts: object) -> list[str]:
    """Return what this host lacks."""
    try:
        rendered(policy, msgspec.structs.replace(FACTS, **facts))
    except PolicyError as error:
        return [problem.message for problem in error.problems]
    return []


def test_instances_share_nothing():
    """OF10: each has its own user, state, workspace, port and unit; only what was declared for both is the same."""
    one, two = rendered()["home-a"], rendered()["home-b"]
    assert one.account != two.account
    assert not {file.path for file in one.files} & {file.path for file in two.files}
    assert "home-b" not in "\n".join(lines("home-a"))
    assert "ListenStream=127.0.0.1:19000" in files(two)["cloister-port-home-b.socket"].text


def test_no_secret_reaches_the_environment_or_the_configuration():
    """OF5: secrets are credentials of systemd; variables, arguments and configuration name places only."""
    text = "\n".join(line for line in lines() if line.startswith(("Environment", "ExecStart=")))
    assert "/etc/cloister/keys" not in text
    assert "/etc/cloister/keys" not in json.dumps(config())
    assert "LoadCredential=gateway:/etc/cloister/keys/gateway" in lines()
    assert "LoadCredential=secret-discord:discord" in lines()


def test_the_secret_of_a_channel_stays_outside():
    """What travels in requests is a placeholder inside, which the broker hands to the unit; its own token is real."""
    made, config_of = lines(), config()
    assert "LoadCredential=telegram:/run/cloister/proxy/services/home-a/telegram" in made
    assert "LoadCredential=secret-slack:/run/cloister/proxy/services/home-a/secret-slack" in made
    assert not any("keys/telegram" in line for line in made)
    assert any(line.startswith('Environment="NODE_EXTRA_CA_CERTS=') for line in made)
    assert config_of["channels"]["telegram"]["tokenFile"].endswith("/secrets/telegram")
    assert config_of["secrets"]["providers"]["secret-slack"]["path"].endswith("/secrets/secret-slack")
    document = read(POLICY, "cloister.toml")
    assert {one.text for one in secrets(document)} == {"file:/etc/cloister/keys/telegram", "systemd:slack"}
    places = files(rendered()["home-a"])["cloister-places-home-a.service"].text
    assert " /run/cloister/proxy/services/home-a/telegram " in places


def test_a_credential_of_a_channel_has_its_name_alone():
    """Two secrets of one name would have one placeholder."""
    own = '[agents.claw.credentials.telegram]\nsecret = "file:/x"\ninject = { host = "x.org", scheme = "bearer" }\n'
    assert "the agent has a credential telegram, and a channel of the gateway one of that name" in problems(
        POLICY.replace("[services.home]", f"{own}\n[services.home]", 1)
    )


def test_an_empty_secret_is_no_secret():
    """O62: every secret of the owner's is looked at before the start; an empty one is an error, not an open door."""
    assert "ExecStartPre=/usr/bin/test -s %d/gateway" in lines()
    assert "ExecStartPre=/usr/bin/test -s %d/plugin-notes-NOTES_KEY" in lines()


def test_the_configuration_is_roots_and_apart_from_the_state():
    """OF8: the file the gateway reads lies in a tree of root's, mode 0640; nothing in its state leads to it."""
    unit, path = rendered()["home-a"], "/var/lib/cloister/services/cl-home-a.d/openclaw.json"
    (file,) = [file for file in unit.files if file.path == path]
    assert (file.mode, file.account) == (0o640, "cl-home-a")
    assert f'Environment="OPENCLAW_CONFIG_PATH={path}"' in lines()
    assert 'Environment="OPENCLAW_CONFIG_READONLY=1"' in lines()
    assert not any(line.startswith("BindPaths=") and "cl-home-a.d" in line for line in lines())


def test_old_names_of_variables_are_gone():
    """OF4: what OpenClaw 2026.9 reads is OPENCLAW_*; nothing is set that nobody reads."""
    assert not any("CLAWDBOT" in line or "MOLTBOT" in line or "CLAWDIS" in line for line in lines())


def test_queue_words_are_those_the_version_knows():
    """OF3: `queue` of older versions is `followup` now; what the owner overrides wins."""
    assert config()["messages"] == {
        "queue": {"mode": "steer", "byChannel": {"telegram": "interrupt", "discord": "followup", "webchat": "followup"}}
    }


def test_overrides_win_and_lists_are_replaced():
    """O53: base, telegram, routing, overrides; tables merge, a list takes the place of a list."""
    more = POLICY.replace(
        'config_overrides.logging.level = "debug"',
        'config_overrides.channels.telegram.allowFrom = [7]\nconfig_overrides.agents.defaults.thinkingDefault = "off"',
    )
    made = json.loads(json.dumps(config(policy=more)))
    assert made["channels"]["telegram"]["allowFrom"] == [7]
    assert made["channels"]["telegram"]["enabled"] is True
    assert made["agents"]["defaults"]["thinkingDefault"] == "off"
    assert made["agents"]["defaults"]["workspace"].endswith("/workspace")


def test_without_providers_nothing_is_said_of_models():
    """OR1: an agent without providers gets no provider and no default model, and no placeholder is waited for."""
    made = config(policy=POLICY.replace('providers = ["anthropic"]\nmodels = ["claude-*", "claude-haiku-4-5"]', ""))
    assert "models" not in made
    assert "model-key" not in json.dumps(made)
    assert not any("model-key" in line for line in lines(policy=POLICY.replace('providers = ["anthropic"]', "")))


def test_telegram_is_told_of_only_where_it_is_enabled():
    """O51: without the channel nothing of it stands in the configuration, and no token is loaded."""
    off = POLICY.replace("enable = true\nbot_token", "enable = false\nbot_token")
    assert "telegram" not in json.loads(json.dumps(config(policy=off)))["channels"]
    assert not any("LoadCredential=telegram" in line for line in lines(policy=off))


def test_documents_are_mounted_over_what_the_agent_has():
    """OF9: declared documents are read-only mounts; one that is writable is put there once."""
    made = files(rendered()["home-a"])
    assert made["documents/AGENTS.md"].text == "# Who you are\n"
    points = made["mount-points.conf"].text.splitlines()
    at = "/var/lib/cloister/services/cl-home-a"
    assert f"f {at}/workspace/AGENTS.md 0640 cl-home-a cl-home-a" in points
    assert f"d {at}/workspace 0700 cl-home-a cl-home-a" in points
    assert any(line.startswith(f"C {at}/workspace/SOUL.md") for line in points)
    assert f"BindReadOnlyPaths={at}.d/documents/AGENTS.md:{at}/workspace/AGENTS.md" in lines()
    assert not any("documents/SOUL.md" in line for line in lines())


def test_skills_that_are_not_declared_are_not_there():
    """OF9: the whole directory of skills is one read-only mount of what is declared."""
    assert {"skills/greet/SKILL.md", "skills/copied/scripts/run.sh", "skills/note/SKILL.md"} <= set(
        files(rendered()["home-a"])
    )
    before, after = POLICY.index('[[services.home.skills]]\nname = "copied'), POLICY.index("[services.home.plugins")
    less = files(rendered(POLICY[:before] + POLICY[after:])["home-a"])
    assert not any(path.startswith("skills/copied") for path in less)
    assert any("cl-home-a.d/skills:" in line for line in lines())


def test_copied_scripts_stay_executable():
    """O66: a skill is copied as it is."""
    made = files(rendered()["home-a"])
    assert made["skills/copied/scripts/run.sh"].mode == 0o750
    assert made["skills/copied/SKILL.md"].mode == 0o640


def test_the_tools_report_is_replaced_not_repeated():
    """O65: TOOLS.md ends with one report, whatever it ended with before."""
    once = report("# Tools\n", Tools(include=("git",)))
    assert report(once, Tools(include=("git",))) == once
    assert "- git" in once
    assert "- (none)" in report("", Tools())


def test_tools_are_there_or_gone():
    """O16, O17: what is included must exist on this host; what is excluded cannot be run."""
    assert problems(tools=frozenset()) == ["there is no program git in /usr/bin or /bin"] * 2
    assert "InaccessiblePaths=-+/usr/bin/curl" in lines()


@pytest.mark.parametrize(
    ("name", "kept"), [("CLAUDE.md", False), ("SOUL.md", False), ("TOOLS.md", False), ("notes.txt", True)]
)
def test_the_three_documents_must_be_there(name, kept):
    """O75: AGENTS.md (or CLAUDE.md), SOUL.md and TOOLS.md; other files are nobody's business."""
    less = {key: value for key, value in SOURCES["/etc/cloister-docs"].items() if key != name}
    found = problems(sources=SOURCES | {"/etc/cloister-docs": less})
    assert (found == []) is kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "/etc/plugins/notes/plugin.toml: Object missing required field `name`"),
        ('name = "other"\nstate_dirs = ["x"]\n', "its name is 'other', and the policy calls it 'notes'"),
        ('name = "notes"\n', "the plugin notes has settings, and no state_dirs to put them in"),
        ('name = "notes"\nstate_dirs = ["x"]\nrequired_env = ["MORE"]\n', "the plugin notes needs the variable MORE"),
        ('name = "notes"\nstate_dirs = ["../x"]\n', "/etc/plugins/notes/plugin.toml: a path in a policy has no .."),
        ('name = "notes"\nstate_dirs = ["x"]\nskills = ["gone"]\n', "the skill gone has no SKILL.md"),
        ('name = "notes"\nstate_dirs = ["a b"]\n', SIGNS),
    ],
)  # fmt: skip
def test_a_plugin_is_whole_or_refused(text, message):
    """O44, O45: what a plugin misses is said before anything is installed, by its name."""
    broken = SOURCES["/etc/plugins/notes"] | {"plugin.toml": SourceFile(text=text)}
    assert set(problems(sources=SOURCES | {"/etc/plugins/notes": broken})) == {message}


def test_a_plugin_without_its_file_is_refused():
    """O44: the message names the source."""
    found = problems(sources=SOURCES | {"/etc/plugins/notes": {}})
    assert set(found) == {"plugin.toml is missing in /etc/plugins/notes"}


def test_a_skill_of_a_plugin_does_not_replace_another():
    """O45, O76: one name, one skill."""
    twice = SOURCES["/etc/plugins/notes"] | {"skills/greet/SKILL.md": SourceFile(text="x")}
    twice["plugin.toml"] = SourceFile(text=twice["plugin.toml"].text.replace("skills/note", "skills/greet"))
    assert set(problems(sources=SOURCES | {"/etc/plugins/notes": twice})) == {"two skills are called greet"}


def test_what_could_not_be_read_is_said():
    """OF12: a source that is missing, or that others could change, is refused by its reason; nothing is made up."""
    found = problems(sources={}, unreadable=dict.fromkeys(SOURCES, "it can be written by others than root"))
    assert set(found) == {"it can be written by others than root"}


def test_what_a_gateway_cannot_have_is_refused():
    """No key of the agent is silently without effect: other directories, an interface, a person's keys."""
    wide = POLICY.replace(
        "[agents.claw.llm]", 'filesystem.write = ["/srv/x"]\negress.mode = "internet"\n[agents.claw.llm]'
    )
    assert len(set(problems(wide))) == 2


@pytest.mark.parametrize(
    "line",
    [
        'workspace.mode = "overlay"', 'workspace.protect = ["x"]', 'workspace.unprotected = [".vscode"]',
        'filesystem.hide = ["/srv/x"]', 'carry = ["~/.gitconfig"]', 'pass_environment = ["EDITOR"]',
        'environment_files = ["/etc/x"]', 'limits.disk_max = "1G"', 'unit.ownership = "idmap"',
        'llm.on_exhausted = "ask"',
    ],
)  # fmt: skip
def test_a_key_without_effect_is_refused(line):
    """No option is dead: a key of the agent that a gateway does not obey is refused by its name, with the reason."""
    key = line.partition(" ")[0]
    text = line.removeprefix("llm.")
    at = "[agents.claw.llm]\n" if key.startswith("llm.") else "[agents.claw.llm]"
    wide = POLICY.replace(at, f"{at}{text}\n" if key.startswith("llm.") else f"{text}\n{at}")
    (found,) = set(problems(wide))
    assert found.startswith(f"{key} = "), found
    assert "would have no effect on a gateway: " in found


def test_what_a_preset_says_is_no_option():
    """The twin: the product's own protections are for runs, and stop no gateway; opt-outs that hold are no refusal."""
    assert problems() == []
    assert problems(POLICY.replace("[agents.claw.llm]", "sandbox_note = false\n[agents.claw.llm]")) == []


def test_a_missing_program_is_said():
    """O11: what is not installed cannot be served."""
    assert set(problems(programs={})) == {"no program 'openclaw' was found"}


def test_the_unit_waits_restarts_and_stops_as_the_product_asks():
    """OF15: patience at the end, no restart after a configuration error, a bound on restarts."""
    for line in (
        "TimeoutStopSec=330", "KillMode=mixed", "SuccessExitStatus=0 143", "RestartPreventExitStatus=78",
        "OOMPolicy=continue", "StartLimitIntervalSec=300", "StartLimitBurst=10", "Restart=always", "RestartSec=5",
        "MemoryMax=2147483648", "PrivateNetwork=yes", 'Environment="SHELL=/bin/bash"',
    ):  # fmt: skip
        assert line in lines()
    assert "CollectMode=inactive-or-failed" not in lines()


def test_only_where_systemd_would_not_wait_does_a_unit_ask_for_the_end():
    """PrivatePIDs= came with 257; before, TERM and its time are systemd's to give."""
    end = "cloister-end-home-a.service"
    assert end in files(rendered()["home-a"])
    assert any(line.startswith("Wants=") and line.endswith(f" {end}") for line in lines())
    old = rendered(facts=msgspec.structs.replace(FACTS, systemd=252))["home-a"]
    assert end not in files(old)
    assert not any(end in file.text for file in old.files)


def test_text_of_the_policy_keeps_its_meaning_in_a_unit():
    """Quotes, backslashes, percent and dollar signs of a variable arrive as they were written."""
    assert 'Environment="GREETING=a \\"b\\" %%c $d \\\\"' in lines()
    assert "LoadCredential=plugin-notes-NOTES_KEY:/etc/cloister/keys/no tes%%" in lines()


def test_a_disabled_gateway_is_not_installed():
    """O10: enable = false leaves nothing of it."""
    off = POLICY.replace("[services.home.instances.b]", "[services.home.instances.b]\nenable = false")
    assert set(rendered(off)) == {"home-a"}
