"""Differences for people: readable, bounded, and harmless to a terminal."""

from cloister.plan.textdiff import MAX_BYTES, MAX_LINES, unified


def test_text_is_shown_as_a_unified_diff():
    """Changed lines come with their context and file names."""
    assert unified("f", b"a\nb\n", b"a\nc\n") == "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"


def test_added_and_deleted_files_name_the_other_side():
    """A file that is not there is /dev/null, and empty files are named."""
    assert unified("f", None, b"a\n").startswith("--- /dev/null\n+++ b/f\n")
    assert unified("f", b"a\n", None).startswith("--- a/f\n+++ /dev/null\n")
    assert unified("f", None, b"") == "f: empty file (added)\n"
    assert unified("f", b"x", b"x") == ""


def test_terminal_sequences_are_escaped():
    """Escape sequences, bidirectional overrides and carriage returns show as text, in content and names."""
    shown = unified("f\x1b[2J", b"", "\x1b]0;t\x07 \u202e \r x\n".encode())

    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(shown)
    assert "\\x1b]0;t\\x07 \\u202e \\r x" in shown


def test_what_is_no_text_or_too_much_is_named():
    """Binary, oversized and overlong contents get one line with their sizes."""
    assert unified("f", b"\0", b"a") == "f: not text (1 bytes to 1 bytes)\n"
    assert unified("f", b"\xff", None) == "f: not text (1 bytes to nothing)\n"
    assert "too large" in unified("f", b"", b"a" * (MAX_BYTES + 1))
    assert "too many lines" in unified("f", b"", b"\n" * (MAX_LINES + 1))
    assert "more lines" in unified("f", b"", b"a\n" * (MAX_LINES - 1))
