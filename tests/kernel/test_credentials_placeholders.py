"""Placeholders through the whole program: what they open, where they are refused, and where they may be seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.bound import BEARER, HOST, SECRET, authorizations, credential, curl, events, keep, policy
from support.cloister import User
from support.secure_server import SecureServer, TestAuthority

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]

MISDIRECTED = {
    "other header": '-H "X-Other: $TOKEN"',
    "other parameter": "?q=$TOKEN",
    "basic": '-H "X-Other: $(printf "a:%s" "$TOKEN" | base64 -w0)"',
    "encoded": '-H "X-Other: $(printf %s "$TOKEN" | sed s/c/%63/g)"',
    "path": "/$TOKEN",
    "foreign body": '-d "text=$OTHER"',
    "foreign body, encoded": '-d "$(printf %s "$OTHER" | sed s/c/%63/g)"',
    "foreign body, beside its own": '-d "$TOKEN $OTHER"',
}


def test_a_placeholder_elsewhere_is_refused(user: User, workspace: Path, server: SecureServer) -> None:
    """At its own host, but in another field or the path, or in a body for another's host: nothing leaves."""
    other = credential(keep(user, "other", "b"), server.port, name="other", env="OTHER", host="other.example.org")
    user.write_policy(policy(server.port, credential(keep(user), server.port), other))
    script = ""
    for words in MISDIRECTED.values():
        where = f"https://{HOST}:{server.port}/" + (words if words[0] in "?/" else "")
        script += f'curl -sS -m 20 {"" if words[0] in "?/" else words} "{where}"; echo;'
    done = user.inside(script, cwd=workspace)

    assert done.stdout.count('"reason":"placeholder-misdirected"') == len(MISDIRECTED), done
    assert "cloister-" not in repr(server.sent)
    assert not any(sent.body or SECRET in repr(sent) for sent in server.sent)
    assert [event["reason"] for event in events(user)] == ["placeholder-misdirected"] * len(MISDIRECTED)
    user.close()


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_an_agent_that_printed_its_environment_goes_on(
    user: User, workspace: Path, server: SecureServer, version: str
) -> None:
    """Its own host gets the placeholder in a body as it is, never swapped; one event of the run says that it did."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    prompt = f"env > prompt; env | base64 -w0 >> prompt; {curl(server.port, BEARER, version, '--data-binary @prompt')}"
    done = user.inside(f"{prompt}; {prompt}; echo; cat prompt", cwd=workspace)

    assert done.stdout.startswith("hellohello\n"), done
    placeholder = re.findall("^TOKEN=(cloister-token-.*)$", done.stdout, re.MULTILINE)[0]
    assert authorizations(server) == [f"Bearer {SECRET}"] * 2
    assert all(f"TOKEN={placeholder}\n".encode() in sent.body for sent in server.sent)
    assert not any(SECRET.encode() in sent.body for sent in server.sent)
    (event,) = events(user, "placeholder-in-body")
    assert (event["name"], event["place"]) == ("token", f"{HOST}:{server.port}")
    assert placeholder not in repr(event)
    assert [event["reason"] for event in events(user) if event["verdict"] == "deny"] == []
    user.close()


def test_a_placeholder_to_another_host_is_refused(user: User, workspace: Path, authority: TestAuthority) -> None:
    """Towards a host bound to another credential, or over plain HTTP, it stops here; its own host gets the secret."""
    with SecureServer(authority.context(HOST)) as first, SecureServer(authority.context(HOST)) as second:
        both = (
            credential(keep(user), first.port),
            credential(keep(user, "other", "b"), second.port, name="other", env="OTHER"),
        )
        allow = f', "{HOST}:{second.port}", "plain.example.org:80"'
        user.write_policy(policy(first.port, *both, allow=allow))
        plain = f"curl -sS -m 20 {BEARER} http://plain.example.org/"
        done = user.inside(f"{curl(second.port, BEARER)}; {plain}; {curl(first.port, BEARER)}", cwd=workspace)

        assert done.stdout.count('"reason":"placeholder-misdirected"') == 2, done
        assert done.stdout.endswith("hello")
        assert not second.sent
        assert len(first.sent) == 1
    user.close()


def test_placeholders_are_the_runs_own(user: User, workspace: Path, server: SecureServer) -> None:
    """Another run's placeholder, alive or over, is worth nothing: the server gets it as it is."""
    user.write_policy(policy(server.port, credential(keep(user), server.port)))
    run = user.run("run", "--detach", "shell", "--", "sleep", "60", cwd=workspace).stdout.strip()
    token = user.run("exec", run, "--", "sh", "-c", "echo $TOKEN", cwd=workspace).stdout.strip()
    theirs = f'-H "Authorization: Bearer {token}"'
    user.inside(curl(server.port, theirs), cwd=workspace)
    user.run("stop", run, cwd=workspace)
    user.inside(curl(server.port, theirs), cwd=workspace)
    done = user.inside(f"{curl(server.port, BEARER)}; echo $TOKEN", cwd=workspace)

    assert authorizations(server) == [f"Bearer {token}", f"Bearer {token}", f"Bearer {SECRET}"]
    assert token not in done.stdout
    user.close()
