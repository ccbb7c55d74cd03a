"""`cloister.toml(5)` as roff, made from the model: `python -m cloister.policy.manual > docs/man/cloister.toml.5`.

The order, the frame and the examples stand here; what a key means stands in the model only.
Macros: man(7). A test fails when the committed page is not what this makes.
"""

from __future__ import annotations

import re
import sys

from cloister.policy.schema import TableText, tables

_HEAD = r""".\" Made from src/cloister/policy/model.py by python -m cloister.policy.manual; do not edit.
.TH CLOISTER.TOML 5 "" "Cloister" "File formats"
.SH NAME
cloister.toml \- what an agent may do
.SH SYNOPSIS
.nf
.I \(ti/.config/cloister/cloister.toml
.I /etc/cloister/cloister.toml
.I .cloister.toml
.fi
.SH DESCRIPTION
A policy is one file, in TOML or, as Nix makes it, in JSON.
It names agents, and for each the directories, hosts, credentials and limits it has.
What is not written is not allowed.
A file with a mistake is refused as a whole; all its mistakes are reported at once, each with its line.
.PP
The user's file holds the user's own policy.
A system file in
.I /etc/cloister
limits what users' files can allow: for an agent that both have, the user's table may only tighten.
A file
.I .cloister.toml
in a workspace may only tighten as well (see
.BR "PROJECT FILES" ).
.PP
Sizes are written "512M" or "4G" (powers of 1024), durations "90s", "10m", "8h" or "1h30m", CPU shares "150%".
A leading
.I \(ti
is the home of the user who starts the agent.
Paths have no wildcards and no
.IR .. .
.PP
Secrets never stand in a policy: a key that looks like one is refused.
A secret reference names where one is kept:
.IR file:PATH ,
.IR env:NAME ,
.IR systemd:NAME ,
.IR "command:COMMAND LINE" ,
.I keyring:NAME
or
.IR pass:NAME .
.PP
Keys that this version or this host cannot enforce are refused when the agent is started, never ignored.
"""

_PROJECT = r""".SH PROJECT FILES
Lists of what is allowed can only become shorter, lists of what is refused only longer, limits only lower
and modes only stricter.
Anything else is an error that names the key.
"""

_PRESETS = r""".SH PRESETS
A preset holds what is known about one agent product.
.I \(ti/.config/cloister/presets/NAME.toml
adds one, or takes the place of the built-in preset of that name.
Built in are
.BR claude ,
.BR codex ,
.BR openclaw ,
.B pi
and
.BR shell .
"""

_TAIL = r""".SH EXAMPLES
A policy for one developer:
.PP
.in +4n
.EX
{example}.EE
.in
.PP
A project that allows less than its owner's policy, in
.IR .cloister.toml :
.PP
.in +4n
.EX
{project}.EE
.in
.SH SEE ALSO
.BR cloister (1)
"""

_EXAMPLE = """\
schema = 1

[providers.anthropic]
key = "file:~/.config/cloister/anthropic.key"

[agents.claude]
preset = "claude"

[agents.claude.llm]
providers = ["anthropic"]
models = ["claude-*"]
cost_per_day_usd = 20.0

[agents.claude.workspace]
roots = ["~/src"]

[agents.claude.egress]
mode = "ask"
allow = ["packages.example.org", "*.packages.example.org"]

[agents.claude.limits]
memory_max = "4G"
tasks_max = 512
runtime_max = "8h"
"""

_EXAMPLE_PROJECT = """\
schema = 1

[every_agent.egress]
mode = "deny"
deny = ["*.pastebin.example"]

[every_agent.workspace]
protect = ["deploy"]
"""


def page() -> str:
    """Return the whole page."""
    shown = {table.header or str(index): table for index, table in enumerate(tables())}
    policy, project, preset = (
        next(table for table in shown.values() if table.text.startswith(start))
        for start in ("A whole policy", "`.cloister.toml`", "A preset file")
    )
    parts = [_HEAD, ".SH THE FILE\n", _keys(policy), ".SH TABLES\n"]
    parts += [_section(table) for table in shown.values() if table not in (policy, project, preset)]
    parts += [_PROJECT, _keys(project), _PRESETS, _keys(preset)]
    parts.append(_TAIL.format(example=_escape(_EXAMPLE), project=_escape(_EXAMPLE_PROJECT)))
    return "".join(parts)


def examples() -> tuple[str, str]:
    """Return the policy and the project file the page shows, for the test that loads them."""
    return _EXAMPLE, _EXAMPLE_PROJECT


def _section(table: TableText) -> str:
    title = _escape(table.header) if table.header else "Rules of egress.allow and egress.deny"
    return f".SS {title}\n{_inline(table.text)}\n{_keys(table)}"


def _keys(table: TableText) -> str:
    lines = []
    for key in table.keys:
        default = f", default {key.default}" if key.default else ""
        lines += [
            ".TP",
            f'.BR {_escape(key.name)} " ({_escape(key.kind + default).replace(chr(34), chr(92) + "(dq")})"',
        ]
        lines.append(_inline(key.text))
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """Turn `code` into bold, and keep lines from looking like requests."""
    parts = re.split(r"`([^`]*)`", text)
    joined = "".join(rf"\fB{_escape(part)}\fP" if index % 2 else _escape(part) for index, part in enumerate(parts))
    return r"\&" + joined if joined.startswith((".", "'")) else joined


def _escape(text: str) -> str:
    """Escape what roff gives a meaning (groff_char(7)); text at the start of a line is the caller's care."""
    for plain, escaped in (("\\", r"\e"), ("-", r"\-"), ("~", r"\(ti"), ("^", r"\(ha"), ("`", r"\(ga"), ("'", r"\(aq")):
        text = text.replace(plain, escaped)
    return text


if __name__ == "__main__":
    sys.stdout.write(page())
