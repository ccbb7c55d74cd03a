"""The egress modes of `cloister run`: what is asked, learned, reloaded, and sent through an upstream proxy.

Names lead to an upstream proxy of the test's own that is every host at once, so public names
work without a network. The broker, the relay and the sandbox are the real ones.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloister.egress.events import EgressEvent
from cloister.egress.proposal import wanted
from support.cloister import BASE, User
from support.terminal import Terminal
from support.upstream import Upstream

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
TICK = """
import socket, sys
s = socket.create_connection(("127.0.0.1", 3128))
s.sendall(f"CONNECT {sys.argv[1]} HTTP/1.1\\r\\nHost: {sys.argv[1]}\\r\\n\\r\\n".encode())
print(s.recv(4096).split(b"\\r\\n")[0].decode(), flush=True)
s.sendall(b"TICK")
try:
    while s.recv(4096): pass
except OSError: pass
print("cut", flush=True)
"""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A proxy that answers for every host."""
    with Upstream() as proxy:
        yield proxy


def policy(proxy: str, mode: str = "deny", allow: str = "", more: str = "") -> str:
    """Return a policy whose traffic leaves through a proxy."""
    through = f'upstream_proxy = "{proxy}"\n' if proxy else ""
    return f'{BASE}[agents.shell.egress]\nmode = "{mode}"\n{through}allow = [{allow}]\n{more}'


def through(upstream: Upstream, mode: str = "deny", allow: str = "", more: str = "") -> str:
    """Return a policy whose traffic leaves through this proxy."""
    return policy(f"http://{upstream.address}", mode, allow, more)


def get(*urls: str) -> str:
    """Return a script that fetches addresses one after the other."""
    return "; ".join(f"curl -sS -m 20 --noproxy '' {url}" for url in urls)


def terminal(user: User, workspace: Path, script: str, *options: str) -> Terminal:
    """Run a script in the sandbox, on a terminal."""
    words = ("run", *options, "shell", "--", "/bin/sh", "-c", script)
    return Terminal(user.command(*words), cwd=workspace, env=user.environment)


def decisions(user: User) -> dict[str, str]:
    """Return the kept answers."""
    path = user.home / ".config/cloister/decisions.json"
    return {f"{one['host']}:{one['port']}": one["answer"] for one in json.loads(path.read_text())}


# --- upstream proxy ---------------------------------------------------------------------------


def test_everything_goes_through_the_upstream_proxy(user: User, workspace: Path, upstream: Upstream) -> None:
    """With `upstream_proxy` an allowed name is asked of that proxy and never resolved here; a denied one never is."""
    user.write_policy(through(upstream, allow='"allowed.example.org:80"'))
    done = user.inside(get("http://allowed.example.org/", "http://denied.example.org/"), cwd=workspace)

    assert "hello from allowed.example.org:80" in done.stdout
    assert "not-in-allowlist" in done.stdout
    assert upstream.asked == [("allowed.example.org:80", "")]
    assert "upstream proxy" in " ".join(user.receipts()[-1]["notices"])
    user.close()


def test_the_receipt_counts_what_left(user: User, workspace: Path, upstream: Upstream) -> None:
    """Bytes both ways and connections are those of the traffic; a denied request sends nothing on."""
    user.write_policy(through(upstream, allow='"allowed.example.org:80"'))
    user.inside(get("http://denied.example.org/" + "x" * 9000), cwd=workspace)
    denied = user.receipts()[-1]
    user.inside(get("http://allowed.example.org/" + "x" * 5000), cwd=workspace)
    allowed = user.receipts()[-1]

    assert (denied["bytes_up"], denied["denials"]) == (0, 1)
    assert 5000 < allowed["bytes_up"] < 7000
    assert allowed["denials"] == 0
    assert allowed["connections"] == 1
    assert 0 < allowed["bytes_down"] < 2000
    assert allowed["host"]["kernel"] == os.uname().release
    assert {"bubblewrap", "landlock_abi", "arch"} <= set(allowed["host"])
    user.close()


def test_without_an_upstream_proxy_nothing_asks_it(user: User, workspace: Path, upstream: Upstream) -> None:
    """The twin: the same name without the key is resolved here, which fails, and the proxy hears nothing of it."""
    user.write_policy(policy("", allow='"allowed.invalid:80"'))
    done = user.inside(get("http://allowed.invalid/"), cwd=workspace)

    assert "dns-failed" in done.stdout
    assert not upstream.asked
    user.close()


def test_the_environments_proxy_with_its_credentials(user: User, workspace: Path) -> None:
    """`env` takes the broker's https_proxy, password included, which stands in no record and is not seen inside."""
    wanted_header = "Basic " + base64.b64encode(b"me:p@ss-word").decode()
    with Upstream(wanted_header) as proxy:
        user.environment |= {"https_proxy": f"http://me:p%40ss-word@{proxy.address}", "no_proxy": "direct.invalid"}
        user.write_policy(policy("env", allow='"allowed.example.org:80", "direct.invalid:80"'))
        done = user.inside(get("http://allowed.example.org/", "http://direct.invalid/") + "; env", cwd=workspace)

        assert "hello from allowed.example.org:80" in done.stdout
        assert "dns-failed" in done.stdout
        assert proxy.asked == [("allowed.example.org:80", wanted_header)]
    assert "ss-word" not in done.stdout + done.stderr
    assert not [path for path in user.state.rglob("*") if path.is_file() and b"ss-word" in path.read_bytes()]
    user.close()


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "https://127.0.0.1:9", "http://me:secret@[::1:9"])
def test_a_proxy_of_another_kind_is_refused(user: User, workspace: Path, value: str) -> None:
    """A proxy that cannot be used is never gone round, and the message does not show its password."""
    user.environment["https_proxy"] = value
    user.write_policy(policy("env", allow='"allowed.example.org:80"'))
    done = user.inside("true", cwd=workspace)

    assert done.returncode == 125
    assert "[upstream-proxy]" in done.stderr
    assert "secret" not in done.stderr
    assert not user.records()
    user.close()


def test_credentials_of_a_proxy_do_not_stand_in_a_policy(user: User, workspace: Path) -> None:
    """A user and password in `upstream_proxy` are a mistake in the policy."""
    user.write_policy(policy("http://me:secret@127.0.0.1:9"))
    done = user.inside("true", cwd=workspace)

    assert done.returncode == 125
    assert "upstream_proxy" in done.stderr
    user.close()


def test_private_addresses_stay_refused_behind_an_upstream_proxy(
    user: User, workspace: Path, upstream: Upstream
) -> None:
    """An upstream proxy is no way into the local network: addresses and local names never get to it."""
    user.write_policy(through(upstream, mode="learn"))
    urls = ("http://10.0.0.1/", "http://169.254.169.254/", "http://printer.local/", "http://nas/", "http://[::1]/")
    done = user.inside(get(*urls), cwd=workspace)

    assert done.stdout.count("address-refused") == 3
    assert done.stdout.count("local-name") == 2
    assert not upstream.asked
    user.close()


# --- learn ------------------------------------------------------------------------------------


def test_what_learn_recorded_makes_the_same_run_pass(user: User, workspace: Path, upstream: Upstream) -> None:
    """In `learn` public hosts are allowed and recorded; with the lines proposed from that, `deny` allows the same."""
    script = get("http://one.example.org/", "http://two.example.org:8080/x", "http://10.1.2.3/", "http://nas/")
    user.write_policy(through(upstream, mode="learn"))
    first = user.inside(script, cwd=workspace)
    lines = (user.state / "runs" / user.receipts()[-1]["id"] / "events.jsonl").read_bytes().splitlines()
    found = [json.loads(line) for line in lines]
    events = [
        msgspec.convert({name: value for name, value in one.items() if name != "event"}, EgressEvent)
        for one in found
        if one["event"] == "egress"
    ]
    proposed = wanted(events)
    user.write_policy(through(upstream))
    before = user.inside(script, cwd=workspace)
    user.write_policy(through(upstream, allow=", ".join(proposed)))
    after = user.inside(script, cwd=workspace)

    assert proposed == ('"one.example.org:80"', '"two.example.org:8080"')
    assert "hello from" not in before.stdout
    assert first.stdout.count("hello from") == after.stdout.count("hello from") == 2
    assert "address-refused" in first.stdout
    assert "local-name" in first.stdout  # and not proposed: an agent must not talk its way into the local network
    assert "10.1.2.3" in before.stdout
    assert "not-in-allowlist" in after.stdout
    user.close()


# --- ask --------------------------------------------------------------------------------------


def test_once_and_this_run_and_this_time(user: User, workspace: Path, upstream: Upstream) -> None:
    """`o` lets one request through and the next one asks again; `r` lasts for the run; Enter refuses this one."""
    user.write_policy(through(upstream, mode="ask"))
    url = "http://new.example.org/"
    with terminal(user, workspace, f"{get(url, url, url, url)}; echo done") as screen:
        screen.answer("this time? ", "\r")
        screen.until("denied-this-time")
        screen.answer("this time? ", "o")
        screen.until("hello from new.example.org:80")
        screen.answer("this time? ", "r")
        screen.until("hello from new.example.org:80")
        rest = screen.until("done\r\n")
        assert "hello from" in rest
        assert "wants to reach" not in rest
        assert screen.wait() == 0
        assert screen.restored
    with terminal(user, workspace, get(url)) as screen:  # nothing was kept
        assert "shell wants to reach new.example.org:80" in screen.answer("this time? ", "d")
        assert screen.wait() == 0
    assert not (user.home / ".config/cloister/decisions.json").exists()
    user.close()


def test_always_and_never_are_kept_and_edits_of_them_count(user: User, workspace: Path, upstream: Upstream) -> None:
    """The next run of the agent does not ask; after an edit of decisions.json and a reload the reverse holds."""
    user.write_policy(through(upstream, mode="ask"))
    good, bad = "http://good.example.org/", "http://bad.example.org/"
    with terminal(user, workspace, get(good, bad)) as screen:
        screen.answer("this time? ", "a")
        screen.answer("this time? ", "n")
        screen.until("denied-by-user")
        assert screen.wait() == 0
    assert decisions(user) == {"good.example.org:80": "always", "bad.example.org:80": "never"}
    (user.home / ".config/cloister/decisions.json").chmod(0o600)
    with terminal(user, workspace, f"{get(good, bad)}; read x; {get(good, bad)}; echo done") as screen:
        first = screen.until("denied-by-user")
        screen.until("}")
        path = user.home / ".config/cloister/decisions.json"
        swapped = {"always": "never", "never": "always"}
        kept = [{**one, "answer": swapped[one["answer"]]} for one in json.loads(path.read_text())]
        path.write_text(json.dumps(kept))
        assert user.run("policy", "reload", cwd=workspace).returncode == 0
        screen.type("\r")
        second = screen.until("done\r\n")
        assert screen.wait() == 0
    assert "hello from good" in first
    assert "denied-by-user" in second
    assert "hello from bad" in second
    assert "wants to reach" not in first + second
    user.close()


def test_an_answer_never_lifts_a_deny_rule_or_the_address_guard(
    user: User, workspace: Path, upstream: Upstream
) -> None:
    """What a deny rule names, and refused addresses, are refused without a question, also with a kept `always`."""
    hosts = [("evil.example.org", 80), ("10.0.0.1", 80), ("169.254.169.254", 80), ("localhost", 80)]
    kept = [{"agent": "shell", "host": host, "port": port, "answer": "always"} for host, port in hosts]
    user.write_policy(policy("", mode="ask", more='deny = ["evil.example.org"]\n'))
    (user.home / ".config/cloister/decisions.json").write_text(json.dumps(kept))
    with terminal(user, workspace, f"{get(*(f'http://{host}/' for host, _ in hosts))}; echo done") as screen:
        seen = screen.until("done\r\n")
        assert screen.wait() == 0
    assert "wants to reach" not in seen
    assert "denied-by-rule" in seen
    assert seen.count("address-refused") == 3
    user.close()


def test_without_a_terminal_the_answer_is_no_at_once(user: User, workspace: Path, upstream: Upstream) -> None:
    """A run with pipes is refused immediately, the reason says that there is no terminal, and a kept answer counts."""
    user.write_policy(through(upstream, mode="ask"))
    kept = [{"agent": "shell", "host": "good.example.org", "port": 80, "answer": "always"}]
    (user.home / ".config/cloister/decisions.json").write_text(json.dumps(kept))
    begun = time.monotonic()
    done = user.inside(get("http://new.example.org/", "http://good.example.org/"), cwd=workspace)

    assert time.monotonic() - begun < 15
    assert '"no-terminal"' in done.stdout
    assert "no terminal" in done.stdout
    assert "hello from good" in done.stdout
    assert upstream.places == ["good.example.org:80"]
    user.close()


def test_two_requests_for_one_host_are_one_question(user: User, workspace: Path, upstream: Upstream) -> None:
    """Requests that wait for the same host wait for the same answer; another host is asked about afterwards."""
    user.write_policy(through(upstream, mode="ask"))
    script = (
        f"{get('http://new.example.org/a')} & {get('http://new.example.org/b')} & "
        f"sleep 0.5; {get('http://other.example.org/')} & wait; echo done"
    )
    with terminal(user, workspace, script) as screen:
        screen.until("shell wants to reach new.example.org:80")
        time.sleep(1.2)
        screen.type("o")
        seen = screen.until("shell wants to reach other.example.org:80")
        screen.answer("this time? ", "o")
        seen += screen.until("done\r\n")
        assert screen.wait() == 0
    assert seen.count("hello from new.example.org:80") == 2
    assert "hello from other" in seen
    assert "new.example.org:80\r\n  [o]nce" not in seen
    user.close()


def test_a_question_over_a_full_screen_program_redraws_it(user: User, workspace: Path, upstream: Upstream) -> None:
    """The question stands on the screen alone; afterwards the program draws itself again, and keys are its own."""
    user.write_policy(through(upstream, mode="ask"))
    script = f"(sleep 1; {get('http://new.example.org/')} > got) & exec vi -u NONE README"
    with terminal(user, workspace, script) as screen:
        screen.until("a project")
        screen.answer("this time? ", "o")
        screen.until("a project")
        time.sleep(0.5)
        screen.type(":q!\r")
        assert screen.wait() == 0
        assert screen.restored
    assert (workspace / "got").read_text() == "hello from new.example.org:80\n"
    user.close()


# --- reload -----------------------------------------------------------------------------------


def test_reload_reaches_a_running_sandbox(user: User, workspace: Path, upstream: Upstream) -> None:
    """A long tunnel to what is no longer allowed is cut, a new host is reachable without a restart."""
    user.write_policy(through(upstream, allow='"old.example.org:80"'))
    script = f"python3 -c '{TICK}' old.example.org:80; {get('http://new.example.org/', 'http://old.example.org/')}"
    with terminal(user, workspace, script) as screen:
        screen.until("200")
        assert screen.silent(0.5, "cut")
        user.write_policy(through(upstream, allow='"new.example.org:80"'))
        done = user.run("policy", "reload", cwd=workspace)
        assert done.returncode == 0, done.stderr
        screen.until("cut\r\n")
        screen.until("hello from new.example.org:80")
        screen.until("not-in-allowlist")
        assert screen.wait() == 0
    user.close()


def test_a_reload_keeps_what_is_still_allowed(user: User, workspace: Path, upstream: Upstream) -> None:
    """The twin: a tunnel that the new policy allows as well is not touched."""
    user.write_policy(through(upstream, allow='"old.example.org:80"'))
    with terminal(user, workspace, f"python3 -c '{TICK}' old.example.org:80") as screen:
        screen.until("200")
        user.write_policy(through(upstream, allow='"*.example.org:80"'))
        assert user.run("policy", "reload", cwd=workspace).returncode == 0
        assert screen.silent(1.0, "cut")
    user.close()


def test_a_broken_policy_changes_nothing_and_says_why(user: User, workspace: Path, upstream: Upstream) -> None:
    """A mistake is shown with its line, the old rules stay in force, and nothing is cut."""
    user.write_policy(through(upstream, allow='"old.example.org:80"'))
    script = f"read x; {get('http://old.example.org/', 'http://new.example.org/')}"
    with terminal(user, workspace, script) as screen:
        user.wait_running()
        user.write_policy(through(upstream, allow='"new.example.org:80"').replace("mode", "moed"))
        done = user.run("policy", "reload", cwd=workspace)
        assert done.returncode == 78, done.stderr
        assert "moed" in done.stderr
        screen.type("\r")
        screen.until("hello from old.example.org:80")
        screen.until("not-in-allowlist")
        assert screen.wait() == 0
    user.close()


def test_a_reload_knows_profile_and_project(user: User, workspace: Path, upstream: Upstream) -> None:
    """The run's profile is laid over at a reload too, and a project file that tightened meanwhile counts."""
    text = through(upstream, allow='"base.example.org:80"')
    text += '[profiles.wide.egress]\nallow = ["base.example.org:80", "{}.example.org:80"]\n'
    user.write_policy(text.format("wide"))
    urls = get("http://base.example.org/", "http://wide.example.org/", "http://wider.example.org/")
    script = f"read x; {urls}; echo first; read x; {urls}; echo second"
    with terminal(user, workspace, script, "--profile", "wide") as screen:
        user.wait_running()
        user.write_policy(text.format("wider"))
        assert user.run("policy", "reload", cwd=workspace).returncode == 0
        screen.type("\r")
        first = screen.until("first\r\n")
        (workspace / ".cloister.toml").write_text('schema = 1\n[every_agent.egress]\ndeny = ["base.example.org"]\n')
        done = user.run("policy", "reload", cwd=workspace)
        assert done.returncode == 0, done.stdout + done.stderr
        screen.type("\r")
        second = screen.until("second\r\n")
        assert screen.wait() == 0
    assert "hello from base" in first
    assert "hello from wider" in first
    assert "hello from wide." not in first
    assert "hello from base" not in second
    assert "denied-by-rule" in second
    assert "hello from wider" in second
    user.close()
