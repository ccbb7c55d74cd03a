"""A workspace under a real kernel, real bubblewrap and real git: each attack fails, and its honest twin works."""

from __future__ import annotations

import os
import time

import pytest
from workspace_box import UID, Box, as_owner, attack, host, names, snapshot, works

from cloister.errors import DeniedError
from cloister.host.workspace_probe import find_project

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(
    "command",
    [
        "git status --porcelain",
        "echo b > b && git add -A && git commit -qm second && git log --oneline | grep -q second",
        "echo b >> a && git stash && git stash pop",
        "git checkout -q -b topic && git commit -q --allow-empty -m t && git checkout -q - && git rebase -q topic",
        "git gc -q --prune=now && git fsck",
        "git worktree list && git submodule status",
        "git -C . tag v2 && git branch -m v3 || git branch x",
        "git diff HEAD && git log -p && git blame a && git reset --hard -q v1",
        "mkdir -p src/deep && echo x > src/deep/f && mv src other && rm -r other",
    ],
)
def test_git_works_in_a_clone(clone, place, command):
    """Everyday git works in a plain clone, and leaves no file on the host that it would not leave unsandboxed."""
    works(clone, place, command)

    assert not {".vscode", ".claude", ".mcp.json", ".env", "refs"} & names(clone.root)
    assert not {"commondir", "config.worktree", "modules", "worktrees"} & names(clone.root / ".git")
    host(clone.root, "git status && git fsck")


def test_fetch_from_a_local_path_works(clone, place):
    """`git fetch PATH` works when the other repository lies in the workspace."""
    host(clone.root, "git clone -q --bare . other.git; git -C other.git branch side")

    works(clone, place, "git fetch -q ./other.git side && git rev-parse FETCH_HEAD")


@pytest.mark.parametrize(
    "command",
    [
        "git config user.name x",
        "git config --global core.fsmonitor x",
        "echo '[core] fsmonitor = x' >> .git/config",
        "echo '[core] fsmonitor = x' > .git/config.worktree",
        "rm .git/config.worktree",
        "mv .git/config .git/c",
        "printf '/tmp' > .git/commondir",
        "rm -f .git/commondir",
        "ln -sf /tmp/evil .git/commondir",
        "echo x > .git/hooks/pre-commit",
        "mv .git/hooks .git/h",
        "rmdir .git/hooks || rm -r .git/hooks",
        "mv .git .gitx",
        "mkdir -p .git/modules/x",
        "mkdir -p .git/worktrees/x",
        "git worktree add ../x",
        "git worktree add wt",
        "git init",
        "echo x > .vscode/tasks.json",
        "mv .vscode v",
        "rmdir .vscode",
        "mkdir .claude/x",
        "echo x > .mcp.json",
        "rm -f .mcp.json",
        "ln -f a .mcp.json",
        "mv a .env",
        "mkdir refs",
        "rm refs",
        "mount --bind a refs",
        "umount .git/config",
        "mknod disk b 253 0",
    ],
)
def test_what_runs_on_the_host_later_cannot_be_written(clone, place, command):
    """Attack 5, 6, 11, 20, 21: hooks, configuration, pointers and tool settings resist, absent or not."""
    before = snapshot(clone.root)

    attack(clone, place, command)

    assert snapshot(clone.root) == before


def test_git_config_fails_cleanly(clone, place):
    """`git config` inside says why and leaves no lock behind that would block the host's git."""
    assert "could not write config file" in attack(clone, place, "git config user.name x")

    host(clone.root, "git config user.name y")


def test_a_broken_repository_does_not_turn_the_workspace_into_a_bare_one(clone, place):
    """An agent that breaks .git/HEAD cannot make git obey a config file in the work tree."""
    (place / "config").write_text(
        "[core]\nrepositoryformatversion = 0\nbare = false\nworktree = .\n"
        f'fsmonitor = "touch {place}/outside/pwned; false"\n'
    )
    config = (place / "config").read_text()
    works(clone, place, f"rm .git/HEAD; mkdir objects; echo 'ref: refs/heads/main' > HEAD; echo '{config}' > config")
    attack(clone, place, "mkdir refs")
    attack(clone, place, "rm refs")

    host(clone.root, "git status", check=False)

    assert not (place / "outside/pwned").exists()
    (clone.root / "refs").mkdir()
    host(clone.root, "git status", check=False)
    assert (place / "outside/pwned").exists(), "the attack itself must work without the protection"


def test_existing_files_stay_readable_and_are_not_written(clone, place):
    """A protected file that exists can be read, and shell files are protected only when they exist."""
    host(clone.root, "echo SECRET=1 > .env; mkdir .vscode; echo {} > .vscode/settings.json; echo x > .bashrc")

    assert "SECRET=1" in works(clone, place, "cat .env .vscode/settings.json .bashrc")
    attack(clone, place, "echo x >> .env")
    attack(clone, place, "echo x >> .bashrc")
    attack(clone, place, "rm -rf .vscode/settings.json")
    works(clone, place, "echo x > .zshrc && rm .zshrc")


def test_absent_files_show_their_content(plain, place):
    """What is absent reads as the content its entry gives, so agents find valid files."""
    assert works(plain, place, "cat .mcp.json .env") == "{}"


def test_a_plain_directory_cannot_become_a_repository(plain, place):
    """Without .git, neither `git init` nor a bare repository's files can be made at the top; other files can."""
    assert "git init" in plain.plan().notes[0]
    attack(plain, place, "git init")
    works(plain, place, "mkdir sub && echo x > sub/file && mv sub/file . && rm -r sub")
    assert snapshot(plain.root) == ["file"]
    attack(plain, place, "git init --bare -q .")
    assert host(plain.root, "git rev-parse --git-dir", check=False).returncode != 0


def test_symlinks_inside_do_not_reach_outside(clone, place):
    """Attack 1 and 4: neither a symbolic nor a hard link written in the workspace reaches what is outside."""
    (place / "outside/secret").write_text("secret")
    host(clone.root, f"ln -s {place}/outside/secret link")

    attack(clone, place, "cat link")
    attack(clone, place, "echo x > link")
    attack(clone, place, f"ln {place}/outside/secret hard")
    attack(clone, place, "ln .git/config stolen && echo x > stolen")
    assert (place / "outside/secret").read_text() == "secret"


@pytest.mark.parametrize("name", [".git", ".git/hooks", ".git/config", ".vscode", ".mcp.json", "refs"])
def test_symlinked_protected_paths_are_refused(clone, place, name):
    """A protected path that is a link is never followed: the start is refused with a remedy, unless opted out."""
    host(clone.root, f"rm -rf {name}; ln -s {place}/outside {name}")

    with pytest.raises(DeniedError) as refused:
        clone.plan()

    assert refused.value.reference == "workspace-symlink"
    assert name in refused.value.remedy
    assert name in Box(clone.root, place / "state", unprotected=(name,)).plan().unprotected


def test_unprotected_names_are_writable_and_recorded(clone, place):
    """`workspace.unprotected` leaves exactly the named paths writable, and the layout says so."""
    box = Box(clone.root, place / "state", unprotected=(".vscode", ".git/config"))

    works(box, place, "mkdir .vscode && git config user.name x")
    attack(box, place, "echo x > .git/hooks/post-commit")
    assert box.plan().unprotected == (".git/config", ".vscode")


def test_hooks_path_in_the_workspace_is_protected(clone, place):
    """`core.hooksPath` pointing into the workspace is protected, parents pinned, also through an include."""
    host(clone.root, "git config include.path ../.shared; printf '[core]\\n\\thooksPath = tools/hooks\\n' > .shared")

    attack(clone, place, "echo x > tools/hooks/pre-commit")
    attack(clone, place, "mv tools t")
    attack(clone, place, "echo x >> .shared")
    works(clone, place, "echo x > tools/other")
    assert (clone.root / "tools/other").exists(), "what the agent wrote beside it stays"
    assert not (clone.root / "tools/hooks").exists()


def test_hide_masks_files_and_directories(clone, place):
    """Hidden paths are empty and unreadable, present siblings are not."""
    host(clone.root, "mkdir keys; echo s > keys/k; echo s > token; echo v > visible")
    box = Box(clone.root, place / "state", hide=("keys", "token"))
    box.protected = (*box.protected,)

    attack(box, place, "cat keys/k")
    attack(box, place, "ls keys")
    attack(box, place, "cat token")
    attack(box, place, "rm -rf token || mv keys k")
    assert works(box, place, "cat visible") == "v\n"


@pytest.mark.parametrize(
    "command",
    [
        "git status && echo b > b && git add -A && git commit -qm second",
        "echo b >> a && git stash && git stash pop",
        "git rebase -q main && git worktree list",
        "git gc -q && git fsck && git fetch -q . main",
    ],
)
def test_git_works_in_a_worktree(worktree, place, command):
    """Everyday git works in a linked worktree although the main work tree is not visible."""
    works(worktree, place, command)

    host(worktree.root, "git status && git fsck")
    host(place / "project", "git status --porcelain && git worktree list")


@pytest.mark.parametrize(
    "command",
    [
        "echo 'gitdir: /tmp/x' > .git",
        "mv .git g",
        "rm .git",
        "git config user.name x",
        "G=$(git rev-parse --git-dir); echo /tmp > $G/commondir",
        "G=$(git rev-parse --git-dir); echo /tmp > $G/gitdir",
        "G=$(git rev-parse --git-dir); echo x > $G/config.worktree",
        "G=$(git rev-parse --git-dir); mv $G ${G}x",
        "C=$(git rev-parse --git-common-dir); echo x > $C/hooks/pre-commit",
        "C=$(git rev-parse --git-common-dir); echo x > $C/commondir",
        "C=$(git rev-parse --git-common-dir); mkdir $C/worktrees/evil",
        "ls ../../project/a",
    ],
)
def test_a_worktree_cannot_redirect_git(worktree, place, command):
    """Attack 20: pointers, the common directory and sibling worktrees resist."""
    attack(worktree, place, command)

    host(worktree.root, "git status")


def test_a_sibling_worktree_is_out_of_reach(worktree, place):
    """Other worktrees of the repository cannot be written; `git gc` then fails cleanly, commits work."""
    host(place / "project", "git worktree add -q ../outside/sibling")

    attack(worktree, place, "echo x > $(git rev-parse --git-common-dir)/worktrees/sibling/HEAD")
    assert "Read-only file system" in attack(worktree, place, "git gc -q")
    works(worktree, place, "echo b > b && git add b && git commit -qm b")
    host(worktree.root, "git fsck && git gc -q")


def test_a_planted_pointer_is_refused(plain, place):
    """A .git file naming a repository that does not name the workspace back is refused, so it exposes nothing."""
    host(place / "outside", "git init -q; git commit -q --allow-empty -m x; git worktree add -q other")
    host(place / "outside/other", "rm -r $(git rev-parse --git-dir)/logs")
    for target in (place / "outside/.git", place / "outside/.git/worktrees/other", place / "none", "x\0y"):
        (plain.root / ".git").write_text(f"gitdir: {target}\n")
        with pytest.raises(DeniedError) as refused:
            plain.plan()
        assert refused.value.reference == "git-pointer"


def test_submodules_can_be_used_but_not_rewired(clone, place):
    """Commits work inside a submodule; its configuration, hooks, pointer and place resist."""
    host(place / "outside", "git init -q; echo s > s; git add s; git commit -qm s")
    host(clone.root, "git submodule -q add ../outside libs/sub; git commit -qm sub")

    works(
        clone,
        place,
        "cd libs/sub && echo t > t && git add t && git commit -qm t && cd ../.. && git add -A && git commit -qm up",
    )
    for command in (
        "git -C libs/sub config core.fsmonitor x",
        "echo x > .git/modules/libs/sub/hooks/post-checkout",
        "echo x > .git/modules/libs/sub/commondir",
        "mv .git/modules/libs/sub .git/modules/libs/x",
        "mkdir -p .git/modules/new",
        "rm libs/sub/.git",
        "mv libs/sub libs/x",
        "mv libs l",
    ):
        attack(clone, place, command)
    host(clone.root, "git status && git -C libs/sub status")


def test_a_submodule_can_be_the_workspace(clone, place):
    """A submodule's checkout works as a workspace of its own, without the superproject."""
    host(place / "outside", "git init -q; echo s > s; git add s; git commit -qm s")
    host(clone.root, "git submodule -q add ../outside sub; git commit -qm sub")
    box = Box(clone.root / "sub", place / "state")

    works(box, place, "echo t > t && git add t && git commit -qm t && git status")
    attack(box, place, "git config user.name x")
    attack(box, place, "cat ../a")


def test_nested_repositories_are_protected_where_they_are(clone, place):
    """A repository below the workspace accepts commits; its hooks, config and the directories above it resist."""
    host(clone.root, "mkdir -p deps/one; cd deps/one; git init -q; echo x > x; git add x; git commit -qm x")

    works(clone, place, "cd deps/one && echo y > y && git add y && git commit -qm y")
    attack(clone, place, "git -C deps/one config user.name x")
    attack(clone, place, "echo x > deps/one/.git/hooks/pre-commit")
    attack(clone, place, "mv deps/one deps/two")
    attack(clone, place, "mv deps d")


def test_a_bare_repository_can_be_the_workspace(place):
    """In a bare repository objects and references are writable, configuration and hooks are not."""
    host(place / "project", "git init -q --bare .")
    box = Box(place / "project", place / "state")

    works(box, place, "T=$(git mktree </dev/null) && git update-ref refs/heads/x $(git commit-tree -m x $T)")
    attack(box, place, "git config user.name x")
    attack(box, place, "echo x > hooks/pre-receive")
    attack(box, place, "echo x > commondir")
    host(box.root, "git fsck")


def test_a_leftover_empty_git_directory_is_read_only(plain, place):
    """A .git that is no repository cannot be filled by the agent."""
    host(plain.root, "mkdir .git")

    attack(plain, place, "echo x > .git/config")
    attack(plain, place, "git init")
    works(plain, place, "echo x > x")


def test_symlinked_roots_are_refused(clone, place):
    """A root reached through a link is refused with its real path; the real path is accepted."""
    (place / "alias").symlink_to(clone.root)
    (place / "file").write_text("")
    for root, reference in (
        (place / "alias", "workspace-not-directory"),
        (place / "alias/sub", "workspace-not-directory"),
        (place / "file", "workspace-not-directory"),
        (place / "missing", "workspace-missing"),
        (place / "a/../project", "workspace-path"),
    ):
        with pytest.raises(DeniedError) as refused:
            Box(root, place / "state").plan()
        assert refused.value.reference == reference
    assert clone.plan().mounts


def test_the_project_is_the_top_of_the_work_tree(clone, place):
    """From a directory inside a repository the project is the top of its work tree, and never the home."""
    (clone.root / "src/deep").mkdir(parents=True)

    assert find_project(str(clone.root / "src/deep"), home="/home/x", uid=UID) == str(clone.root)
    assert find_project(str(clone.root / "src/deep"), home=str(clone.root), uid=UID) == str(clone.root / "src/deep")
    assert find_project(str(clone.root / "src/deep"), home="/home/x", uid=UID + 1) == str(clone.root / "src/deep")
    assert find_project(str(place / "outside"), home="/home/x", uid=UID) == str(place / "outside")


@pytest.mark.parametrize("name", [b"caf\xc3\xa9 %n$(x)", b"\xff\xfe", b"new\nline", b"a" * 255, b"-rf"])
def test_names_that_are_hard_to_write(place, name):
    """Nested repositories whose directories have hostile names are protected like others."""
    top = os.fsencode(place / "project") + b"/" + name
    os.mkdir(top)
    os.chown(top, UID, UID)
    host(place / "project", "cd -- ./*/; git init -q; git commit -q --allow-empty -m x")
    box = Box(place / "project", place / "state")

    attack(box, place, "cd -- ./*/; git config user.name x")
    works(box, place, "cd -- ./*/; git commit -q --allow-empty -m y")
    assert box.journal.records() == []


def test_an_ordinary_workspace_is_cheap(clone, place):
    """Looking and planning stay far below the price of the sandbox itself, and the mounts within their budget."""
    with as_owner():
        start = time.perf_counter()
        made = clone.plan()
        spent = time.perf_counter() - start

    assert len(made.mounts) <= 20
    assert spent < 0.05
