"""Settings for the sandbox that Claude Code brings: a second fence inside ours, generated from our policy.

Passed with `--settings FILE`: a file in the workspace is the agent's to edit, and may come from
a stranger. The defaults that fail open are set against: without its sandbox it does not start,
and no command may leave it. Only its Bash tool lives in there; all else of it is held by ours.

Read out of 2.1.329 and seen there (tests/agents/test_agent_sandbox.py):

- `enabled` and `failIfUnavailable`: where these settings say true, false from a project's files
  is ignored; `allowUnsandboxedCommands = false` holds whatever they say, and the model's
  `dangerouslyDisableSandbox` is then ignored, not refused;
- `excludedCommands`, `allowedDomains`, the proxy ports, `filesystem.disabled` and
  `allowNestedUserNamespaces` from a project are ignored; `bwrapPath` counts in an
  administrator's settings only, so its tools (bwrap, socat, rg) must be on the PATH inside;
- it takes the proxy ports for both protocols, and puts the private ranges into NO_PROXY: such
  requests have no way out at all, which refuses them as well;
- its bubblewrap leaves empty files behind where it masks absent paths, such as
  `.git/objects/info/alternates`; an empty one means nothing to git.
"""

from __future__ import annotations

import msgspec

from cloister.isolation.inner import PROXY_PORT
from cloister.policy.model import Agent, EgressRule

SETTINGS_FILE = "claude-settings.json"
DENY_READ = (
    "~/.ssh", "~/.gnupg", "~/.aws", "~/.azure", "~/.config/gcloud", "~/.config/age", "~/.config/sops", "~/.config/gh",
    "~/.config/tailscale", "~/.docker", "~/.kube", "~/.netrc", "~/.npmrc", "~/.pypirc", "~/.git-credentials",
    "~/.password-store", "~/.mozilla", "~/.config/google-chrome", "~/.config/chromium", "~/.local/share/keyrings",
)  # fmt: skip
"""Not there at all in our sandbox; listed for the day the same file is used without it."""


def managed_settings(agent: Agent) -> str:
    """Return the settings as JSON text."""
    sandbox = {
        "enabled": True,
        "failIfUnavailable": True,
        "autoAllowBashIfSandboxed": True,
        "allowUnsandboxedCommands": False,
        "excludedCommands": [],
        "network": {
            "allowedDomains": list(allowed_domains(agent)),
            "strictAllowlist": True,
            "allowAllUnixSockets": False,
            "httpProxyPort": PROXY_PORT,
            "socksProxyPort": PROXY_PORT,
        },
        "filesystem": {"denyRead": [*DENY_READ, *agent.agent_sandbox.deny_read]},
    }
    return msgspec.json.format(msgspec.json.encode({"sandbox": sandbox}), indent=2).decode() + "\n"


def allowed_domains(agent: Agent) -> tuple[str, ...]:
    """Return the names of the allowlist as its settings write them: no ports, no addresses."""
    hosts = (entry.host if isinstance(entry, EgressRule) else entry.rsplit(":", 1)[0] for entry in agent.egress.allow)
    return tuple(
        dict.fromkeys(
            host for host in hosts if any(char.isalpha() for char in host) and "/" not in host and ":" not in host
        )
    )
