"""Recognises secrets by their looks, and sorts an environment into groups that can be shown.

Used to refuse a key that stands in a policy as plain text, and for the audit of the
environment before a start. It finds what is shaped like a known token; it is no proof that
a value is harmless, so what is decided on it is only whether to mask or to refuse.
Token shapes are those their issuers publish for secret scanning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_TOKENS = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}"  # Anthropic, OpenAI, OpenRouter
    r"|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|A(?:KIA|SIA)[A-Z0-9]{16}"  # AWS access key
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"  # Google
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"  # Slack
    r"|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|hf_[A-Za-z0-9]{20,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    r"|(?:gsk|xai|dop_v1|tskey-[a-z]+)[_-][A-Za-z0-9_-]{20,}"
    r"|\b[0-9]{8,10}:[A-Za-z0-9_-]{35}\b"  # Telegram bot
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"  # JWT
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
    r"|[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s:@]{3,}@"  # a password in an address
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH|COOKIE|PRIVATE|SESSION|DSN)(?:_|S?$)"
    r"|(?:^|_)(?:DATABASE|REDIS|MONGO(?:DB)?|AMQP|POSTGRES(?:QL)?|MYSQL)_UR[IL]$"
)
_AMOUNT = re.compile(r"(?:^|_)(?:MAX|MIN|NUM|LIMIT|COUNT)(?:_|$)")
"""`MAX_THINKING_TOKENS` is a number of tokens, not a token."""
_TERMINAL = re.compile(r"TERM|COLORTERM|TERM_PROGRAM(_VERSION)?|LANG|LANGUAGE|LC_[A-Z]+|TZ|COLUMNS|LINES|NO_COLOR")
_MODEL_KEY = re.compile(r"(?:ANTHROPIC|CLAUDE|OPENAI|CODEX|GEMINI|GOOGLE|OPENROUTER|MISTRAL|GROQ|XAI|DEEPSEEK)_")
_SHOWN_CHARACTERS = 60


def token_pattern() -> re.Pattern[str]:
    """Return the shapes of known tokens, for replacing them."""
    return _TOKENS


def looks_secret(value: str) -> bool:
    """Return whether a value holds something shaped like a known kind of token."""
    return _TOKENS.search(value) is not None


def names_secret(name: str) -> bool:
    """Return whether a variable of this name usually holds a secret, such as `NPM_TOKEN`."""
    upper = name.upper()
    return _SECRET_NAME.search(upper) is not None and _AMOUNT.search(upper) is None


class Variable(NamedTuple):
    """One variable as it may be shown: a sensitive value is replaced by its length."""

    name: str
    shown: str
    sensitive: bool


class Group(NamedTuple):
    """Variables of one kind; `title` says what carrying them in means."""

    title: str
    variables: tuple[Variable, ...]


def audit_environment(environment: Mapping[str, str], *, model_keys: Iterable[str] = ()) -> tuple[Group, ...]:
    """Return the variables in groups, the dangerous ones first, sorted by name, ready to be shown.

    Args:
        environment: names and values that would be carried in.
        model_keys: names known to hold model keys (`Preset.key_environment`).
    """
    known = frozenset(model_keys)
    titles = {
        "model": "Model keys: the agent can read and copy them",
        "secret": "Other secrets: the agent can read and copy them",
        "plain": "Settings",
        "terminal": "Terminal and language",
    }
    groups: dict[str, list[Variable]] = {kind: [] for kind in titles}
    for name, value in sorted(environment.items()):
        sensitive = name in known or names_secret(name) or looks_secret(value)
        if sensitive:
            kind = "model" if name in known or _MODEL_KEY.match(name) else "secret"
        else:
            kind = "terminal" if _TERMINAL.fullmatch(name) else "plain"
        groups[kind].append(Variable(name, _show(value, sensitive=sensitive), sensitive))
    return tuple(Group(titles[kind], tuple(found)) for kind, found in groups.items() if found)


def _show(value: str, *, sensitive: bool) -> str:
    """Mask wholly: the first characters of a token tell its issuer, the last ones help to guess it."""
    if sensitive:
        return f"•••• ({len(value)} characters)" if value else "(empty)"
    plain = "".join(char if char.isprintable() else "�" for char in value)
    return plain if len(plain) <= _SHOWN_CHARACTERS else plain[: _SHOWN_CHARACTERS - 1] + "…"
