"""A Bot API as Telegram's, with TLS on loopback: enough of it for a real bot's library. For tests only.

`python -m support.fake_bot_api FOLDER TOKEN HOST` prints its port, keeps each call as a line of FOLDER/calls, and hands
out as a message, once, each line that is appended to FOLDER/inbox. Whoever has another token is told so.
Source: core.telegram.org/bots/api (2026).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from support.secure_server import Answer, SecureServer, Sent, TestAuthority

OWNER = 123456789
"""Who writes to the bot."""
BOT = {"id": 4455, "is_bot": True, "first_name": "Fake", "username": "fake_of_tests_bot", "can_join_groups": True}
POLL_S = 2.0
_PACE_S = 0.1


class BotApi:
    """What it knows: the token, the calls so far, the messages to hand out."""

    def __init__(self, folder: Path, token: str) -> None:
        """Begin with nothing."""
        self._folder, self._token = folder, token
        self._lock = threading.Lock()
        (folder / "inbox").touch()
        (folder / "calls").touch()
        self._sent = 100

    def answer(self, sent: Sent) -> Answer:
        """Answer one request."""
        parts = sent.path.partition("?")[0].split("/")
        method = parts[2] if len(parts) > 2 else ""  # /bot<token>/<method>
        body = self._body(sent)
        good = parts[1] == f"bot{self._token}"
        with self._lock, (self._folder / "calls").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"method": method, "good": good, "body": body}) + "\n")
        if not good:
            return _said({"ok": False, "error_code": 401, "description": "Unauthorized"}, 401)
        return _said({"ok": True, "result": self._result(method, body)})

    def _result(self, method: str, body: dict[str, Any]) -> Any:
        if method == "getMe":
            return BOT
        if method == "getUpdates":
            return self._updates(int(body.get("offset") or 0), float(body.get("timeout") or 0))
        if method == "getWebhookInfo":
            return {"url": "", "has_custom_certificate": False, "pending_update_count": 0}
        if method in {"sendMessage", "editMessageText"}:
            with self._lock:
                self._sent += 1
            return _message(self._sent, str(body.get("text", "")), BOT)
        if method in {"getMyCommands", "getUserProfilePhotos"}:
            return []
        return True

    def _updates(self, offset: int, timeout_s: float) -> list[dict[str, Any]]:
        until = time.monotonic() + min(timeout_s, POLL_S)
        sender = {"id": OWNER, "is_bot": False, "first_name": "Ann", "username": "ann"}
        while True:
            lines = (self._folder / "inbox").read_text(encoding="utf-8").splitlines()
            new = [
                {"update_id": number, "message": _message(number, text, sender)}
                for number, text in enumerate(lines, start=1)
                if number >= offset
            ]
            if new or time.monotonic() > until:
                return new
            time.sleep(_PACE_S)

    @staticmethod
    def _body(sent: Sent) -> dict[str, Any]:
        kind = sent.headers.get("content-type", "")
        if "json" in kind:
            return dict(json.loads(sent.body or b"{}"))
        return dict(parse_qsl((sent.body or b"").decode("utf-8", "replace") or sent.path.partition("?")[2]))


def _message(number: int, text: str, sender: dict[str, Any]) -> dict[str, Any]:
    chat = {"id": OWNER, "type": "private", "first_name": "Ann", "username": "ann"}
    return {"message_id": number, "date": int(time.time()), "chat": chat, "from": sender, "text": text}


def _said(what: dict[str, Any], status: int = 200) -> Answer:
    return Answer(status, json.dumps(what).encode(), {"content-type": "application/json"})


if __name__ == "__main__":
    place, secret, host = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    api = BotApi(place, secret)
    with SecureServer(TestAuthority(place).context(host), api.answer) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        sys.stdin.read()
