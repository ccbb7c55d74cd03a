"""Editing a policy: what comes out reads as the old tables with exactly the entries added, or nothing comes out."""

import tomllib

import hypothesis
import hypothesis.strategies as st
import pytest

from cloister.errors import UnsupportedError
from cloister.runs.edit_policy import add_allow

HEAD = 'schema = 1\n# who\n[agents.a]\npreset = "shell" # kept\n'
LAYOUTS = {
    "no table": HEAD,
    "no end of line": HEAD.rstrip("\n"),
    "table without list": HEAD + "\n[agents.a.egress] # mine\nmode = \"deny\"\n[agents.b]\npreset = 'pi'\n",
    "empty list": HEAD + "[agents.a.egress]\nallow = []\n",
    "one line": HEAD + '[agents.a.egress]\nallow = ["x.org", "y.org:80"] # both\ndeny = ["z.org"]\n',
    "closing comma": HEAD + '[agents.a.egress]\nallow = ["x.org",]\n',
    "lines": HEAD + '[agents.a.egress]\nallow = [\n  "x.org", # ]\n  "y.org" # last ]\n]\nmode = "ask"\n',
    "lines with comma": HEAD + '[agents.a.egress]\nallow = [\n    "x.org",\n    # nothing\n]\n',
    "empty lines": HEAD + "[agents.a.egress]\nallow = [\n]\n",
    "bracket on the last item": HEAD + '[agents.a.egress]\nallow = ["x.org",\n  "y.org"]\n',
    "long form": HEAD + '[agents.a.egress]\nallow = [{ host = "x.org", methods = ["GET"] }, "]"]\n',
    "quoted name": HEAD.replace("agents.a", 'agents."a"') + '[ agents . "a" . egress ]\nallow = []\n',
    "list of another": HEAD + '[agents.a.egress]\nmode = "deny"\n[agents.b.egress]\nallow = ["b.org"]\n[agents.b]\n',
    "deny before": HEAD + '[agents.a.egress]\ndeny = ["allow = [", "q.org"]\nallow = ["x.org"]\n',
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_are_added_and_nothing_else_changes(layout: str) -> None:
    """Whatever the layout, the tables are the old ones with the entries at the end, and every comment stays."""
    text = LAYOUTS[layout]
    changed = add_allow(text, "a", ["new.org", "other.org:8443"], name="f")

    old = tomllib.loads(text)
    egress = old["agents"]["a"].setdefault("egress", {})
    egress["allow"] = [*egress.get("allow", []), "new.org", "other.org:8443"]
    assert tomllib.loads(changed) == old
    assert [line for line in text.splitlines() if "#" in line and line.split("#")[1] not in changed] == []


@pytest.mark.parametrize(
    "text",
    [
        'schema = 1\n[agents.a]\npreset = "shell"\negress = { allow = ["x.org"] }\n',
        'schema = 1\n[agents]\na = { preset = "shell" }\n',
        'schema = 1\n[agents.a]\npreset = "shell"\negress.allow = ["x.org"]\n',
        'schema = 1\n[agents.a]\npreset = "shell"\n[[agents.a.egress.allow]]\nhost = "x.org"\n',
        'schema = 1\n[agents.a]\nenvironment.X = """\n[agents.a.egress]\nallow = [\n"""\negress = {}\n',
        'schema = 1\n[agents.b]\npreset = "shell"\n',
    ],
)
def test_what_cannot_be_edited_is_refused(text: str) -> None:
    """Inline tables, dotted keys, arrays of tables, a header inside a string, an absent agent: refused, not guessed."""
    with pytest.raises(UnsupportedError, match="be edited safely"):
        add_allow(text, "a", ["new.org"], name="f")


@hypothesis.given(st.sampled_from(sorted(LAYOUTS)), st.text(max_size=30), st.integers(min_value=0, max_value=200))
def test_a_damaged_file_is_edited_rightly_or_not_at_all(layout: str, noise: str, at: int) -> None:
    """Text pushed into a policy at any place never leads to a result that means something else."""
    text = LAYOUTS[layout][:at] + noise + LAYOUTS[layout][at:]
    try:
        changed = add_allow(text, "a", ["new.org"], name="f")
    except UnsupportedError:
        return
    after, before = tomllib.loads(changed), tomllib.loads(text)
    assert after["agents"]["a"]["egress"]["allow"].pop() == "new.org"
    before["agents"]["a"].setdefault("egress", {}).setdefault("allow", [])
    assert after == before
