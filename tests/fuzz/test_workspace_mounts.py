"""Whatever is found in a workspace: it is refused, or everything protected is out of the agent's reach."""

from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import DeniedError
from cloister.isolation.workspace import Options, layout
from cloister.plan.workspace import GIT_NAMES, GitDir, Nested, Node, Protected, WorkspaceFacts

ROOT = "/home/u/p"
NAMES = (".vscode", ".env", "a/b/c", "a/d", "refs")
KINDS = ("file", "directory", "other")
NODES = st.builds(lambda kind: Node(kind, 1, 2), st.sampled_from(["absent", "absent", *KINDS]))
ANY_NODE = st.builds(lambda kind: Node(kind, 1, 2), st.sampled_from(["absent", "symlink", *KINDS]))
PLACES = (".vscode", ".env", "a", "a/b", "a/b/c", "a/d", "refs", "objects", "n", "keys")
FOUND = st.fixed_dictionaries(dict.fromkeys(PLACES, NODES))
GIT_NODES = st.fixed_dictionaries(dict.fromkeys(GIT_NAMES, NODES))


@st.composite
def workspaces(draw):
    """Draw facts, also impossible ones."""
    shape = draw(st.sampled_from(["none", "clone", "pointer", "bare"]))
    path = {"bare": ROOT, "pointer": draw(st.sampled_from(["/home/u/main/.git", f"{ROOT}/.bare"]))}.get(
        shape, f"{ROOT}/.git"
    )
    directory = None if shape == "none" else GitDir(path, Node("directory", 1, 3), draw(GIT_NODES))
    kind = {"clone": "directory", "pointer": "file"}.get(shape, "absent")
    nodes = draw(FOUND)
    nodes[draw(st.sampled_from(PLACES))] = draw(ANY_NODE)  # one link at most: with many, everything is refused
    nested = draw(
        st.lists(
            st.builds(Nested, st.just("n/.git"), st.builds(lambda kind: Node(kind, 1, 2), st.sampled_from(KINDS))),
            max_size=1,
        )
    )
    return WorkspaceFacts(
        ROOT, Node("directory", 1, 9), 7, writable=True, nodes=nodes, git=Node(kind, 1, 4), shape=shape,
        directory=directory, nested=tuple(nested),
    )  # fmt: skip


@given(
    workspaces(),
    st.lists(st.builds(Protected, st.sampled_from(NAMES), st.sampled_from(["file", "directory"])), max_size=5),
    st.lists(st.sampled_from(["keys", "a", ".env"]), max_size=2, unique=True),
)
def test_everything_protected_is_read_only_and_stays_where_it_is(facts, protected, hide):
    """Each protected path has a read-only mount on it or above it, and every directory between is a mount point."""
    try:
        made = layout(facts, protected, Options(uid=7, home="/home/u", hide=tuple(hide)))
    except DeniedError:
        return

    ops = {mount.target: mount.op for mount in made.mounts}
    for name in {entry.name for entry in protected}:
        parts = name.split("/")
        above = [f"{ROOT}/{'/'.join(parts[:depth])}" for depth in range(1, len(parts) + 1)]
        held = [ops.get(path) for path in above]
        closed = next((at for at, op in enumerate(held) if op in {"ro", "content", "mask"}), None)
        assert closed is not None, (name, held)
        assert all(op is not None for op in held[:closed]), (name, held)


@given(workspaces())
def test_every_git_directory_in_reach_is_held(facts):
    """A writable git directory never comes without read-only hooks, configuration and commondir."""
    try:
        made = layout(facts, (), Options(uid=7, home="/home/u"))
    except DeniedError:
        return

    ops = {mount.target: mount.op for mount in made.mounts}
    for directory in made.git_dirs:
        for name in ("hooks", "config", "config.worktree", "commondir", "modules", "worktrees"):
            assert ops[f"{directory}/{name}"] == "ro"


@given(workspaces())
def test_what_is_absent_can_be_mounted_on(facts):
    """Every mount on something that is not there has a placeholder, so bubblewrap never makes a file of its own."""
    try:
        made = layout(facts, (Protected("a/b/c"),), Options(uid=7, home="/home/u"))
    except DeniedError:
        return

    points = {f"{point.base}/{point.name}" for point in made.placeholders}
    for mount in made.mounts:
        if mount.node.kind == "absent" and mount.op != "mask":
            assert mount.target in points
