"""What mounts cannot prevent is seen: by the check during a run and by the look after it."""

from __future__ import annotations

import time

import pytest
from workspace_box import as_owner, findings, host, inner, works

from cloister.host.mount_check import check_mounts

pytestmark = pytest.mark.kernel


def test_tripwires_report_what_mounts_cannot_prevent(clone, place):
    """New repositories, a rebase with a list, nested tool settings, borrowed objects and links in .git are reported."""
    host(clone.root, "mkdir old; cd old; git init -q; mkdir -p ../pkg/.vscode")
    made = clone.plan()
    time.sleep(0.05)
    since = time.time_ns()
    works(
        clone,
        place,
        "git init -q node_modules/x; git init -q --bare deep/er/bare; mkdir .git/rebase-merge;"
        "echo exec x > .git/rebase-merge/git-rebase-todo; mkdir -p sub/.claude; echo / > .git/objects/info/alternates;"
        "mkdir -p .git/refs/replace/x; echo hidden >> .git/info/exclude;"
        f"ln -s {place}/outside/x .git/COMMIT_EDITMSG.new; mv -T .git/COMMIT_EDITMSG.new .git/COMMIT_EDITMSG",
    )

    assert findings(clone, made, since) == [
        ".git/COMMIT_EDITMSG",
        ".git/info/exclude",
        ".git/objects/info/alternates",
        ".git/rebase-merge",
        ".git/refs/replace",
        "deep/er/bare",
        "node_modules/x/.git",
        "sub/.claude",
    ]


FORGE = r"""
import hashlib
data = open(".git/index", "rb").read()[:-20].replace(b"xgit/hooks", b".git/hooks")
open(".git/index", "wb").write(data + hashlib.sha1(data).digest())
"""


def test_a_forged_index_is_reported(clone, place):
    """An index that would make `git checkout .` write a hook on the host is reported; an honest one is not."""
    made = clone.plan()
    time.sleep(0.05)
    since = time.time_ns()
    works(clone, place, "mkdir -p xgit/hooks; echo true > xgit/hooks/pre-commit; git add xgit")
    assert findings(clone, made, since) == []

    works(clone, place, f"rm -r xgit; python3 -c '{FORGE}'")

    assert findings(clone, made, since) == [".git/index"]
    host(clone.root, "git checkout -q .")
    assert (clone.root / ".git/hooks/pre-commit").exists(), "the attack itself must work"


def test_tripwires_are_silent_after_honest_work(clone, place):
    """Ordinary commits, new directories and what was there before are not reported."""
    host(clone.root, "mkdir old; cd old; git init -q; git commit -q --allow-empty -m x; mkdir -p ../pkg/.vscode")
    made = clone.plan()
    time.sleep(0.05)
    since = time.time_ns()
    works(
        clone, place, "mkdir d && echo x > d/f && git add d && git commit -qm d && git stash list; cd old; git status"
    )

    assert findings(clone, made, since) == []


def test_protection_lost_to_the_host_is_seen(clone, place):
    """When git on the host replaces .git/config, the run loses that mount: the check and the report say so."""
    made = clone.start("run")
    time.sleep(0.05)
    since = time.time_ns()
    agent = clone.spawn(made, place / "contents", "echo ready; read line; echo '# x' >> .git/config")
    agent.stdout.readline()
    with as_owner():
        assert check_mounts(inner(agent), made) == []
    host(clone.root, "git config foo.bar baz")

    with as_owner():
        wrong = check_mounts(inner(agent), made)
    agent.communicate("go\n", timeout=30)
    clone.end("run")

    assert wrong == [f"{clone.root}/.git/config: writable"]
    assert findings(clone, made, since) == [".git/config"]


def test_a_link_swapped_in_before_mounting_is_seen(clone, place):
    """If a protected directory becomes a link between looking and mounting, the check before the start says so."""
    host(clone.root, "mkdir .vscode/; touch .vscode/x")
    made = clone.start("run")
    (clone.root / ".vscode").rename(clone.root / "v")
    (clone.root / ".vscode").symlink_to("v")
    agent = clone.spawn(made, place / "contents", "echo ready; read line")
    agent.stdout.readline()

    with as_owner():
        wrong = check_mounts(inner(agent), made)
    agent.communicate("go\n", timeout=30)
    clone.end("run")

    assert wrong == [f"{clone.root}/.vscode: writable"]
