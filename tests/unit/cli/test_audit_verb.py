"""`cloister audit` and `cloister timeline`, as people and programs see them."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cloister.audit.event import Endpoint, Event, File, Process
from cloister.audit.timeline import build
from cloister.audit.timeline_html import page
from cloister.cli import audit, timeline
from cloister.errors import DeniedError, UsageError
from support.audit_log import START_NS, Writer, small_day

EVIL = '"><script>alert(1)</script><img src=x onerror=y>&\x1b[31m\u202e\n\x9b2J\x00</style>'
WHO = {"run": "1aaaaaaaaaaa", "agent": "claude", "user": "alice"}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the folder of a log with one small day, and one hostile name in it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    writer = Writer(tmp_path / "log")
    writer.write(small_day())
    writer.write([Event(time=START_NS + 70_000_000, kind="file.opened", file=File(path=EVIL), **WHO)])
    return str(tmp_path / "log")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what `cloister audit` prints."""
    assert audit.main(list(words)) == 0
    return capsys.readouterr().out


def test_query_prints_what_is_meant_oldest_first(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Conditions choose, the limit takes the newest, and lines are in the order of the log."""
    lines = said(capsys, "query", "--log", log, "--kind", "file", "--limit", "2").splitlines()

    assert len(lines) == 2
    assert "id_ed25519  EACCES" in lines[0]
    assert said(capsys, "query", "--log", log, "--kind", "1007", "--count").strip() == "3"
    assert "DENIED" in said(capsys, "query", "--log", log, "--decision", "blocked")
    assert not said(capsys, "query", "--log", log, "--agent", "pi")


def test_no_control_character_reaches_a_reader(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, C1 controls and turned text stand as escapes, in tables and in JSON."""
    for words in (
        ("query", "--path", "*script*"),
        ("query", "--path", "*script*", "--json"),
        ("tail",),
        ("tail", "--json"),
    ):
        text = said(capsys, words[0], "--log", log, *words[1:])
        assert "script" in text
        assert all(char.isprintable() or char == "\n" for char in text), words
    event = json.loads(said(capsys, "query", "--log", log, "--path", "*script*", "--json"))
    assert event["file"]["path"] == EVIL
    text = said(capsys, "stats", "--log", log, "--by", "path")
    assert all(char.isprintable() or char == "\n" for char in text)


def test_tail_prints_the_newest(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as asked for, filtered before counting."""
    assert len(said(capsys, "tail", "--log", log, "-n", "3").splitlines()) == 3
    assert "process.exited" in said(capsys, "tail", "--log", log, "-n", "1", "--kind", "process")


def test_stats_count(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers by word for programs, and an overview for people."""
    found = json.loads(said(capsys, "stats", "--log", log, "--by", "class", "--json"))
    assert found["events"] == 13
    assert found["by"]["class"]["1007"] == 3
    assert "claude" in said(capsys, "stats", "--log", log)


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        (("query", "--kind", "file.open"), "kind-unknown"),
        (("query", "--run", "last"), "run-unknown"),
        (("query", "--since", "yesteryear"), "usage"),
        (("query", "--nope"), "option-unknown"),
    ],
)
def test_a_wrong_word_is_refused(log: str, words: tuple[str, ...], reference: str) -> None:
    """Each mistake is an error with something to type."""
    with pytest.raises(UsageError) as caught:
        audit.main([words[0], "--log", log, *words[1:]])

    assert caught.value.reference == reference
    assert caught.value.remedy


def test_where_there_is_no_log_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty place is no log, and a log that may not be read is not taken for an empty one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no log"):
        audit.main(["tail", "--own"])

    def closed(_: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cloister.cli.audit_options.segments", closed)
    with pytest.raises(DeniedError):
        audit.main(["tail", "--system"])


def test_a_timeline_shows_everything_in_order(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Facts first, then each event once; `--only` and `--processes` choose."""
    assert timeline.main(["1aaaaaaaaaaa", "--log", log]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.lstrip().startswith("+")]
    assert len(lines) == 13
    assert all(char.isprintable() or char == "\n" for char in text)
    assert timeline.main(["1aaa", "--log", log, "--only", "model,credential"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("+")]) == 2
    timeline.main(["1aaaaaaaaaaa", "--log", log, "--processes"])
    assert capsys.readouterr().out.splitlines()[1].startswith("  make[42]")
    timeline.main(["1aaaaaaaaaaa", "--log", log, "--json"])
    assert json.loads(capsys.readouterr().out)["sums"]["denied"] == 1
    with pytest.raises(UsageError):
        timeline.main(["1zzzzzzzzzzz", "--log", log])


class _Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "action", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile() -> list[Event]:
    """Return a run in which every text is hostile."""
    bad = Process(pid=1, uid="u", name=EVIL, path=EVIL, cmd_line=(EVIL, EVIL), parent_uid=EVIL)
    who = {"run": "1aaaaaaaaaaa", "agent": EVIL, "user": EVIL, "account": EVIL}
    place = Endpoint(hostname=EVIL, ip=EVIL, port=1, protocol=EVIL)
    return [
        Event(
            time=START_NS, kind="run.started", message=EVIL, policy=EVIL, details={"workspace": EVIL, EVIL: EVIL}, **who
        ),
        Event(time=START_NS + 1, kind="process.executed", process=bad, **who),
        Event(time=START_NS + 2, kind="file.opened", process=bad, file=File(path=EVIL, target=EVIL), **who),
        Event(time=START_NS + 3, kind="file.opened", process=bad, file=File(path=EVIL), **who),
        Event(time=START_NS + 4, kind="egress.decided", disposition="blocked", reason=EVIL, endpoint=place, **who),
        Event(time=START_NS + 5, kind=EVIL, message=EVIL, credential=EVIL, rule=EVIL, **who),
        Event(time=START_NS + 6, kind="run.ended", reason=EVIL, **who),
    ]


def test_a_page_loads_nothing_runs_nothing_and_shows_hostile_names_as_text() -> None:
    """No script, no address, no attribute that acts; the style sheet is the one that the policy names by its hash."""
    import base64
    import hashlib

    text = "".join(page(build("1aaaaaaaaaaa", hostile()), EVIL))
    seen = _Page()
    seen.feed(text)

    assert not seen.tags & {"script", "img", "iframe", "link", "object", "embed", "form", "a", "base"}
    assert not [name for name in seen.names if name.startswith("on") or name == "style"]
    assert not seen.links
    assert "<script>alert(1)</script>" in seen.text
    assert text.isprintable() or all(char.isprintable() or char == "\n" for char in text)
    (sheet,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert (
        html.unescape(policy) == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in sheet
    assert "@import" not in sheet


def test_a_page_is_private_and_whole(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is its owner's alone, every element is closed, and every event is in it."""
    target = tmp_path / "run.html"
    timeline.main(["1aaaaaaaaaaa", "--log", log, "--html", str(target)])
    text = target.read_text()

    assert target.stat().st_mode & 0o077 == 0
    assert text.endswith("</html>\n")
    for tag in ("ul", "li", "section", "details", "svg", "main", "div", "ol"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert text.count("<time>") == 13


def test_what_a_process_does_with_many_files_is_one_line_with_all_of_them() -> None:
    """Folding hides nothing: each path is in the entry, refused ones stand apart, and a pause begins another."""
    busy = Process(pid=2, uid="b", name="rg", path="/usr/bin/rg")
    events = [
        Event(
            time=START_NS + n * 1000,
            kind="file.opened",
            process=busy,
            file=File(path=f"/f{n}"),
            error=13 * (n == 5),
            **WHO,
        )
        for n in range(100)
    ]
    late = Event(time=START_NS + 3_000_000_000, kind="file.opened", process=busy, file=File(path="/late"), **WHO)
    made = build("1aaaaaaaaaaa", [*events, late])

    assert [len(entry.folded) for entry in made.entries] == [99, 0, 0]
    assert made.entries[0].text == "rg[2]  opened 99 files"
    assert made.entries[1].tone == "warning"
    assert sum(len(entry.folded) or 1 for entry in made.entries) == 101


def test_a_deep_tree_of_processes_is_no_trouble() -> None:
    """A chain of thousands of processes is shown, without recursion and without lists nested as deep."""
    chain = [
        Event(time=START_NS + n, kind="process.executed",
              process=Process(pid=n, uid=f"u{n}", name="sh", path="/bin/sh", parent_uid=f"u{n - 1}"), **WHO)
        for n in range(1, 5000)
    ]  # fmt: skip
    text = "".join(page(build("1aaaaaaaaaaa", chain), "a log"))

    assert text.count("<li><b>sh[") == 4999
    assert text.count("<ul") == text.count("</ul>")
