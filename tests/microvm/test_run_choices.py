"""What a policy chooses for a guest, end to end: where changes go, what is refused, ports, limits, what is kept."""

import json
import socket
from pathlib import Path

import pytest

from support.guest_user import BOOT_S, GuestUser, Installs

MICROVM = "[agents.shell.microvm]\n"


def test_what_changed_on_both_sides_is_kept_for_review(image: Installs, home: Path, workspace: Path) -> None:
    """In mode `direct` nothing is written over what somebody changed meanwhile: the work waits, and is told."""
    user = GuestUser(home, image)
    run = user.begin("echo guest > README; echo new > new; exec sleep 600", cwd=workspace)
    (workspace / "README").write_text("host\n")
    user.exec(run, "while [ ! -e new ]; do sleep 0.1; done", cwd=workspace)
    user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    shown = user.run("diff", run, cwd=workspace, timeout_s=BOOT_S)
    receipt = user.run("receipt", run, cwd=workspace)
    user.close()

    assert (workspace / "README").read_text() == "host\n"
    assert not (workspace / "new").exists()
    assert "README changed on the host meanwhile" in receipt.stdout
    assert "new" in shown.stdout


@pytest.mark.slow
def test_overlay_keeps_everything_aside(image: Installs, home: Path, workspace: Path) -> None:
    """In mode `overlay` nothing is written until `apply`; `discard` forgets it. The same words as for any run."""
    user = GuestUser(home, image, '[agents.shell.workspace]\nmode = "overlay"\n')
    done = user.inside(
        "echo guest > README; git status --short; rm -f gone; mkdir -p a/b; echo deep > a/b/c", cwd=workspace
    )
    untouched = (workspace / "README").read_text()
    run = user.records()[-1]["id"]
    applied = user.run("apply", run, "a/b/c", cwd=workspace, timeout_s=BOOT_S)
    discarded = user.run("discard", run, cwd=workspace, timeout_s=BOOT_S)
    user.close()

    assert (done.returncode, untouched) == (0, "a project\n")
    assert "M README" in done.stdout
    assert (applied.returncode, discarded.returncode) == (0, 0), applied.stderr + discarded.stderr
    assert (workspace / "a/b/c").read_text() == "deep\n"
    assert (workspace / "README").read_text() == "a project\n"


def test_protected_names_cannot_be_written(image: Installs, home: Path, workspace: Path) -> None:
    """Hooks, and names that tools load by themselves, are read-only in the guest; the work tree and commits are not."""
    user = GuestUser(home, image)
    done = user.inside(
        "echo x > .git/hooks/pre-commit; echo x > .envrc; mkdir .vscode/x; rm -rf .git/config;"
        "echo change >> README; git commit -qam guest && git log --oneline | head -1",
        cwd=workspace,
    )
    user.close()

    assert done.stderr.count("Read-only file system") + done.stderr.count("Permission denied") >= 3, done.stderr
    assert "guest" in done.stdout
    assert not (workspace / ".git/hooks/pre-commit").exists()
    assert not (workspace / ".envrc").exists()
    assert "change" in (workspace / "README").read_text()


REFUSED = {
    "image-missing": 'image = "nowhere"\n',
    "microvm-memory": 'memory = "16M"\n',
    "microvm-ports": "ports = [1000, 1000]\n",
}


@pytest.mark.parametrize(("reference", "table"), REFUSED.items())
def test_what_cannot_be_kept_is_refused(
    image: Installs, home: Path, workspace: Path, reference: str, table: str
) -> None:
    """Nothing starts that would be less than what was asked for, and the message names the key or what to type."""
    user = GuestUser(home, image)
    text = (home / ".config/cloister/cloister.toml").read_text()
    key = table.partition(" ")[0]
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} =")]
    user.write_policy("\n".join(lines).replace(MICROVM.strip(), MICROVM + table))
    done = user.inside("true", cwd=workspace)
    user.close()

    assert done.returncode != 0
    assert reference in done.stderr
    assert not user.records()


def test_an_image_of_a_stranger_does_not_boot(image: Installs, home: Path, workspace: Path) -> None:
    """Without a trusted signature there is no run; with the key in the trust store the same image runs."""
    user = GuestUser(home, image)
    trusted = home / ".config/cloister/trust.d"
    keys = {path: path.read_bytes() for path in trusted.iterdir()}
    for path in keys:
        path.unlink()
    refused = user.inside("true", cwd=workspace)
    for path, data in keys.items():
        path.write_bytes(data)
        path.chmod(0o600)
    started = user.inside("true", cwd=workspace)
    user.close()

    assert "image-key-unknown" in refused.stderr
    assert (refused.returncode != 0, started.returncode) == (True, 0), started.stderr


@pytest.mark.slow
def test_a_published_port_leads_into_the_guest(image: Installs, home: Path, workspace: Path) -> None:
    """A server on the guest's 127.0.0.1 answers on the same port of ours; another port of the guest does not."""
    port, other = _free(), _free()
    user = GuestUser(home, image, f"{MICROVM}ports = [{port}]\n")
    serve = f"python3 -m http.server --bind 127.0.0.1 {port} & python3 -m http.server --bind 127.0.0.1 {other}"
    run = user.begin(f"echo from the guest > page; {serve}", cwd=workspace)
    user.exec(run, f"until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {port}))'; do :; done",
              cwd=workspace)  # fmt: skip
    answers = [_get(port, "/page") for _ in range(3)]
    refused = _get(other, "/page")
    user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    after = _get(port, "/page")
    user.close()

    assert all(b"from the guest" in answer for answer in answers), answers
    assert (refused, after) == (b"", b"")


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(port: int, path: str) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            data = b""
            while more := connection.recv(65536):
                data += more
            return data
    except OSError:
        return b""


@pytest.mark.slow
def test_limits_hold_in_the_guest(image: Installs, home: Path, workspace: Path) -> None:
    """Memory ends with the guest's, processes with `tasks_max`, open files with theirs, time with exit code 124."""
    limits = '[agents.shell.limits]\ntasks_max = 30\nopen_files = 64\nruntime_max = "9s"\n'
    user = GuestUser(home, image, limits)
    done = user.inside(
        "ulimit -n; ulimit -c; grep MemTotal /proc/meminfo;"
        "(i=0; while [ $i -lt 60 ]; do sleep 99 & i=$((i+1)); done); exec sleep 60",
        cwd=workspace,
    )
    user.close()
    words = done.stdout.split()

    assert words[:2] == ["64", "0"]
    assert 100_000 < int(words[3]) < 256 << 10
    assert "fork" in done.stderr
    assert (done.returncode, user.receipts()[-1]["reason"]) == (124, "timed-out")


@pytest.mark.slow
def test_state_is_kept_and_nothing_else_is(image: Installs, home: Path, workspace: Path) -> None:
    """A product's own directory outlives the run, on the agent's disk; the rest of the home and /tmp do not."""
    (home / ".tool").mkdir()
    (home / ".tool/config").write_text("carried")
    presets = home / ".config/cloister/presets"
    presets.mkdir(parents=True)
    (presets / "tool.toml").write_text(
        'schema = 1\ndescription = "x"\ncommand = ["/bin/sh"]\nstate = [".tool"]\ncarry = [".tool/config"]\n'
        'secrets = [".tool/key"]\n[seed]\n".tool/seed" = "seeded"\n'
    )
    (home / ".tool/key").write_text("canary-key")
    user = GuestUser(home, image)
    user.write_policy(
        (home / ".config/cloister/cloister.toml").read_text().replace('preset = "shell"', 'preset = "tool"')
    )
    first = user.inside(
        "cd ~/.tool; cat config seed key; echo theirs > config; echo mine > seed; echo kept > kept; echo x > ~/loose; "
        "echo x > /tmp/loose", cwd=workspace,
    )  # fmt: skip
    second = user.inside("cd ~/.tool; cat config seed kept; ls ~ /tmp", cwd=workspace)
    user.close()

    assert first.stdout == "carriedseeded"
    assert second.stdout.startswith("carriedmine\nkept\n")
    assert "loose" not in second.stdout
    assert "canary-key" not in first.stdout + second.stdout
    assert (home / ".tool/config").read_text() == "carried"


def test_json_and_dry_run_speak_of_the_machine(image: Installs, home: Path, workspace: Path) -> None:
    """`plan --json`, `explain` and `check` know a guest: nothing boots for them."""
    user = GuestUser(home, image)
    plan = json.loads(user.run("plan", "--json", "shell", cwd=workspace).stdout)
    secret = user.run("explain", "shell", str(home / ".ssh/id_ed25519"), cwd=workspace)
    work = user.run("explain", "shell", "README", cwd=workspace)
    check = user.run("check", cwd=workspace)
    user.close()
    launch = plan["steps"][-1]

    assert (plan["isolation"], launch["vm"]["image"]) == ("microvm", "test")
    assert (secret.returncode, work.returncode, check.returncode) == (1, 0, 0), check.stdout + check.stderr
    assert not user.records()


def test_what_runs_in_a_guest_is_on_record(image: Installs, home: Path, workspace: Path) -> None:
    """With `[audit] fallback` programs that a guest launches are in the log; `vm stats` has what the guest says."""
    user = GuestUser(home, image, '[audit]\nfallback = "seccomp"\n')
    run = user.begin("env /bin/echo 'one two'; echo >begun; exec sleep 600", cwd=workspace)
    assert user.exec(run, "until test -e begun; do sleep 0.1; done", cwd=workspace).returncode == 0
    told = json.loads(user.run("vm", "stats", run, "--json", cwd=workspace, timeout_s=BOOT_S).stdout)
    user.run("stop", run, cwd=workspace, timeout_s=BOOT_S)
    user.close()  # the log is whole now

    words = [event["process"]["cmd_line"] for event in user.audited("process.executed") if event["tier"] == "seccomp"]
    assert ["/bin/echo", "one two"] in words
    (figures,) = [one["guest"] for one in told if one["run"] == run]
    assert 128 << 20 < figures["memory_total"] < 256 << 20
    assert 0 < figures["memory_available"] < figures["memory_total"]
    assert figures["processes"] > 2
    assert figures["workspace_total"] > figures["workspace_free"] > 0
