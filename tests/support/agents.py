"""How each real agent is pointed at a model endpoint: argv, environment and files, as values.

Measured with Claude Code 2.1.329, Pi 0.86.1, Codex 0.169.0 and OpenClaw 2026.9.6 (tests/agents/package.json):

- the first three send requests for an `http://` base URL to the proxy of HTTP_PROXY or http_proxy,
  also when the host is a loopback address; NO_PROXY=127.0.0.1,localhost exempts those;
- Claude Code and Codex then use absolute-form requests, Pi a CONNECT tunnel even for `http://`;
- HTTPS_PROXY or ALL_PROXY alone suffice for `http://` with Claude Code; Codex takes ALL_PROXY,
  Pi needs HTTP_PROXY. None needs NODE_USE_ENV_PROXY;
- as it comes, Codex asks for github.com, api.github.com, chatgpt.com (plugins) and ab.chatgpt.com
  (analytics) at start, and works when they are refused at once; with the two switches in its
  config.toml below it asks for nothing but the model.

`place` writes the files; nothing here starts a process. The presets of the product are not
used: these values are what a person would set by hand, so that tests can compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KEY = "virtual-key"
"""The credential that the agents present: a placeholder, as inside a sandbox."""

MODEL = "fake-1"


@dataclass(frozen=True)
class Setup:
    """What one agent needs, for one base URL: variables, and files below its home."""

    environment: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Agent:
    """One agent product.

    Attributes:
        name: the preset's and the program's name.
        version: a part of what `--version` prints.
        argv: the command; the prompt is appended.
        setup: base URL without path → what it needs.
        shell_tool: the name of the tool by which it runs commands.
        key_header: the request header in which `KEY` arrives.
    """

    name: str
    version: str
    argv: tuple[str, ...]
    setup: Callable[[str], Setup]
    shell_tool: str
    key_header: str

    def command(self, prompt: str = "hi") -> list[str]:
        """Return the whole command line for a prompt."""
        return [*self.argv, prompt]


def place(files: Mapping[str, str], home: Path) -> None:
    """Write an agent's files below a home directory."""
    for name, text in files.items():
        target = home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _claude(url: str) -> Setup:
    """Claude Code: Anthropic Messages; everything by environment."""
    return Setup(
        {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "IS_SANDBOX": "1",  # else it refuses to skip permissions as root
        }
    )


def _pi(url: str) -> Setup:
    """Pi: OpenAI chat completions; the provider stands in models.json."""
    provider = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": KEY, "models": [{"id": MODEL}]}
    return Setup(
        {"PI_OFFLINE": "1", "PI_SKIP_VERSION_CHECK": "1", "PI_TELEMETRY": "0"},
        {".pi/agent/models.json": json.dumps({"providers": {"fake": provider}})},
    )


def _codex(url: str) -> Setup:
    """Codex: OpenAI Responses; the provider stands in config.toml, its key in a variable."""
    config = f"""\
model = "{MODEL}"
model_provider = "fake"
check_for_update_on_startup = false

[analytics]
enabled = false

[features]
plugins = false

[model_providers.fake]
name = "fake"
base_url = "{url}/v1"
env_key = "FAKE_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""
    return Setup({"FAKE_KEY": KEY}, {".codex/config.toml": config})


def _openclaw(url: str) -> Setup:
    """OpenClaw's embedded agent: Anthropic Messages; everything in openclaw.json, its workspace the current folder."""
    model = {"id": MODEL, "name": MODEL, "contextWindow": 200_000, "maxTokens": 4096}
    provider = {"baseUrl": url, "apiKey": KEY, "api": "anthropic-messages", "models": [model]}
    defaults = {"model": {"primary": f"fake/{MODEL}"}, "workspace": ".", "skipBootstrap": True}
    config = {
        "gateway": {"mode": "local", "bind": "loopback"},
        "models": {"providers": {"fake": provider}},
        "agents": {"defaults": defaults},
    }
    return Setup({}, {".openclaw/openclaw.json": json.dumps(config)})


AGENTS: dict[str, Agent] = {
    agent.name: agent
    for agent in (
        Agent(
            name="claude",
            version="2.1.329",
            # Its own questions are off, so that attacks reach the sandbox instead of a prompt.
            argv=("claude", "--dangerously-skip-permissions", "-p"),
            setup=_claude,
            shell_tool="Bash",
            key_header="x-api-key",
        ),
        Agent(
            name="pi",
            version="0.86.1",
            argv=("pi", "-p", "--provider", "fake", "--model", MODEL),
            setup=_pi,
            shell_tool="bash",
            key_header="authorization",
        ),
        Agent(
            name="codex",
            version="0.169.0",
            # Its own sandbox is off: ours is the one under test, and the kernel refuses a second one inside.
            argv=("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
            setup=_codex,
            shell_tool="exec_command",
            key_header="authorization",
        ),
        Agent(
            name="openclaw",
            version="2026.9.6",
            argv=("openclaw", "agent", "--local", "--session-id", "one", "--message"),
            setup=_openclaw,
            shell_tool="exec",
            key_header="x-api-key",
        ),
    )
}
