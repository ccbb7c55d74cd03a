"""Goldens of plans: what a policy means today, as a diff to be read in review.

`PYTHONPATH=src:tests python tests/golden/test_plans.py` writes them anew (tests themselves write nothing).
"""

from pathlib import Path

import pytest

from cloister.plan import render
from cloister.plan.steps import Plan
from cloister.plan.workspace import Mount, Placeholder, WorkspaceLayout
from cloister.policy.document import read
from cloister.policy.merge import resolve
from cloister.policy.presets import builtin_presets
from cloister.runs.compile import CarriedPath, Facts, compile_run
from cloister.runs.internet import Internet

FOLDER = Path(__file__).parent / "plans"
POLICIES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def _facts(**changes: object) -> Facts:
    layout = WorkspaceLayout(
        root="/home/me/src/p",
        mounts=(
            Mount("bind", "/home/me/src/p", "/home/me/src/p"),
            Mount("pin", "/home/me/src/p/.git", "/home/me/src/p/.git"),
            Mount("ro", "/home/me/src/p/.git/hooks", "/home/me/src/p/.git/hooks"),
            Mount("content", "/home/me/src/p/.mcp.json", content="{}\n"),
        ),
        placeholders=(Placeholder("/home/me/src/p", Mount("bind", "/").node, ".mcp.json", "socket"),),
    )
    values: dict[str, object] = {
        "run": "0123456789ab", "agent_name": "agent", "policy_digest": "0" * 64, "uid": 1000, "gid": 1000, "user": "me",
        "home": "/home/me", "state": "/home/me/.local/state/cloister/agents/agent/0011223344556677",
        "run_state": "/home/me/.local/state/cloister/runs/0123456789ab",
        "run_runtime": "/run/user/1000/cloister/runs/0123456789ab", "shim": "/usr/lib/cloister/cloister-shim",
        "bubblewrap": "/usr/bin/bwrap", "etc_directory": "/home/me/.local/state/cloister/etc/00", "merged_usr": True,
        "directory": "/home/me/src/p", "layout": layout, "program_path": "/usr/bin/agent",
        "program_names": (("agent", "/usr/bin/agent"),), "landlock_abi": 7, "git": (("user.name", "Me"),),
        "carried": (CarriedPath(".claude/CLAUDE.md", "/home/me/.claude/CLAUDE.md", "file"),),
    }  # fmt: skip
    return Facts(**(values | changes))  # type: ignore[arg-type]


def _compiled(name: str) -> str:
    document = read((FOLDER / f"{name}.toml").read_bytes(), f"{name}.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    allow = tuple(str(entry) for entry in resolved.agent.egress.allow)
    plan = compile_run(resolved.agent, resolved.preset, resolved.agent.command, allow, _facts())
    return render.as_json(plan).decode()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_still_means_this_plan(name: str) -> None:
    """The compiled plan is the stored one, to the byte."""
    assert _compiled(name) == (FOLDER / f"{name}.plan.json").read_text(encoding="utf-8")


def test_the_text_shows_mounts_names_and_rules() -> None:
    """`cloister plan` as people read it: steps, mounts one below the other, environment names without values."""
    document = read((FOLDER / "claude.toml").read_bytes(), "claude.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    plan = compile_run(resolved.agent, resolved.preset, resolved.agent.command, ("api.example.org",), _facts())
    text = render.as_text(plan)

    assert "    --ro-bind /usr /usr" in text.splitlines()
    assert "  ANTHROPIC_BASE_URL" in text.splitlines()
    assert "  api.example.org" in text.splitlines()
    assert "http://model.example.org" not in text


def _of_preset(name: str, *words: str, **changes: object) -> Plan:
    """Return the plan of an agent that is a preset and nothing else."""
    document = read(f'schema = 1\n[agents.agent]\npreset = "{name}"\n'.encode(), "cloister.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    return compile_run(resolved.agent, resolved.preset, (*resolved.agent.command, *words), (), _facts(**changes))


def test_subcommands_of_a_product_get_no_flags() -> None:
    """`pi install` would take the note for a package; a prompt comes with it."""
    assert _of_preset("pi", "install", "npm:x").launch.command == ("/usr/bin/agent", "install", "npm:x")
    assert "--append-system-prompt" in _of_preset("pi", "explain").launch.command


@pytest.mark.parametrize("name", ["claude", "pi", "codex", "openclaw"])
def test_presets_bring_a_product_to_the_models(name: str) -> None:
    """With models each product is told of our endpoint in its own way, once, and of nothing without them."""
    served = {"protocols": ("anthropic", "openai-responses", "openai"), "models": ("m",)}
    plan, without = _of_preset(name, **served), _of_preset(name)
    ways = {
        "claude": plan.launch.environment.get("ANTHROPIC_UNIX_SOCKET") == "/run/cloister/box/egress.sock",
        "pi": "/home/me/.pi/agent/models.json" in plan.launch.argv,
        "codex": "openai_base_url=http://127.0.0.1:11435/v1" in plan.launch.command,
        "openclaw": "/home/me/.openclaw/cloister-models.json" in plan.launch.argv,
    }

    assert ways[name]
    assert "11435" in render.as_json(plan).decode()
    assert "11435" not in render.as_json(without).decode()


def test_the_plan_says_where_model_calls_go() -> None:
    """They are no host of the allowlist, so they stand beside it, and the agent's own note is silent about them."""
    plan = _of_preset("claude", protocols=("anthropic",), model_words=("models of a (anthropic): every model",))

    assert "models of a (anthropic): every model" in render.as_text(plan)
    assert "models of a" not in " ".join(plan.launch.command)


def test_weakening_a_mount_changes_the_plan() -> None:
    """The golden can fail: a writable /usr gives another digest."""
    document = read((FOLDER / "shell.toml").read_bytes(), "shell.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    plan = compile_run(resolved.agent, resolved.preset, ("true",), (), _facts())
    weak = compile_run(resolved.agent, resolved.preset, ("true",), (), _facts(write=("/usr",)))

    assert plan.digest() != weak.digest()
    assert any("filesystem.write: /usr" in word for word in weak.opt_outs)


WEAKENINGS = {
    '[agents.agent.egress]\nprivate = ["10.1.2.0/24"]': "egress.private: 10.1.2.0/24",
    '[agents.agent.egress]\nmode = "learn"': "egress.mode = learn",
    "[agents.agent.hardening]\nnested = true": "hardening.nested",
    "[agents.agent.hardening]\nptrace = true": "hardening.ptrace",
    '[agents.agent.hardening]\nlandlock = "off"': "hardening.landlock = off",
    "[agents.agent.agent_sandbox]\nmanaged = true": "hardening.nested",
    'pass_environment = ["NPM_TOKEN"]': "secret NPM_TOKEN",
    'pass_environment = ["MINE"]\n[agents.agent.credentials.x]\nsecret = "env:MINE"': "credentials.x: the secret",
}


@pytest.mark.parametrize(("table", "named"), WEAKENINGS.items(), ids=list(WEAKENINGS.values()))
def test_every_weakening_of_a_policy_is_an_opt_out(table: str, named: str) -> None:
    """What the policy weakens stands in the plan, and from there in the receipt; without it nothing does."""
    document = read((FOLDER / "shell.toml").read_bytes() + b"\n" + table.encode(), "shell.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    plan = compile_run(resolved.agent, resolved.preset, ("true",), (), _facts())

    assert any(named in words for words in plan.opt_outs), plan.opt_outs
    assert len(plan.opt_outs) == 1


def test_what_goes_round_the_proxy_with_a_placeholder_is_noticed() -> None:
    """In mode `internet` a tool may go to a bound host directly, with the placeholder: the plan says so, only then."""
    document = read((FOLDER / "credentials.toml").read_bytes(), "credentials.toml")
    resolved = resolve(document, "agent", presets=builtin_presets())
    direct = Internet(ruleset="", nft="", pasta=(), resolver="", probes=())
    plans = [
        compile_run(resolved.agent, resolved.preset, ("true",), (), _facts(internet=one)) for one in (None, direct)
    ]

    assert [any("what goes round it" in notice for notice in plan.notices) for plan in plans] == [False, True]


if __name__ == "__main__":
    for one in POLICIES:
        (FOLDER / f"{one}.plan.json").write_text(_compiled(one), encoding="utf-8")
