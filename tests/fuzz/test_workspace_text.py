"""No text or bytes that an agent may leave in a workspace can crash what reads them."""

from hypothesis import given
from hypothesis import strategies as st

from cloister.plan.changes import asks, leads_out
from cloister.plan.gitconfig import pairs
from cloister.plan.gitindex import forged_paths
from cloister.plan.textdiff import unified


@given(st.text(alphabet='[]"\\=;#\n\r\t abcP.', max_size=200) | st.text(max_size=200))
def test_any_configuration_is_read_to_its_end(text):
    """Any text yields pairs of text and ends."""
    assert all("\0" not in key and "." in key for key, _ in pairs(text))


@given(st.binary(max_size=300), st.sampled_from([20, 32]))
def test_any_index_is_judged(data, size):
    """Any bytes give a list; nothing but an index or nothing at all is clean."""
    found = forged_paths(data, hash_bytes=size)

    assert found or not data or data.startswith(b"DIRC")


@given(st.integers(2, 4), st.integers(0, 3), st.binary(max_size=300))
def test_any_entries_are_judged(version, count, data):
    """Any bytes after a valid header give a list."""
    header = b"DIRC" + version.to_bytes(4, "big") + count.to_bytes(4, "big")

    assert isinstance(forged_paths(header + data), list)


@given(st.text(max_size=30), st.none() | st.binary(max_size=300), st.none() | st.binary(max_size=300))
def test_any_difference_can_be_shown(path, old, new):
    """Whatever the contents, only printable characters, tabs and newlines come out."""
    assert all(char.isprintable() or char in "\t\n" for char in unified(path, old, new))


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b"]), max_size=6), st.integers(0, 3))
def test_a_link_that_stays_inside_never_rises_above_the_top(parts, depth):
    """The verdict on links agrees with walking them step by step."""
    path = "/".join(["d"] * depth + ["l"])
    link = "/".join(parts)
    level = depth
    lowest = depth
    for part in parts:
        level += {"..": -1, "a": 1, "b": 1}.get(part, 0)
        lowest = min(lowest, level)

    assert leads_out(path, link) == (link.startswith("/") or lowest < 0)


@given(st.text(max_size=40), st.sampled_from(["file", "directory", "symlink", "absent"]))
def test_any_path_is_judged(path, kind):
    """Any path gives a reason or none; below a nested .git there is always a reason."""
    assert asks(f"x/.git/{path}", kind, "", ())
    assert isinstance(asks(path or "x", kind, "", (".vscode",)), str)
