"""The agent's environment, built from nothing. Names of the caller's variables, never their values.

What an agent gets: who and where it is, a PATH of system directories, the proxy in every
spelling programs look for, git's identity, with credentials where trusted certificates lie,
the preset's variables, then the policy's own. Later ones win. Values of inherited variables
come with the request and are put in by the broker at launch, as are the placeholders of
credentials, so none of them stands in a plan.
"""

from __future__ import annotations

import msgspec

from cloister.isolation.inner import BOX, EGRESS_SOCKET, MODEL_PORT, PROXY_PORT
from cloister.isolation.namespace import BIN
from cloister.policy.model import Agent, Preset

INHERITED = ("TERM", "COLORTERM", "NO_COLOR", "LANG", "LANGUAGE", "TZ", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "LC_TIME")
"""Harmless to know and needed to look right: terminal, language, time zone."""

PATH = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROXY = f"http://127.0.0.1:{PROXY_PORT}"
MODELS = f"http://127.0.0.1:{MODEL_PORT}"
LOOPBACK = "localhost,127.0.0.1,::1"
"""Loopback inside the sandbox is the agent's own (a dev server it started), so it never goes through the proxy."""

TRUST = f"{BOX}/ca.pem"
TRUST_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, Go (crypto/x509), Python's ssl, Ruby, rustls-native-certs, uv
    "NODE_EXTRA_CA_CERTS",  # Node.js, Bun
    "GIT_SSL_CAINFO",  # git(1), whatever TLS library its curl has
    "CURL_CA_BUNDLE",  # curl(1)
    "REQUESTS_CA_BUNDLE",  # Python requests
    "HTTPLIB2_CA_CERTS",  # Python httplib2
    "PIP_CERT",  # pip
    "npm_config_cafile",  # npm, pnpm, Yarn 1
    "YARN_HTTPS_CA_FILE_PATH",  # Yarn 2 and later
    "CARGO_HTTP_CAINFO",  # cargo
    "AWS_CA_BUNDLE",  # AWS CLI and SDKs
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",  # gcloud
    "DENO_CERT",  # Deno
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",  # gRPC
    "NIX_SSL_CERT_FILE",  # nix
    "PERL_LWP_SSL_CA_FILE",  # Perl's LWP
)
"""How programs are told which certificates to trust. All take a file that is used alone, but for Node's, which adds."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """Facts the environment is made of."""

    run: str
    agent: str
    user: str
    home: str
    workspace: str
    shell: str = "/bin/sh"
    git: tuple[tuple[str, str], ...] = ()
    """git configuration carried in: `user.name`, `user.email`, `safe.directory`."""
    protocols: tuple[str, ...] = ()
    """Of the model traffic that is served inside."""


def compose(agent: Agent, preset: Preset, situation: Situation) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the literal variables, and the names of those inherited from the caller."""
    fill = {"home": situation.home, "workspace": situation.workspace, "proxy": PROXY}
    literal = _base(situation) | _proxy() | _git(situation.git)
    literal |= dict.fromkeys(TRUST_VARIABLES, TRUST) if terminates(agent) else {}
    literal |= {name: _fill(value, fill) for name, value in preset.environment.items()}
    spoken = [protocol for protocol in preset.base_url if protocol in situation.protocols]
    literal |= {preset.base_url[protocol]: model_url(protocol) for protocol in spoken}
    elsewhere = any(preset.base_url[protocol] in agent.environment for protocol in spoken)
    literal |= {preset.unix_socket: EGRESS_SOCKET} if preset.unix_socket and spoken and not elsewhere else {}
    literal |= {name: _fill(value, fill) for name, value in agent.environment.items()}
    wanted = dict.fromkeys((*INHERITED, *preset.pass_environment, *agent.pass_environment))
    return literal, tuple(name for name in wanted if name not in agent.environment)


def terminates(agent: Agent) -> bool:
    """Say whether TLS to some host ends at the broker, so that its certificates have to be trusted inside."""
    return any(credential.inject is not None for credential in agent.credentials.values())


def model_url(protocol: str) -> str:
    """Return the base URL for clients of a protocol: those of OpenAI expect the version in it."""
    return MODELS if protocol == "anthropic" else f"{MODELS}/v1"


def _base(situation: Situation) -> dict[str, str]:
    return {
        "HOME": situation.home,
        "USER": situation.user,
        "LOGNAME": situation.user,
        "SHELL": situation.shell,
        "PATH": PATH,
        "PWD": situation.workspace,
        "TMPDIR": "/tmp",  # noqa: S108  # the sandbox's own
        "CLOISTER_RUN": situation.run,
        "CLOISTER_AGENT": situation.agent,
    }


def _proxy() -> dict[str, str]:
    """Every spelling in use: curl and Python read lower case, Go and Node upper; SOCKS for what knows only that."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    proxies = dict.fromkeys(names, PROXY)
    proxies |= dict.fromkeys(("ALL_PROXY", "all_proxy"), f"socks5h://127.0.0.1:{PROXY_PORT}")
    proxies |= dict.fromkeys(("NO_PROXY", "no_proxy"), LOOPBACK)
    return proxies | {"NODE_USE_ENV_PROXY": "1"}  # Node 24: built-in fetch honours the variables above


def _git(settings: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """git-config(1), GIT_CONFIG_COUNT: configuration without a file, so nothing has to be mounted."""
    if not settings:
        return {}
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for index, (key, value) in enumerate(settings):
        variables[f"GIT_CONFIG_KEY_{index}"] = key
        variables[f"GIT_CONFIG_VALUE_{index}"] = value
    return variables


def _fill(value: str, fill: dict[str, str]) -> str:
    """Replace `{home}` and friends; other braces stay, since JSON in a variable is common."""
    for name, replacement in fill.items():
        value = value.replace("{" + name + "}", replacement)
    return value
