"""ssh and git with keys that stay in the person's own ssh-agent: a real sshd, a real agent, the real sandbox."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.cloister import BASE, User
from support.ssh_server import SshAgent, SshServer, fingerprint, make_key, missing, named, public

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]


class World(NamedTuple):
    """A person with two keys in the agent, a server that is allowed and one that is not."""

    user: User
    workspace: Path
    key: Path
    other_key: Path
    server: SshServer
    stranger: SshServer
    agent: SshAgent
    repository: Path

    def inside(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script in the sandbox, as a caller who has the agent."""
        return self.user.run(
            "run", "shell", "--", "/bin/sh", "-c", script, cwd=self.workspace, SSH_AUTH_SOCK=str(self.agent.socket)
        )

    def events(self) -> list[dict[str, object]]:
        """Return the newest run's events about signatures."""
        newest = max(self.user.state.glob("runs/*/events.jsonl"))
        events = [json.loads(line) for line in newest.read_text().splitlines()]
        return [event for event in events if event["event"] == "signing"]

    def policy(self, uses: str = '["ssh", "git"]', more: str = "") -> None:
        """Allow the key, by fingerprint, at the server; both servers are in reach."""
        self.user.write_policy(
            BASE
            + f'[agents.shell.egress]\nallow = ["{self.server.place}", "{self.stranger.place}"]\n'
            + f'[agents.shell.credentials.forge]\nkeys = ["{fingerprint(self.key)}"]\n'
            + f'hosts = ["{self.server.place}"]\nuses = {uses}\n'
            + more
        )


@pytest.fixture
def world(user: User, home: Path, workspace: Path, tmp_path: Path) -> Iterator[World]:
    """Start both servers and the agent; the person knows both host keys."""
    if why := missing():
        pytest.skip(why)
    key, other = make_key(home / ".ssh/work"), make_key(tmp_path / "other/key")
    for stray in (home / ".ssh").glob("id_*"):
        stray.unlink()
    repository = tmp_path / "forge.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(repository)], check=True)
    authorized = [public(key), public(other)]
    with (
        SshServer(tmp_path / "server", authorized) as server,
        SshServer(tmp_path / "stranger", authorized) as stranger,
        SshAgent(user.runtime, [key, other]) as agent,
    ):
        (home / ".ssh/known_hosts").write_text(server.known + stranger.known)
        (home / ".ssh/known_hosts").chmod(0o600)
        made = World(user, workspace, key, other, server, stranger, agent, repository)
        made.policy()
        yield made
        user.close()


def test_ssh_logs_in_to_an_allowed_host_with_a_key_that_is_not_inside(world: World) -> None:
    """Logging in works without any set-up inside; the private key is in no file, variable or process there."""
    body = world.key.read_text().splitlines()[3][:48]
    private = f"[{body[0]}]{body[1:]}"  # a pattern that does not match itself
    script = (
        f"ssh -p {world.server.port} host.cloister.internal echo let in; ssh-add -l; "
        f"grep -rl '{private}' / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr 2>/dev/null; "
        f"cat /proc/*/environ /proc/*/cmdline 2>/dev/null | grep -ac '{private}'"
    )
    done = world.inside(script)

    said, listed, *found = done.stdout.splitlines() or ["", ""]
    assert (said, found) == ("let in", ["0"]), (done.stdout, done.stderr, world.server.log)
    assert fingerprint(world.key) in listed
    assert fingerprint(world.other_key) not in done.stdout
    assert [(event["verdict"], event["use"], event["host"]) for event in world.events()] == [
        ("allow", "ssh", world.server.place)
    ]
    (signed,) = world.user.audited("signing.used")
    assert (signed["disposition"], signed["credential"], signed["details"]["use"]) == ("allowed", "forge", "ssh")
    assert body not in json.dumps(signed)


@pytest.mark.parametrize("kind", ["ecdsa", "rsa", "certificate"])
def test_every_kind_of_host_key_is_checked(world: World, home: Path, tmp_path: Path, kind: str) -> None:
    """OpenSSH's own signatures over its sessions are understood, for all kinds of host keys."""
    with SshServer(tmp_path / kind, [public(world.key)], kind) as server:
        (home / ".ssh/known_hosts").write_text(server.known)
        world._replace(server=server).policy()
        done = world.inside(f"ssh -p {server.port} host.cloister.internal echo let in")

        assert done.stdout == "let in\n", done.stderr + server.log


def test_a_host_that_the_key_is_not_for_gets_no_signature(world: World) -> None:
    """The same person, key and server software: in reach by egress, not among the key's hosts, so not logged in to."""
    port = world.stranger.port
    options = f"-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -p {port}"
    done = world.inside(f"ssh {options} host.cloister.internal echo let in; ssh -p {port} host.cloister.internal true")
    explained = world.user.run("why", "last", cwd=world.workspace)

    assert "let in" not in done.stdout
    assert "Permission denied" in done.stderr
    assert "Host key verification failed" in done.stderr
    assert "Accepted" not in world.stranger.log
    assert [event["reason"] for event in world.events()] == ["host-not-allowed"]
    assert "host-not-allowed" in explained.stdout
    assert "add the host to hosts" in explained.stdout


def test_git_clones_and_pushes_over_ssh(world: World) -> None:
    """Git needs no set-up either; what was pushed is on the server."""
    url = f"ssh://host.cloister.internal:{world.server.port}{world.repository}"
    done = world.inside(
        f"git push -q {url} HEAD:refs/heads/main && git clone -q {url} /tmp/again && git -C /tmp/again log --oneline"
    )
    words = ["git", "log", "--format=%s", "main"]
    log = subprocess.run(words, cwd=world.repository, capture_output=True, text=True, check=True)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert len(log.stdout.splitlines()) == 1


def test_egress_decides_before_ssh_does(world: World) -> None:
    """A key's host is not in reach by being named there: ssh shows the proxy's refusal with what would allow it."""
    world.user.write_policy(
        BASE + f'[agents.shell.credentials.forge]\nkeys = ["~/.ssh/work.pub"]\nhosts = ["{world.server.place}"]\n'
    )
    done = world.inside(f"ssh -p {world.server.port} host.cloister.internal true")
    checked = world.user.run("check", cwd=world.workspace)

    assert done.returncode == 255
    assert f'try: add "{world.server.place}" to allow in [agents.shell.egress]' in done.stderr
    assert f"may log in to {world.server.place}, which" in checked.stdout


@pytest.mark.parametrize(
    "person", ["", "[gpg]\n\tformat = ssh\n[user]\n\tsigningkey = ~/.ssh/work\n[commit]\n\tgpgsign = true\n"]
)
def test_commits_are_signed_by_ssh(world: World, home: Path, person: str, tmp_path: Path) -> None:
    """`git commit -S` inside makes a signature that git outside verifies; a person who always signs does so inside."""
    with (home / ".gitconfig").open("a") as config:
        config.write("[user]\n\tname = Some One\n\temail = one@example.org\n" + person)
    flag = "" if person else "-S"
    done = world.inside(f"echo x > x; git add x; git commit -q {flag} -m signed && git tag -s -m signed v1")
    signers = tmp_path / "signers"
    signers.write_text(f"one@example.org {public(world.key)}\n")
    git = f"git -c gpg.ssh.allowedSignersFile={signers}"
    words = named(["/bin/sh", "-c", f"{git} verify-commit HEAD && {git} verify-tag v1"], tmp_path)
    verified = subprocess.run(
        words, cwd=world.workspace, capture_output=True, text=True, env={**os.environ, "HOME": str(home)}, check=False
    )

    assert done.returncode == 0, done.stderr
    assert (verified.stderr + verified.stdout).count('Good "git" signature for one@example.org') == 2
    assert [(event["use"], event["namespace"]) for event in world.events()] == [("git", "git")] * 2


def test_what_is_neither_login_nor_commit_is_not_signed(world: World) -> None:
    """Other namespaces, other keys and changes of the agent are refused; the person's agent keeps what it had."""
    Path(world.workspace / "other.pub").write_text(public(world.other_key) + "\n")
    Path(world.workspace / "work.pub").write_text(public(world.key) + "\n")
    done = world.inside(
        "echo x > file; ssh-keygen -Y sign -n file -f work.pub file; ssh-keygen -Y sign -n git -f other.pub file; "
        "ssh-keygen -q -t ed25519 -N '' -f /tmp/new; ssh-add /tmp/new; ssh-add -D; ssh-add -x </dev/null; ls file.sig"
    )
    left = world.agent.run("ssh-add", "-l")

    assert "file.sig" not in done.stdout
    assert len(left.splitlines()) == 2
    assert {"namespace-refused", "request-refused"} <= {event["reason"] for event in world.events()}


def test_a_start_without_an_agent_or_a_host_key_says_what_to_do(world: World, home: Path) -> None:
    """A run whose keys cannot be had is not started."""
    no_agent = world.user.run("run", "shell", "--", "true", cwd=world.workspace)
    (home / ".ssh/known_hosts").write_text(world.stranger.known)
    no_host = world.inside("true")

    assert (no_agent.returncode, no_host.returncode) == (125, 125)
    assert "ssh-agent-missing" in no_agent.stderr
    assert "host-key-unknown" in no_host.stderr


def test_a_reload_takes_keys_away_from_a_living_run(world: World) -> None:
    """What the policy no longer says fails at once, on a connection that was made before too; said again it works."""
    started = world.user.run(
        "run", "--detach", "shell", "--", "sleep", "60", cwd=world.workspace, SSH_AUTH_SOCK=str(world.agent.socket)
    )
    run = started.stdout.strip()
    login = f"ssh -p {world.server.port} host.cloister.internal echo let in"
    outputs = []
    for credentials in (True, False, True):
        if credentials:
            world.policy()
        else:
            world.user.write_policy(BASE + f'[agents.shell.egress]\nallow = ["{world.server.place}"]\n')
        world.user.run("policy", "reload", cwd=world.workspace)
        outputs.append(world.user.run("exec", run, "--", "/bin/sh", "-c", login, cwd=world.workspace).stdout)
    world.user.run("stop", run, cwd=world.workspace)

    assert outputs == ["let in\n", "", "let in\n"], started.stderr
    assert next(text for text in world.user.receipts()[-1]["credentials"] if "ssh to" in text).endswith("2 signatures")


def test_the_plan_says_what_keys_may_do(world: World) -> None:
    """A dry run needs no agent; `plan` and `explain` show sockets and files; no path of the caller's agent is kept."""
    plan = world.user.run("plan", "shell", cwd=world.workspace)
    explained = world.user.run("explain", "shell", "~/.ssh/config", cwd=world.workspace)
    world.inside("true")

    assert f"forge: {fingerprint(world.key)} logs in to {world.server.place}, signs commits" in plan.stdout, plan.stderr
    assert "not readable" not in explained.stdout
    assert explained.returncode == 0, explained.stdout + explained.stderr
    for path in world.user.state.rglob("*.json*"):
        assert str(world.agent.socket) not in path.read_text(), path
        assert "made-up" not in path.read_text(), path


def test_the_battery_attacks_the_socket_of_the_agent(world: World) -> None:
    """`cloister prove` finds the filter in place for this very agent, and no fault in it."""
    words = ("prove", "shell", "--case", "ipc-key-agent", "--json")
    done = world.user.run(*words, cwd=world.workspace, SSH_AUTH_SOCK=str(world.agent.socket))

    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads(done.stdout)["cases"][0]
    assert "sign a file" in json.dumps(shown), shown
