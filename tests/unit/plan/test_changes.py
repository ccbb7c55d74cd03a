"""Which changes of a run are applied without being asked for by name."""

import pytest

from cloister.plan.changes import asks, at_system_program, leads_out

NAMES = (".vscode", ".mcp.json", ".config/tool.toml")


@pytest.mark.parametrize(
    "path",
    [
        ".vscode", ".vscode/tasks.json", "sub/.vscode/x", ".mcp.json", ".MCP.json", ".config/tool.toml",
        "a/.config/tool.toml/x", ".git/config", ".git/hooks/x", ".git/config.worktree", ".git/commondir",
        ".git/worktrees/x/HEAD", ".git/modules/x/config", ".git/rebase-merge/git-rebase-todo", ".GIT/index",
        ".git/objects/info/alternates", ".git/info/attributes", ".git/info/refs/x", "sub/.git", "sub/.git/index",
        "HEAD", "x/HEAD", ".git/info/exclude", ".git/index.lock",
    ],
)  # fmt: skip
def test_what_tools_load_asks(path):
    """Protected names in any directory and case, and everything of git but its history, must be asked for."""
    assert asks(path, "file", "", NAMES)


@pytest.mark.parametrize(
    "path",
    [
        "a", "src/main.py", ".vscodex", "x.mcp.json", ".config/other.toml", ".github/workflows/x", "HEADER",
        ".git/index", ".git/HEAD", ".git/objects/ab/cd", ".git/refs/heads/x", ".git/logs/HEAD", ".git/COMMIT_EDITMSG",
        ".git/info/refs", ".git/REBASE_HEAD", ".git/packed-refs",
    ],
)  # fmt: skip
def test_ordinary_work_does_not(path):
    """Sources, names that only look alike, and the history of a commit are applied as they are."""
    assert asks(path, "file", "", NAMES) == ""


def test_links_in_git_and_links_outwards_ask():
    """Links in .git ask, whatever they are called; elsewhere those that lead out."""
    assert asks(".git/COMMIT_EDITMSG", "symlink", "x", NAMES)
    assert asks("a", "symlink", "/etc", NAMES)
    assert asks("a", "symlink", "b", NAMES) == ""


@pytest.mark.parametrize(
    ("path", "link", "out"),
    [
        ("a", "b", False), ("a", "..", True), ("a/b", "..", False), ("a/b", "../..", True), ("a/b", "../c", False),
        ("a/b", "x/../../../y", True), ("a", "/x", True), ("a", "./x//y", False), ("a", "", False),
    ],
)  # fmt: skip
def test_links_are_judged_by_their_text(path, link, out):
    """A relative link may go up as far as the workspace's top and no further."""
    assert leads_out(path, link) is out


@pytest.mark.parametrize(
    ("link", "program"),
    [
        ("/usr/bin/python3", True), ("/bin/sh", True), ("/usr/lib/x", True), ("/usr", False), ("/etc/passwd", False),
        ("/home/me/.bashrc", False), ("/usr/../home/me", False), ("usr/bin/x", False), ("/usrx/y", False),
    ],
)  # fmt: skip
def test_programs_of_the_system_are_known_by_their_path(link, program):
    """What a virtual environment links to is told from everything else that lies outside."""
    assert at_system_program(link) is program
