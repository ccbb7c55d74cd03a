"""git's configuration syntax, as far as paths in it are looked for."""

import pytest

from cloister.plan.gitconfig import pairs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("[core]\n\thooksPath = a/b\n", [("core.hookspath", "a/b")]),
        ("[CORE]\nHOOKSPATH=x", [("core.hookspath", "x")]),
        ("[core] hooksPath = x ; why\n", [("core.hookspath", "x")]),
        ('[core]\nhooksPath = "a ; b" # c\n', [("core.hookspath", "a ; b")]),
        ("[core]\nhooksPath = a\\\n b\n", [("core.hookspath", "a b")]),
        ('[core]\nhooksPath = "a\\"b\\tc"\n', [("core.hookspath", 'a"b\tc')]),
        ("[core]\nbare\n[a]\nb=c\n", [("core.bare", "true"), ("a.b", "c")]),
        ('[includeIf "gitdir:~/x/"]\r\n\tpath = y\r\n', [("includeif.path", "y")]),
        ('[remote "a]b"]\nurl = z', [("remote.url", "z")]),
        ("; [core]\n# hooksPath = no\n[core]\n\n\n  hooksPath=yes", [("core.hookspath", "yes")]),
        ("[core\nhooksPath = x\n", [(".hookspath", "x")]),
        ("[core]\nhooksPath =\n", [("core.hookspath", "")]),
    ],
)
def test_values_are_read_as_git_reads_them(text, expected):
    """Sections, quoting, comments, continuation lines and values without `=` come out as in git."""
    assert list(pairs(text)) == expected
