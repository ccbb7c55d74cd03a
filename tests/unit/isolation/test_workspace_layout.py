"""From what was found in a workspace to its mounts: one golden list per shape of repository, and every refusal."""

import msgspec
import pytest

from cloister.errors import DeniedError
from cloister.isolation.workspace import Options, layout, wanted
from cloister.plan.workspace import (
    ABSENT,
    GIT_NAMES,
    GitDir,
    Nested,
    Node,
    Protected,
    WorkspaceFacts,
    WorkspaceLayout,
    Worktree,
)

FILE = Node("file", 1, 2)
DIRECTORY = Node("directory", 1, 3)
LINK = Node("symlink", 1, 4)
OTHER = Node("other", 1, 5)
ROOT = "/home/u/p"
OPTIONS = Options(uid=1000, home="/home/u", reserved=("/home/u/.config/cloister",))
TOOLS = (
    Protected(".vscode", "directory", why="editor"),
    Protected(".env", content="x"),
    Protected(".bashrc", when="present"),
)


def git_dir(path, **changes):
    """Return a git directory as `git init` makes it."""
    nodes = dict.fromkeys(GIT_NAMES, ABSENT) | {"HEAD": FILE, "config": FILE, "hooks": DIRECTORY}
    nodes |= changes.pop("nodes", {})
    return GitDir(path, DIRECTORY, nodes, **changes)


def facts(**changes):
    """Return a plain directory with changes."""
    plain = WorkspaceFacts(ROOT, DIRECTORY, 1000, writable=True, nodes={})
    return msgspec.structs.replace(plain, **changes)


def clone(**changes):
    """Return a clone with changes."""
    return facts(**({"git": DIRECTORY, "shape": "clone", "directory": git_dir(f"{ROOT}/.git")} | changes))


def short(made: WorkspaceLayout) -> list[str]:
    """Return op and target of each mount, the root written as `~`."""
    return [f"{mount.op} {mount.target.replace(ROOT, '~')}" for mount in made.mounts]


def absent(made: WorkspaceLayout) -> dict[str, str]:
    """Return what would be made, by path."""
    return {f"{point.base}/{point.name}".replace(ROOT, "~"): point.kind for point in made.placeholders}


GIT = ["ro ~/.git/commondir", "ro ~/.git/config", "ro ~/.git/config.worktree", "ro ~/.git/hooks", "ro ~/.git/modules"]
CLONE = ["bind ~", "pin ~/.git", *GIT, "ro ~/.git/worktrees", "content ~/refs"]


def test_a_clone():
    """A clone: git's directory stays where it is and writable, its configuration and hooks do not."""
    made = layout(clone(), (), OPTIONS)

    assert short(made) == CLONE
    assert made.git_dirs == (f"{ROOT}/.git",)
    assert made.notes == ()


def test_a_plain_directory():
    """No repository: an empty, read-only .git, and the note says what to type."""
    made = layout(facts(), TOOLS, OPTIONS)

    assert short(made) == ["bind ~", "content ~/.env", "ro ~/.git", "ro ~/.vscode", "content ~/refs"]
    assert absent(made) == {"~/.env": "socket", "~/.git": "directory", "~/.vscode": "directory", "~/refs": "socket"}
    assert "git init" in made.notes[0]


def test_placeholders_that_git_reads_are_files():
    """Inside git directories absent files are files, since git dies of a commondir it cannot open."""
    made = layout(clone(), (), OPTIONS)

    kinds = {point.name: (point.kind, point.content) for point in made.placeholders if point.base.endswith(".git")}
    assert kinds["commondir"] == ("file", ".\n")
    assert kinds["config.worktree"] == ("file", "")
    assert kinds["worktrees"] == ("directory", "")


def test_a_linked_worktree():
    """A worktree: the pointer read-only, the repository at its path, own worktree writable, siblings not."""
    nodes = {"commondir": FILE, "gitdir": FILE, "config.worktree": ABSENT}
    trees = (Worktree("mine", DIRECTORY, nodes, inside=True), Worktree("other", DIRECTORY, nodes))
    main = git_dir("/home/u/main/.git", worktrees=trees, nodes={"worktrees": DIRECTORY})
    made = layout(facts(git=FILE, shape="pointer", directory=main), (), OPTIONS)

    git = "/home/u/main/.git"
    assert short(made) == [
        f"bind {git}", f"ro {git}/commondir", f"ro {git}/config", f"ro {git}/config.worktree", f"ro {git}/hooks",
        f"ro {git}/modules", f"ro {git}/worktrees", f"bind {git}/worktrees/mine", f"ro {git}/worktrees/mine/commondir",
        f"ro {git}/worktrees/mine/config.worktree", f"ro {git}/worktrees/mine/gitdir", "bind ~", "ro ~/.git",
    ]  # fmt: skip


def test_a_repository_beside_its_pointer():
    """`.git` naming a directory in the workspace: that directory is pinned, not bound a second time."""
    made = layout(facts(git=FILE, shape="pointer", directory=git_dir(f"{ROOT}/.bare")), (), OPTIONS)

    assert short(made)[:3] == ["bind ~", "pin ~/.bare", "ro ~/.bare/commondir"]
    assert "ro ~/.git" in short(made)


def test_submodules_and_nested_repositories():
    """Submodules and nested repositories: the same protection each, and every directory above them pinned."""
    module = git_dir(f"{ROOT}/.git/modules/sub")
    main = git_dir(f"{ROOT}/.git", modules=(module,), nodes={"modules": DIRECTORY})
    nested = (Nested("libs/sub/.git", FILE), Nested("deps/own/.git", DIRECTORY, git_dir(f"{ROOT}/deps/own/.git")))
    nodes = {"libs": DIRECTORY, "libs/sub": DIRECTORY, "deps": DIRECTORY, "deps/own": DIRECTORY}
    made = short(layout(clone(directory=main, nested=nested, nodes=nodes), (), OPTIONS))

    for line in (
        "ro ~/.git/modules", "bind ~/.git/modules/sub", "ro ~/.git/modules/sub/hooks", "pin ~/libs", "pin ~/libs/sub",
        "ro ~/libs/sub/.git", "pin ~/deps", "pin ~/deps/own", "pin ~/deps/own/.git", "ro ~/deps/own/.git/config",
    ):  # fmt: skip
        assert line in made


def test_a_bare_repository():
    """A bare repository: its own hooks and configuration, at the top."""
    made = layout(facts(shape="bare", directory=git_dir(ROOT)), (), OPTIONS)

    assert short(made) == [
        "bind ~", "ro ~/commondir", "ro ~/config", "ro ~/config.worktree", "ro ~/hooks", "ro ~/modules",
        "ro ~/worktrees",
    ]  # fmt: skip


def test_a_broken_repository_is_read_only():
    """A .git without HEAD is mounted read-only as a whole."""
    made = layout(clone(directory=git_dir(f"{ROOT}/.git", nodes={"HEAD": ABSENT})), (), OPTIONS)

    assert short(made) == ["bind ~", "ro ~/.git", "content ~/refs"]
    assert made.git_dirs == ()


def test_an_overlay_needs_no_protection_in_place():
    """Overlay mode: one copy-on-write mount and what is hidden; links are no reason to refuse."""
    nodes = {".vscode": LINK, "keys": DIRECTORY}
    options = msgspec.structs.replace(OPTIONS, overlay=True, hide=("keys",))
    made = layout(clone(git=LINK, shape="none", directory=None, nodes=nodes), TOOLS, options)

    assert short(made) == ["overlay ~", "mask ~/keys"]
    assert made.placeholders == ()


def test_an_overlay_of_a_worktree_reads_its_repository():
    """Overlay mode in a worktree: the repository outside is there, read-only, and a note says so."""
    main = git_dir("/home/u/main/.git")
    options = msgspec.structs.replace(OPTIONS, overlay=True)
    made = layout(facts(git=FILE, shape="pointer", directory=main), (), options)

    assert short(made) == ["ro /home/u/main/.git", "overlay ~"]
    assert "not commit" in made.notes[0]


@pytest.mark.parametrize(
    ("nodes", "line"),
    [
        ({}, "content ~/refs"),
        ({"refs": FILE}, "ro ~/refs"),
        ({"refs": DIRECTORY}, "content ~/objects"),
        ({"refs": DIRECTORY, "objects": DIRECTORY}, None),
    ],
)
def test_one_part_of_a_bare_repository_is_kept_free(nodes, line):
    """The first of refs and objects that is no directory is held; with both there, a note says what remains."""
    made = layout(clone(nodes=nodes), (), OPTIONS)

    assert [entry for entry in short(made) if entry.endswith(("refs", "objects"))] == ([line] if line else [])
    assert bool(made.notes) == (line is None)


def test_a_path_in_absent_directories_is_reached():
    """A protected path whose parents are absent: they are made, pinned, and the path held below them."""
    made = layout(clone(), (Protected("a/b/c"),), OPTIONS)

    assert [line for line in short(made) if "~/a" in line] == ["pin ~/a", "pin ~/a/b", "content ~/a/b/c"]
    assert list(absent(made))[-4:] != []
    assert absent(made)["~/a/b"] == "directory"


def test_a_file_above_a_protected_path_is_held():
    """Where a file stands above a protected path, the file is read-only, so no directory can take its place."""
    made = layout(clone(nodes={"a": FILE, "a/b": ABSENT}), (Protected("a/b"),), OPTIONS)

    assert "ro ~/a" in short(made)
    assert "content ~/a/b" not in short(made)


def test_another_runs_placeholders_are_shared():
    """What may be another run's placeholder is listed again, so that run cannot take it away alone."""
    made = layout(clone(nodes={".vscode": DIRECTORY, ".env": OTHER}), TOOLS, OPTIONS)

    assert {"~/.vscode", "~/.env"} <= set(absent(made))
    assert {"ro ~/.vscode", "content ~/.env"} <= set(short(made))


def test_unprotected_names_are_left_out_and_recorded():
    """Opt-outs remove exactly the named mounts, also inside git, and are listed."""
    options = msgspec.structs.replace(OPTIONS, unprotected=(".vscode/", ".git/hooks", "unknown"))
    made = layout(clone(), TOOLS, options)

    assert set(short(layout(clone(), TOOLS, OPTIONS))) - set(short(made)) == {"ro ~/.vscode", "ro ~/.git/hooks"}
    assert made.unprotected == (".git/hooks", ".vscode")


def test_hidden_paths_win_over_everything():
    """A hidden path is masked even where it is protected; one that is absent is only noted."""
    options = msgspec.structs.replace(OPTIONS, hide=(".env", "keys", "gone"))
    made = layout(clone(nodes={".env": FILE, "keys": DIRECTORY}), TOOLS, options)

    assert {"mask ~/.env", "mask ~/keys"} <= set(short(made))
    assert "ro ~/.env" not in short(made)
    assert made.notes == ("gone is to be hidden but is not there",)


def test_parents_are_mounted_before_children():
    """Whatever was found, no mount comes before one on a directory above it."""
    module = git_dir(f"{ROOT}/.git/modules/sub")
    main = git_dir(f"{ROOT}/.git", modules=(module,), nodes={"modules": DIRECTORY})
    nested = (Nested("a-b/x/.git", FILE), Nested("a/x/.git", FILE))
    made = layout(clone(directory=main, nested=nested), TOOLS, OPTIONS)

    targets = [mount.target for mount in made.mounts]
    for index, target in enumerate(targets):
        assert not [later for later in targets[index + 1 :] if target.startswith(f"{later}/")]
    assert len(targets) == len(set(targets))


def test_a_plain_clone_stays_within_the_budget_of_mounts():
    """Git's share of the mounts is fixed and small: each costs about 0.15 ms."""
    assert len(layout(clone(), (), OPTIONS).mounts) <= 9


def test_many_nested_repositories_cost_a_bounded_number_of_mounts():
    """Past the limits nested repositories are read-only, then only noted."""
    nested = tuple(Nested(f"n{n}/.git", DIRECTORY, git_dir(f"{ROOT}/n{n}/.git")) for n in range(40))
    made = layout(clone(nested=nested, nodes={f"n{n}": DIRECTORY for n in range(40)}), (), OPTIONS)

    assert len(made.mounts) < 90
    assert sum("looked at afterwards" in note for note in made.notes) == 24


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"root": "/"}, "workspace-system"),
        ({"root": "/etc/x"}, "workspace-system"),
        ({"root": "/usr/src/linux"}, "workspace-system"),
        ({"root": "/tmp"}, "workspace-system"),
        ({"root": "/home"}, "workspace-system"),
        ({"root": "/proc/self/cwd"}, "workspace-system"),
        ({"root": "/home/u"}, "workspace-home"),
        ({"root": "/home/u/.config"}, "workspace-reserved"),
        ({"root": "/home/u/.config/cloister"}, "workspace-reserved"),
        ({"root": "/home/u/.config/cloister/x"}, "workspace-reserved"),
        ({"root": "/home/u/a\nb"}, "workspace-name"),
        ({"root": "/home/u/a\x1b[2J"}, "workspace-name"),
        ({"root": "/home/u/\udcff"}, "workspace-name"),
        ({"owner": 0}, "workspace-owner"),
        ({"writable": False}, "workspace-read-only"),
    ],
)
def test_unfit_directories_are_refused(changes, reference):
    """Directories that are no project are refused, each with its own reference and something to do."""
    with pytest.raises(DeniedError) as refused:
        layout(facts(**changes), (), OPTIONS)

    assert refused.value.reference == reference
    assert refused.value.remedy


@pytest.mark.parametrize(
    "root", ["/home/u/p", "/home/u2", "/srv/p", "/tmp/p", "/home/u/a b:c%d", "/home/u/café", "/etcetera"]
)
def test_fit_directories_are_accepted(root):
    """Siblings with a common prefix, spaces, colons and other scripts are no reason to refuse."""
    assert layout(facts(root=root), (), OPTIONS).root == root


@pytest.mark.parametrize(
    ("found", "reference", "remedy"),
    [
        (clone(git=LINK, shape="none", directory=None), "workspace-symlink", '".git"'),
        (clone(nodes={".vscode": LINK}), "workspace-symlink", '".vscode"'),
        (clone(nodes={"refs": LINK}), "workspace-symlink", '"refs"'),
        (clone(directory=git_dir(f"{ROOT}/.git", nodes={"hooks": LINK})), "workspace-symlink", '".git/hooks"'),
        (clone(directory=git_dir(f"{ROOT}/.git", nodes={"config": LINK})), "workspace-symlink", '".git/config"'),
        (clone(directory=git_dir(f"{ROOT}/.git", elsewhere=True)), "git-commondir", "overlay"),
        (facts(git=FILE, shape="pointer", pointer_problem="x"), "git-pointer", "repair"),
        (clone(configured=(Protected(".", "directory", why="core.hooksPath"),)), "git-hooks-path", "git config"),
    ],
)
def test_what_cannot_be_protected_is_refused(found, reference, remedy):
    """Links and pointers that lead elsewhere are refused with the words that help."""
    with pytest.raises(DeniedError) as refused:
        layout(found, TOOLS, OPTIONS)

    assert refused.value.reference == reference
    assert remedy in refused.value.remedy


def test_a_link_to_hide_is_refused():
    """Hiding a link would hide nothing, so it is refused."""
    options = msgspec.structs.replace(OPTIONS, hide=("keys/k",))
    with pytest.raises(DeniedError) as refused:
        layout(clone(nodes={"keys": LINK}), (), options)

    assert refused.value.reference == "hide-symlink"


def test_the_probe_is_asked_for_every_name():
    """The names to look at are the protected and the hidden ones."""
    options = msgspec.structs.replace(OPTIONS, hide=("keys",))

    assert wanted(TOOLS, options) == [".vscode", ".env", ".bashrc", "keys"]


def test_layouts_survive_storage():
    """A layout written as JSON and read back is the same layout."""
    made = layout(clone(), TOOLS, OPTIONS)

    assert msgspec.json.decode(msgspec.json.encode(made), type=WorkspaceLayout) == made
