r"""Files of variables: their grammar, and which names may come from them. Pure.

The grammar is what `.env` files have in common, and nothing that runs or expands:

    file    = lines of UTF-8; empty lines and those whose first sign is `#` are passed over
    line    = [ "export" blanks ] NAME blanks "=" blanks value
    NAME    = a letter or _, then letters, digits and _
    value   = "'" anything but "'" "'"           taken as it stands, also over several lines
            | '"' anything but '"' '"'           the same, but for \n \r \t \" \\ and \$
            | anything up to the end of the line, or up to a blank and `#`; blanks around it do not count
    behind a closing quote only blanks and a comment may stand

`$` means nothing. A name given twice counts as written last. Each file is read by itself, so a quote that is never
closed spoils no other file; it makes its own unusable, with its line.
"""

from __future__ import annotations

import fnmatch
import re

from cloister.policy.values import check_variable

MAX_BYTES = 64 << 10
_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
_PLAIN = re.compile(r"((?:[^\n#]|(?<![ \t])#)*)")
_REST = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$"}
_ESCAPE = re.compile(r'\\([nrt"\\$])')
_QUOTED = {"'": re.compile(r"'([^']*)'"), '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)}

_CODE = (
    "PATH",
    "SHELL",
    "USER",
    "LOGNAME",
    "PWD",
    "TMPDIR",
    "XDG_*",
    "NODE_*",  # node(1): --require, loaders, certificates
    "NPM_CONFIG_*",
    "BUN_*",
    "DENO_*",
    "PYTHON*",  # python(1)
    "PERL*",
    "RUBY*",
    "GEM_*",
    "BUNDLE_*",
    "JAVA_*",
    "_JAVA_*",
    "JDK_*",
    "CLASSPATH",
    "MAVEN_*",
    "GRADLE_*",
    "GIT_*",  # git(1): programs, configuration, other repositories
    "SSH_*",
    "GPG_*",
    "GNUPGHOME",
    "DBUS_*",
    "*EDITOR",
    "*PAGER",
    "BROWSER",
    "LESSOPEN",
    "LESSCLOSE",
    "MANPAGER",
    "RUSTC*",
    "CARGO_*",
    "GOFLAGS",
    "GOENV",
    "SSL_*",
    "CURL_*",
    "REQUESTS_CA_BUNDLE",
    "*_PROXY",
    "PROMPT*",
)
"""What runs or loads something, or leads programs elsewhere: the policy can set it, a file cannot."""


class DotenvError(ValueError):
    """A file of variables that is not one. `line` begins with 1."""

    def __init__(self, message: str, line: int) -> None:
        """Keep the line apart."""
        super().__init__(message)
        self.line = line


def parse(text: str) -> dict[str, str]:
    """Return the variables of a file.

    Raises:
        DotenvError: the first line that is none of the grammar's. Nothing of such a file counts.
    """
    found: dict[str, str] = {}
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    at = 0
    while at < len(text):
        blank = _REST.match(text, at)
        if blank:
            if blank.end() == at:
                break
            at = blank.end()
            continue
        assignment = _ASSIGNMENT.match(text, at)
        if assignment is None:
            raise DotenvError("not NAME=value", _line(text, at))
        value, at = _value(text, assignment.end())
        if "\0" in value:
            raise DotenvError("a variable cannot hold a NUL", _line(text, assignment.start()))
        found[assignment[1]] = value
    return found


def check_file_variable(name: str) -> None:
    """Accept a variable that may come from a file: one that loads nothing, leads nowhere and is not ours.

    Raises:
        ValueError: it may not, with why.
    """
    check_variable(name)
    if any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in _CODE):
        raise ValueError("this variable can make programs load or run something: no file sets it")


def _value(text: str, at: int) -> tuple[str, int]:
    """Return a value and where the next line begins."""
    quote = text[at : at + 1]
    if quote not in _QUOTED:
        plain = _PLAIN.match(text, at)
        rest = _REST.match(text, plain.end()) if plain else None
        if plain is None or rest is None:
            raise DotenvError("not NAME=value", _line(text, at))
        return plain[1].strip(" \t"), rest.end()
    quoted = _QUOTED[quote].match(text, at)
    if quoted is None:
        raise DotenvError("a quote is opened and never closed", _line(text, at))
    rest = _REST.match(text, quoted.end())
    if rest is None:
        raise DotenvError("something stands behind the closing quote", _line(text, quoted.end()))
    value = quoted[1]
    return (value if quote == "'" else _ESCAPE.sub(lambda sign: _ESCAPES[sign[1]], value)), rest.end()


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
