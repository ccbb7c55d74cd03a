"""Alarms: what a rule wants told arrives at a webhook, and nothing else does; one that is away gets them later."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.audit.chain import encode
from cloister.audit.event import Event, File
from cloister.host.audit_log import Log
from cloister.host.audit_syslog import Trust
from cloister.policy.model import Audit
from cloister.runs.audit_alarms import target_of
from cloister.runs.audit_detections import Watch
from cloister.runs.audit_export import Export, here
from cloister.runs.audit_keeper import Keeper, Rules

pytestmark = pytest.mark.kernel


class Hook(http.server.BaseHTTPRequestHandler):
    """Takes alarms, or says that it is not there."""

    posts: list[dict] = []  # noqa: RUF012  # one test at a time
    status = 200

    def do_POST(self) -> None:
        """Take one."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.status == 200:
            self.posts.append(json.loads(data))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hook() -> Iterator[str]:
    """Return the address of a webhook on loopback."""
    Hook.posts, Hook.status = [], 200
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hooks/secret"
    server.shutdown()
    server.server_close()


def turn(export: Export, until: int) -> None:
    """Let the export work until a line has arrived, five seconds at most."""
    end = time.monotonic() + 5
    while export.arrived < until and time.monotonic() < end:
        time.sleep(min(0.2, export.turn(time.monotonic())))


def test_alarms_arrive_at_a_webhook(tmp_path: Path, hook: str) -> None:
    """A detection with `alarm` is posted with words and event; other detections and events are passed over."""
    (tmp_path / "url").write_text(f"{hook}\n")
    keeper = Keeper(Log(str(tmp_path / "log")), str(tmp_path / "keys"), Rules())
    keeper.open()
    keeper.wake()
    audit = Audit(detections={"secret-file-read": "alarm"})
    Watch(keeper, audit, str(tmp_path), lambda _: None, source="auditd")

    def opened(path: str, run: str) -> bytes:
        return encode(Event(time=time.time_ns(), kind="file.opened", run=run, agent="claude", file=File(path=path)))

    target = target_of(f"file:{tmp_path}/url", "cef", Trust("", ""))
    export = Export(str(tmp_path / "log"), str(tmp_path), "alarm", target, here())
    Hook.status = 503
    keeper.put([opened("/home/al/.ssh/id_rsa", "1aaaaaaaaaaa"), opened("/home/al/x\x1b[2J", "1bbbbbbbbbbb")])
    keeper.put([encode(Event(time=time.time_ns(), kind="file.mounted", run="1ccccccccccc"))])
    for _ in range(3):
        export.turn(time.monotonic())
    assert not Hook.posts
    Hook.status = 200
    turn(export, keeper.seq)
    keeper.put([opened("/home/al/y", "1aaaaaaaaaaa")])
    turn(export, keeper.seq)
    export.close()
    keeper.close()

    assert export.arrived >= keeper.seq - 2
    (post,) = Hook.posts
    assert "secret-file-read" in post["text"]
    assert post["event"]["run"] == "1aaaaaaaaaaa"
    assert hook not in (tmp_path / "log").glob("*.jsonl").__next__().read_text()


def test_a_file_without_an_address_is_refused(tmp_path: Path) -> None:
    """What is no https address (or one of loopback) is no webhook: nothing is sent in the clear."""
    for text in ("", "http://example.com/hook", "ftp://x", "https://a b"):
        (tmp_path / "url").write_text(text)
        with pytest.raises(ValueError, match="no https address"):
            target_of(f"file:{tmp_path}/url", "cef", Trust("", ""))
