"""Events for the tests of the audit: one of every kind with everything that such an event can have."""

from __future__ import annotations

import msgspec

from cloister.audit.event import Endpoint, Event, File, Http, Model, Process
from cloister.audit.kept import Kept
from cloister.audit.kinds import kinds
from cloister.audit.rendering import Origin

ORIGIN = Origin(host="box.example.org", log="0f1e2d3c", version="1.2.3")
_NOW = 1_790_000_000_123_456_789


def full_process(pid=4321, **more):
    """Return a process with every field."""
    values = {
        "pid": pid, "uid": "0" * 31 + "a", "namespace_pid": 7, "name": "node", "path": "/usr/bin/node",
        "cmd_line": ("node", "it's me.js", "--x=1|2"), "cwd": "/home/alice/p", "user_id": 1000,
        "parent_uid": "0" * 31 + "b", "parent_pid": 1, "hash": "ab" * 32,
    }  # fmt: skip
    return Process(**{**values, **more})


def full(kind, **more):
    """Return an event of a kind with every part that fits it."""
    family = kind.split(".")[0]
    values = {
        "time": _NOW, "kind": kind, "run": "20260101-abcdef", "agent": "claude", "user": "alice", "account": "cl-alice",
        "policy": "sha256:1", "plan": "sha256:2", "message": f"{kind} happened", "source": "broker",
        "reporter_uid": 1000, "id": "0a1b2c3d4e5f-7", "process": full_process(), "count": 2, "duration_ns": 5_000_000,
    }  # fmt: skip
    if family in ("egress", "network", "credential", "signing", "identity", "model", "detection"):
        values |= {"endpoint": Endpoint(hostname="api.example.org", ip="2001:db8::1", port=443, protocol="tls")}
        values |= {"disposition": "blocked", "rule": "egress.allow[0]", "reason": "host-not-allowed", "error": 111}
        values |= {"bytes_up": 10, "bytes_down": 20}
    if family in ("egress", "model"):
        values |= {"http": Http(method="GET", path="/v1/x", status=403)}
    if family == "model":
        values |= {"model": Model(provider="anthropic", name="claude-x", tokens=5, cost_usd=0.25, request_id="r1")}
    if family in ("credential", "signing", "identity"):
        values |= {"credential": "github"}
    if family == "file":
        values |= {
            "file": File(path="/home/alice/p/a=b|c", resolved=True, target="/home/alice/p/d", flags=0o102),
            "tier": "lsm",
        }
    if kind == "process.traced":
        values |= {"target": full_process(99, name="bash")}
    if family in ("kernel", "log", "step"):
        values |= {"details": {"syscall": "bpf", "n": 3, "ok": True, "share": 0.5}}
    return Event(**{**values, **more})


def recorded(event, seq=7):
    """Return an event as a record, by way of the line that a keeper writes."""
    body = msgspec.json.encode(event)
    line = b'{"seq":%d,%s,"hash":"%s"}' % (seq, body[1:-1], b"c" * 64)
    return msgspec.json.decode(line, type=Kept)


def samples():
    """Yield one full and one bare record of every kind."""
    for name in kinds():
        yield recorded(full(name))
        yield recorded(Event(time=_NOW, kind=name))
