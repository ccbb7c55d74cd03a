"""Request paths and path patterns."""

import time

import pytest

from cloister.egress.paths import PathError, PathPattern, canonical_path

AMBIGUOUS = [
    "", "a", "*", "/../a", "/a/..", "/a/./b", "/.", "/%2e%2e/a", "/%2E./a", "/a//b", "//a", "/a%2fb", "/a%2Fb", "/a\\b",
    "/a%5cb", "/a;b", "/a;x=1/b", "/a%3bb", "/%252e%252e/", "/a%", "/a%2", "/a%zz", "/a%00", "/a\x01", "/a%0d%0a",
    "/a b",
    "/\xe4", "/a#b", "/a%7f",
]  # fmt: skip


@pytest.mark.parametrize("path", AMBIGUOUS)
def test_ambiguous_paths_are_refused(path):
    """What servers may resolve, merge, cut or decode differently is not matched at all."""
    with pytest.raises(PathError):
        canonical_path(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", "/"), ("/a?x=/../y", "/a"), ("/%61%7e", "/a~"), ("/%c3%a9", "/%C3%A9"), ("/a/", "/a/"), ("/a..b", "/a..b")],
)
def test_clear_paths_have_one_spelling(path, expected):
    """The positive twin: queries are cut off, escapes of unreserved characters decoded, the others made upper case."""
    assert canonical_path(path) == expected


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("/repos/**", ["/repos/a", "/repos/a/b", "/repos/"], ["/repos", "/reposx/a", "/x/repos/a", "/"]),
        ("/repos/*/issues", ["/repos/a/issues"], ["/repos/a/b/issues", "/repos/issues", "/repos/a/issues/1"]),
        ("/a*c/x", ["/ac/x", "/abc/x"], ["/a/c/x", "/abd/x"]),
        ("/**/end", ["/a/end", "/a/b/end", "/end/end"], ["/end", "/a/end/b"]),
        ("/**/m/**/e", ["/a/m/b/e", "/a/m/m/e", "/a/b/m/c/d/e"], ["/m/b/e", "/a/m/e", "/a/b/e"]),
        ("/a*b*c", ["/abc", "/axbxc", "/abbc"], ["/acb", "/ab", "/ac"]),
        ("/v1.0", ["/v1.0"], ["/v1x0"]),
        ("/", ["/"], ["/a"]),
    ],
)
def test_patterns(pattern, matching, others):
    """`*` stays inside a segment, `**` is one or more of them, everything else stands for itself."""
    compiled = PathPattern(pattern)
    assert [path for path in matching if not compiled.matches(path)] == []
    assert [path for path in others if compiled.matches(path)] == []


@pytest.mark.parametrize("pattern", ["", "a/**", "/a**", "/**a", "/a/../b", "/a?b"])
def test_bad_patterns_are_refused(pattern):
    """A pattern that could not match what its writer means is a mistake."""
    with pytest.raises(PathError):
        PathPattern(pattern)


def test_matching_is_quick_for_hostile_paths():
    """A long path of near misses costs time in proportion, so an agent cannot stall the broker."""
    pattern = PathPattern("/**/a/**/a/**/a/*x*y*z/b")
    began = time.process_time()
    assert not pattern.matches("/a" * 20_000 + "/" + "xy" * 10_000)
    assert time.process_time() - began < 2
