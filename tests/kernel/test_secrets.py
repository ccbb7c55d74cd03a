"""Secret references: what is read, what is refused, and that no error holds anything of a secret."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cloister.errors import RetryError, render
from cloister.host.secrets import SecretReader, Surroundings
from cloister.plan.unit import delivered_name

pytestmark = pytest.mark.kernel
T = TypeVar("T")
SECRET = "made-up-secret-Zq8"


def run(job: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own."""
    return asyncio.run(job)


def reader(home: Path, **options: Any) -> SecretReader:
    """Return a reader for the person who runs the tests."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), **options.pop("environment", {})}
    around = Surroundings(str(home), os.getuid(), environment, options.pop("own", {}), options.pop("forbidden", ()))
    return SecretReader(around, **options)


def keep(path: Path, text: str = SECRET + "\n", mode: int = 0o600) -> Path:
    """Write a secret file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def refusal(reader: SecretReader, reference: str) -> str:
    """Return the error for a reference, as people see it."""
    with pytest.raises(RetryError) as caught:
        run(reader.read(reference))
    assert caught.value.reference == "secret-unavailable"
    assert SECRET not in f"{caught.value!r}{caught.value.__cause__!r}{render(caught.value)}"
    assert reference[:40] in caught.value.where
    return render(caught.value)


def test_a_file_is_read_without_its_closing_newline(home: Path) -> None:
    """One newline at the end goes, in either spelling; more stay, and so does everything else."""
    keep(home / "one")
    keep(home / "dos", SECRET + "\r\n")
    keep(home / "odd", " a\n\n")
    read = reader(home)

    assert run(read.read(f"file:{home}/one")) == run(read.read("file:~/dos")) == SECRET.encode()
    assert run(read.read("file:~/odd")) == b" a\n"


def test_a_rotated_file_counts_at_the_next_use(home: Path) -> None:
    """Rewritten in place or replaced by rename, the new value is the next one; a missing file is an error at once."""
    path = keep(home / "key")
    read = reader(home)
    before = run(read.read("file:~/key"))
    path.write_text("second")
    second = run(read.read("file:~/key"))
    keep(home / "new", "third").rename(path)
    third = run(read.read("file:~/key"))
    path.unlink()

    assert (before, second, third) == (SECRET.encode(), b"second", b"third")
    assert "no such file" in refusal(read, "file:~/key")


def _link(home: Path) -> None:
    keep(home / "real")
    (home / "key").symlink_to(home / "real")


def _mode(mode: int) -> Any:
    return lambda home: keep(home / "key", mode=mode)


def _fifo(home: Path) -> None:
    os.mkfifo(home / "key", 0o600)


BAD_FILES = {
    "link": (_link, "file:{home}/real"),
    "group": (_mode(0o640), "chmod 600"),
    "others": (_mode(0o604), "chmod 600"),
    "writable": (_mode(0o620), "chmod 600"),
    "fifo": (_fifo, "not a regular file"),
    "directory": (lambda home: (home / "key").mkdir(), "not a regular file"),
    "large": (lambda home: keep(home / "key", "x" * 70_000), "larger than 64 KiB"),
    "empty": (lambda home: keep(home / "key", "\n"), "empty"),
    "missing": (lambda home: keep(home / "other"), "no such file"),
}


@pytest.mark.parametrize("kind", sorted(BAD_FILES))
def test_files_that_are_no_safe_place_are_refused(home: Path, kind: str) -> None:
    """Links, files open to others, and what is no plain small file; each error says what to do."""
    make, said = BAD_FILES[kind]
    make(home)

    assert said.format(home=os.path.realpath(home)) in refusal(reader(home), "file:~/key")


def test_a_linked_directory_is_followed_and_an_open_one_is_not(home: Path) -> None:
    """Secret managers link directories; but where everybody may swap a file, none is read."""
    keep(home / "generation-1/key")
    (home / "secrets").symlink_to(home / "generation-1")
    keep(home / "open/key")
    (home / "open").chmod(0o777)

    assert run(reader(home).read("file:~/secrets/key")) == SECRET.encode()
    assert "chmod o-w" in refusal(reader(home), "file:~/open/key")


def test_a_file_where_the_agent_may_write_is_refused(home: Path) -> None:
    """The agent could put another file in its place; a link to the place is no way round."""
    keep(home / "work/key")
    (home / "alias").symlink_to(home / "work")
    forbidden = (str(home / "work"),)

    for reference in ("file:~/work/key", "file:~/alias/key"):
        assert "agent may write" in refusal(reader(home, forbidden=forbidden), reference)
        assert run(reader(home).read(reference)) == SECRET.encode()


def test_the_callers_variables_come_before_the_brokers(home: Path) -> None:
    """`env:` is what whoever started the run sees with echo; only where that is missing, the broker's own counts."""
    own = {"TOKEN": "brokers", "ONLY": "brokers"}
    read = reader(home, environment={"TOKEN": "callers"}, own=own)

    assert run(read.read("env:TOKEN")) == b"callers"
    assert run(read.read("env:ONLY")) == b"brokers"
    assert "export MISSING" in refusal(read, "env:MISSING")


def test_credentials_of_the_unit(home: Path) -> None:
    """`systemd:` reads the broker's own $CREDENTIALS_DIRECTORY, never the caller's, and follows no link."""
    keep(home / "credentials/key", mode=0o440)
    (home / "credentials/link").symlink_to(home / "credentials/key")
    own = {"CREDENTIALS_DIRECTORY": str(home / "credentials")}

    assert run(reader(home, own=own).read("systemd:key")) == SECRET.encode()
    assert "link" in refusal(reader(home, own=own), "systemd:link")
    assert "LoadCredential" in refusal(reader(home, environment=own), "systemd:key")


def script(path: Path, text: str) -> Path:
    """Write a program."""
    return keep(path, f"#!/bin/sh\n{text}\n", 0o755)


def test_a_command_is_run_without_a_shell(home: Path) -> None:
    """Words are split as a shell would, and nothing is expanded: no `$`, no `;`, no `*`."""
    script(home / "bin/show", 'for word; do printf "%s|" "$word"; done')
    read = reader(home, environment={"PATH": f"{home}/bin:/usr/bin:/bin"})

    assert run(read.read("command:show 'a b' $HOME *; id")) == b"a b|$HOME|*;|id|"
    assert run(read.read("command:~/bin/show x")) == b"x|"
    assert "quot" in refusal(read, "command:show 'x").lower()


def test_a_command_is_kept_for_a_while(home: Path) -> None:
    """It runs once for many uses, again after five minutes, and after its host said 401, but not more than so often."""
    script(home / "count", f"echo x >> {home}/runs; wc -l < {home}/runs")
    now = [0.0]
    read = reader(home, clock=lambda: now[0])

    async def uses() -> list[bytes]:
        reference, got = "command:~/count", []
        got += await asyncio.gather(*(read.read(reference) for _ in range(5)))
        now[0] = 5
        read.refused(reference)
        got.append(await read.read(reference))
        now[0] = 11
        read.refused(reference)
        got.append(await read.read(reference))
        now[0] = 312
        got.append(await read.read(reference))
        return got

    assert [int(value) for value in run(uses())] == [1, 1, 1, 1, 1, 1, 2, 3]


def test_a_command_that_fails_shows_nothing_it_said(home: Path) -> None:
    """Its exit code is told; its output and standard error, which may quote the secret, are not."""
    script(home / "fails", f"echo {SECRET}; echo {SECRET} >&2; exit 3")

    said = refusal(reader(home), "command:~/fails now")
    assert "ended with 3" in said
    assert "~/fails now" in said
    assert "no program" in refusal(reader(home), "command:no-such-program-here")


def test_a_command_that_hangs_or_floods_is_ended(home: Path) -> None:
    """A gigabyte is not taken in, and a hanging one is killed with all it started."""
    script(home / "floods", "exec head -c 1000000000 /dev/zero")
    script(home / "hangs", f"sleep 987654 & echo $! > {home}/pid; wait")
    begun = time.monotonic()

    assert "more than 64 KiB" in refusal(reader(home), "command:~/floods")
    assert "within 0.5 s" in refusal(reader(home, timeout_s=0.5), "command:~/hangs")
    assert time.monotonic() - begun < 20
    _wait_gone(int((home / "pid").read_text()))


def _wait_gone(pid: int) -> None:
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or " Z " in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the command left a process behind")


def test_no_program_is_taken_from_where_the_agent_may_write(home: Path) -> None:
    """A program of that name in the workspace is passed over on PATH, and refused by its path or through a link."""
    script(home / "work/bin/tool", "echo trojan")
    script(home / "good/tool", f"echo {SECRET}; ")
    (home / "link").mkdir()
    (home / "link/tool").symlink_to(home / "work/bin/tool")
    forbidden = (str(home / "work"),)
    both = {"PATH": f"{home}/work/bin:.:relative:{home}/good:/usr/bin:/bin"}

    assert run(reader(home, environment=both, forbidden=forbidden).read("command:tool")) == SECRET.encode()
    assert run(reader(home, environment=both).read("command:tool")) == b"trojan"
    linked = reader(home, environment={"PATH": f"{home}/link:/bin"}, forbidden=forbidden)
    for reference in ("command:tool", f"command:{home}/work/bin/tool", "command:./tool"):
        assert "trojan" not in refusal(linked, reference)


def test_variables_that_load_code_do_not_reach_a_command(home: Path) -> None:
    """LD_PRELOAD and its like were set for something else; ordinary variables are there."""
    script(home / "show", "env")
    environment = {"LD_PRELOAD": "", "PYTHONPATH": "/x", "BASH_ENV": "/x", "GH_CONFIG_DIR": "/kept"}
    said = run(reader(home, environment=environment).read("command:~/show")).decode()

    assert "GH_CONFIG_DIR=/kept" in said
    assert not [name for name in ("LD_PRELOAD", "PYTHONPATH", "BASH_ENV") if name in said]


def test_pass_gives_the_first_line(home: Path) -> None:
    """`pass:NAME` asks the real pass, with a real key of a home of its own; later lines are notes."""
    if shutil.which("pass") is None:
        pytest.skip("pass is not installed")
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "GNUPGHOME": str(home / "g")}
    (home / "g").mkdir(mode=0o700)

    def do(*words: str, data: str = "") -> str:
        done = subprocess.run(
            words, env=environment, check=True, capture_output=True, timeout=60, input=data, encoding="ascii"
        )
        return done.stdout

    generate = ("gpg", "--batch", "--passphrase", "", "--quick-gen-key", "me@example.org", "ed25519", "cert")
    do(*generate)
    listed = do("gpg", "--list-keys", "--with-colons").splitlines()
    mark = next(line.split(":")[9] for line in listed if line.startswith("fpr"))
    do("gpg", "--batch", "--passphrase", "", "--quick-add-key", mark, "cv25519", "encr")
    do("pass", "init", "me@example.org")
    do("pass", "insert", "-m", "web/token", data=f"{SECRET}\nuser: me\n")
    try:
        assert run(reader(home, environment=environment).read("pass:web/token")) == SECRET.encode()
        assert "try it: pass show" in refusal(reader(home, environment=environment), "pass:web/missing")
    finally:
        do("gpgconf", "--kill", "all")


IN_SESSION = """
printf pw | gnome-keyring-daemon --unlock --components=secrets >/dev/null
printf '%s' {secret} | {python} -m keyring set cloister token
printf '%s' other | {python} -m keyring set elsewhere me
exec {python} - <<'END'
import asyncio, os
from cloister.errors import RetryError
from cloister.host.secrets import SecretReader, Surroundings
from cloister.plan.unit import delivered_name
reader = SecretReader(Surroundings(os.environ["HOME"], os.getuid(), dict(os.environ)))
print(asyncio.run(reader.read("keyring:token")).decode(), asyncio.run(reader.read("keyring:elsewhere/me")).decode())
try:
    asyncio.run(reader.read("keyring:missing"))
except RetryError as error:
    print(error.remedy)
END
"""


def test_the_desktops_keyring(home: Path) -> None:
    """A real Secret Service on a private D-Bus: the service `cloister`, or a named one; else it says what to type."""
    if shutil.which("gnome-keyring-daemon") is None or shutil.which("dbus-run-session") is None:
        pytest.skip("gnome-keyring is not installed")
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime)}
    if source := os.pathsep.join(path for path in sys.path if path.endswith("src")):
        environment["PYTHONPATH"] = source
    passwd = home / "passwd"  # D-Bus wants an entry for its user, and the user of these tests may have none
    passwd.write_text(f"me:x:{os.getuid()}:{os.getgid()}::{home}:/bin/sh\n")
    known = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", str(passwd), "/etc/passwd", "--die-with-parent"]
    done = subprocess.run(
        [*known, "dbus-run-session", "--", "sh", "-c", IN_SESSION.format(secret=SECRET, python=sys.executable)],
        env=environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.stdout.decode().splitlines() == [f"{SECRET} other", "keyring set cloister missing"], done.stderr


def test_a_provider_adds_a_scheme(home: Path) -> None:
    """Who keeps logins registers for `login:`; without it the scheme is refused. It is asked each time."""
    asked = []

    async def logins(name: str) -> bytes:
        asked.append(name)
        return f"token-{len(asked)}".encode()

    read = reader(home, providers={"login": logins})

    assert [run(read.read("login:claude")) for _ in range(2)] == [b"token-1", b"token-2"]
    assert "login:" in refusal(reader(home), "login:claude")


def test_a_reader_shows_nothing(home: Path) -> None:
    """Neither the reader's parts nor a failed task print a secret."""
    around = Surroundings(str(home), 1, {"TOKEN": SECRET}, {"OTHER": SECRET})

    assert SECRET not in repr(around)


def test_a_file_of_roots_is_taken_from_what_systemd_handed_over(home: Path, tmp_path: Path) -> None:
    """The policy names the file; the system's broker, who could not read it, finds it among its credentials."""
    handed = tmp_path / "credentials"
    keep(handed / delivered_name("/etc/cloister/keys/anthropic.key"))
    read = reader(home, own={"CREDENTIALS_DIRECTORY": str(handed)})

    assert run(read.read("file:/etc/cloister/keys/anthropic.key")) == SECRET.encode()
    assert "no such file" in refusal(read, "file:/etc/cloister/keys/other.key")
    assert "no such file" in refusal(reader(home), "file:/etc/cloister/keys/anthropic.key")
