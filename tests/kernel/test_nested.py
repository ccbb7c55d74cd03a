"""`hardening.nested`: an agent that brings its own bubblewrap can use it, and still cannot leave ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cloister import BASE, User
from support.homes import canaries

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("nothing_left")]
NESTED = BASE + "[agents.shell.hardening]\nnested = true\n"
# What the sandboxes of Claude Code and Codex do: everything read-only but one place, nothing unshared that is needed.
BWRAP = 'bwrap --unshare-all --die-with-parent --ro-bind / / --dev /dev --proc /proc --bind "$PWD" "$PWD"'


def test_a_sandbox_in_the_sandbox_works(user: User, workspace: Path) -> None:
    """With the key, bubblewrap inside makes namespaces and mounts, and what it denies is denied."""
    user.write_policy(NESTED)
    script = f"{BWRAP} sh -c 'echo in > made && cat made; echo x > ~/out; echo $?; ls /proc | grep -c ^[0-9]'"
    done = user.inside(script, cwd=workspace)

    assert done.stdout.splitlines()[0] == "in", done.stderr
    assert "Read-only file system" in done.stderr
    assert int(done.stdout.splitlines()[2]) < 6
    assert "hardening.nested" in " ".join(user.receipts()[-1]["opt_outs"])
    user.close()


def test_without_the_key_there_is_none(user: User, workspace: Path) -> None:
    """The twin: by default no user namespace can be made, so bubblewrap inside fails and says so."""
    done = user.inside(f"{BWRAP} true; echo $?; unshare -U true; echo $?", cwd=workspace)

    assert "0" not in done.stdout.split(), done.stdout
    assert "Operation not permitted" in done.stderr
    user.close()


def test_nested_namespaces_lead_nowhere(user: User, home: Path, workspace: Path) -> None:
    """Attack: root of a user namespace of its own unmounts, remounts and enters; protections and the home stay."""
    user.write_policy(NESTED)
    hook = workspace / ".git/hooks/pre-commit"
    attack = (
        "umount -l .git/hooks; umount -l .git/config; umount -l /usr; mount -o remount,rw,bind .git/hooks; "
        f"echo x > {hook}; echo x >> .git/config; mount -t tmpfs t .git/hooks && echo x > {hook}; "
        "mount --move /run/cloister/box /mnt; ip link; curl -m 2 --noproxy '*' http://192.0.2.1/; "
        f"nsenter -t 1 -m true; cat {' '.join(f'~/{name}' for name in canaries(home))}"
    )
    config = (workspace / ".git/config").read_text()
    done = user.inside(f"unshare -Urmpf --mount-proc sh -c {attack!r}; echo end", cwd=workspace)

    assert "end" in done.stdout
    assert not hook.exists()
    assert (workspace / ".git/config").read_text() == config
    assert not [name for name, canary in canaries(home).items() if canary in done.stdout + done.stderr]
    user.close()


def test_nested_does_not_open_other_system_calls(user: User, workspace: Path) -> None:
    """Only namespaces and mounts are opened: keyctl, io_uring and TIOCSTI stay refused inside a nested namespace."""
    user.write_policy(NESTED)
    probe = (
        "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
        "for number in ({'x86_64': (250, 425, 321)}.get(os.uname().machine) or (219, 425, 280)):\n"
        "    print(libc.syscall(number, 0, 0, 0), ctypes.get_errno())\n"
    )
    done = user.inside(f'unshare -Ur python3 -c "{probe}"', cwd=workspace)

    assert done.stdout.splitlines() == ["-1 1"] * 3, done.stderr
    user.close()
