"""The key store on a real file system: sources of the master key, permissions, several writers, death at any point."""

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloister.errors import CloisterError, DeniedError, RetryError, StepError, UsageError
from cloister.host import key_store
from cloister.host.key_store import KeyFiles
from cloister.identity.authority import Demand, Grant
from cloister.identity.tokens import TokenError
from cloister.runs.identity_store import IdentityStore

pytestmark = pytest.mark.kernel

NOW = 1_800_000_000.0
KEY, OTHER_KEY = "0a" * 32, "0b" * 32
DEMAND = Demand(audience="vault")


def grant(agent: str = "coder", run: str = "0123456789ab", since: float = NOW) -> Grant:
    """Return a grant for `vault`."""
    return Grant(agent=agent, run=run, user="alice", policy="ab" * 32, audiences=("vault",), since=since)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the store will be; it is not there yet."""
    return tmp_path / "state/identity"


_OPEN: list[IdentityStore] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Close the stores of a test: each keeps its document open, and one test has a hundred."""
    yield
    while _OPEN:
        _OPEN.pop().close()


def store_in(folder: Path, **environment: str) -> IdentityStore:
    """Open a store whose clock stands still."""
    _OPEN.append(IdentityStore(str(folder), environment, hostname="host", clock=lambda: NOW))
    return _OPEN[-1]


def reason(action: Callable[[], object]) -> str:
    """Return the reference of the error that an action ends in."""
    with pytest.raises(CloisterError) as caught:
        action()
    shown = f"{caught.value} {caught.value.where} {caught.value.remedy}"
    assert KEY not in shown
    assert OTHER_KEY not in shown
    return caught.value.reference


# --- where the master key comes from ----------------------------------------------------------


def test_a_store_is_made_with_the_first_token_and_found_again(folder: Path) -> None:
    """Tokens of one process verify in the next; everything is ours alone."""
    token, _ = store_in(folder).issue(grant(), "vault")

    assert store_in(folder).verify(token, DEMAND).agent == "coder"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "store.json": 0o600, "lock": 0o600, "master.key": 0o600,
    }  # fmt: skip
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len((folder / "master.key").read_text().strip()) == 64


def test_looking_makes_nothing(folder: Path) -> None:
    """Neither verifying nor listing makes keys."""
    store = store_in(folder)
    for action in (store.read, store.jwks, lambda: store.verify("a.b.c", DEMAND), lambda: store.revoke_run("x")):
        assert reason(action) == "identity-none"
    assert not (folder / "store.json").exists()
    assert not (folder / "master.key").exists()


def test_the_first_source_that_is_named_counts(folder: Path, tmp_path: Path) -> None:
    """Environment, file, credential, generated, in this order; each opens what it has sealed and nothing else."""
    file, credentials = tmp_path / "master", tmp_path / "credentials"
    file.write_text("0c" * 32 + "\n")
    file.chmod(0o600)
    credentials.mkdir()
    (credentials / "cloister-master-key").write_text("0d" * 32)
    sources = (
        {"CLOISTER_MASTER_KEY": KEY, "CLOISTER_MASTER_KEY_PATH": str(file), "CREDENTIALS_DIRECTORY": str(credentials)},
        {"CLOISTER_MASTER_KEY_PATH": str(file), "CREDENTIALS_DIRECTORY": str(credentials)},
        {"CREDENTIALS_DIRECTORY": str(credentials)},
        {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    for number, source in enumerate(sources):
        token, _ = store_in(folder / str(number), **source).issue(grant(), "vault")
        for other_number, other in enumerate(sources):
            opened = store_in(folder / str(number), **other)
            if other_number == number:
                assert opened.verify(token, DEMAND)
            else:
                assert reason(opened.read) in {"master-key-wrong", "master-key-missing"}
    assert [(folder / f"{number}/master.key").exists() for number in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("text", ["", "x" * 64, KEY[:-1], KEY + "0", KEY + KEY, "0x" + KEY[2:]])
def test_a_malformed_master_key_is_an_error_and_no_reason_to_take_another(
    folder: Path, tmp_path: Path, text: str
) -> None:
    """From the environment and from a file; nothing is made."""
    file = tmp_path / "master"
    file.write_text(text)
    file.chmod(0o600)

    assert reason(lambda: store_in(folder, CLOISTER_MASTER_KEY_PATH=str(file)).derive("x")) == "master-key-invalid"
    if text:
        assert reason(lambda: store_in(folder, CLOISTER_MASTER_KEY=text).derive("x")) == "master-key-invalid"
    assert not (folder / "store.json").exists()
    assert not (folder / "master.key").exists()


def test_a_lost_or_wrong_master_key_never_makes_a_fresh_one(folder: Path, tmp_path: Path) -> None:
    """One clear error, and the old data stays as it is."""
    store_in(folder).derive("x")
    before = (folder / "store.json").read_bytes()
    key = (folder / "master.key").read_text()
    (folder / "master.key").unlink()

    for action in ("read", "jwks", "rotate", "rotate_master"):
        assert reason(getattr(store_in(folder), action)) == "master-key-missing"
    assert reason(lambda: store_in(folder).issue(grant(), "vault")) == "master-key-missing"
    assert reason(store_in(folder, CLOISTER_MASTER_KEY=KEY).read) == "master-key-wrong"
    missing = str(tmp_path / "nowhere")
    assert reason(store_in(folder, CLOISTER_MASTER_KEY_PATH=missing).read) == "master-key-missing"
    assert (
        reason(lambda: store_in(tmp_path / "new", CLOISTER_MASTER_KEY_PATH=missing).derive("x")) == "master-key-missing"
    )
    assert (folder / "store.json").read_bytes() == before
    assert not (folder / "master.key").exists()
    (folder / "master.key").write_text(key)
    (folder / "master.key").chmod(0o600)
    assert store_in(folder).read()


@pytest.mark.root
def test_a_credential_that_systemd_sealed_to_this_host(folder: Path, tmp_path: Path) -> None:
    """`systemd-creds encrypt` and `decrypt`, with a host key of the test's own; a TPM takes the same way."""
    if not shutil.which("systemd-creds"):
        pytest.skip("there is no systemd-creds")
    environment = {**os.environ, "SYSTEMD_CREDENTIAL_SECRET": str(tmp_path / "host-key")}
    (tmp_path / "plain").write_text(KEY)
    (tmp_path / "credentials").mkdir()
    target = tmp_path / "credentials/cloister-master-key"
    for words in (("encrypt", "--with-key=host", tmp_path / "plain", tmp_path / "sealed"),
                  ("decrypt", tmp_path / "sealed", target)):  # fmt: skip
        subprocess.run(
            ["systemd-creds", words[0], "--name=cloister-master-key", *map(str, words[1:])], env=environment,
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
    store = store_in(folder, CREDENTIALS_DIRECTORY=str(tmp_path / "credentials"))
    token, _ = store.issue(grant(), "vault")

    assert KEY.encode() not in (tmp_path / "sealed").read_bytes()
    assert store.source.what == "systemd credential"
    assert store_in(folder, CLOISTER_MASTER_KEY=KEY).verify(token, DEMAND)
    assert reason(store.rotate_master) == "master-key-not-ours"


# --- files that cannot be trusted -------------------------------------------------------------


def test_files_that_others_can_reach_are_refused(folder: Path) -> None:
    """Modes of directory, store and master key; with the right ones it opens again."""
    store_in(folder).derive("x")
    for path, wrong, right in ((folder, 0o750, 0o700), (folder / "store.json", 0o640, 0o600),
                               (folder / "master.key", 0o604, 0o600)):  # fmt: skip
        path.chmod(wrong)
        assert reason(store_in(folder).read) == "key-store-unsafe"
        path.chmod(right)
        assert store_in(folder).read()


def test_links_and_devices_are_never_followed(folder: Path, tmp_path: Path) -> None:
    """A link in place of store, lock or master key; a FIFO is not waited for."""
    store_in(folder).derive("x")
    for name in ("store.json", "master.key", "lock"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        assert reason(store_in(folder).read) in {"key-store-unsafe", "key-store-refused"}
        (folder / name).unlink()
        if name != "lock":
            os.mkfifo(folder / name, 0o600)
            assert reason(store_in(folder).read) == "key-store-unsafe"
            (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert reason(store_in(folder).read) == "key-store-unsafe"


@pytest.mark.root
def test_files_of_another_user_are_refused(folder: Path) -> None:
    """Whoever owns a file can write it."""
    store_in(folder).derive("x")
    for name in ("store.json", "master.key"):
        os.chown(folder / name, 4242, 4242)
        assert reason(store_in(folder).read) == "key-store-unsafe"
        os.chown(folder / name, 0, 0)
    assert store_in(folder).read()


def test_a_stale_file_of_a_killed_writer_is_no_obstacle(folder: Path) -> None:
    """What was being written is replaced, and a link planted there is not followed."""
    store = store_in(folder)
    store.derive("x")
    (folder / "store.json.new").symlink_to("/etc/passwd")

    assert store.derive("y")
    assert not (folder / "store.json.new").exists()


def test_a_damaged_store_is_left_alone(folder: Path) -> None:
    """Cut off or changed: an error, and no new keys over it."""
    store_in(folder).derive("x")
    good = (folder / "store.json").read_bytes()
    for bad in (b"", good[:-20], good.replace(b'"seen":0', b'"seen":2'), b"{}"):
        (folder / "store.json").write_bytes(bad)
        assert reason(lambda: store_in(folder).issue(grant(), "vault")) == "key-store-damaged"
        assert (folder / "store.json").read_bytes() == bad
    (folder / "store.json").write_bytes(good)
    assert store_in(folder).read()


def test_the_repr_of_a_store_shows_no_key(folder: Path) -> None:
    """Objects get printed in tracebacks and logs."""
    store = store_in(folder, CLOISTER_MASTER_KEY=KEY)
    store.derive("x")

    assert KEY not in repr(store)
    assert "0a0a" not in repr(store)


# --- several processes ------------------------------------------------------------------------


def test_a_revocation_holds_in_every_process_at_once(folder: Path) -> None:
    """One store issues and has the token in its cache, another one revokes; it survives a restart."""
    first, second = store_in(folder), store_in(folder)
    token, _ = first.issue(grant(), "vault")
    other, _ = first.issue(grant("other", "zzzzzzzzzzzz"), "vault")
    assert first.verify(token, DEMAND)
    second.revoke_run("0123456789ab")

    for store in (first, second, store_in(folder)):
        with pytest.raises(TokenError, match="revoked"):
            store.verify(token, DEMAND)
        assert store.verify(other, DEMAND)
    with pytest.raises(DeniedError, match="revoked"):
        first.issue(grant(), "vault")


def test_agents_and_keys_are_revoked_and_rotated_across_processes(folder: Path) -> None:
    """A rotation keeps old tokens, a revoked key or agent does not; the other agent never notices."""
    first, second = store_in(folder), store_in(folder)
    token, _ = first.issue(grant(), "vault")
    other, _ = first.issue(grant("other", "zzzzzzzzzzzz"), "vault")
    assert second.rotate("coder") == ("coder",)
    assert first.verify(token, DEMAND)
    retired = next(key for key in first.read().keys if key.retired)
    second.revoke_key(retired.kid)
    with pytest.raises(TokenError):
        first.verify(token, DEMAND)
    newer, _ = first.issue(grant(), "vault")
    second.revoke_agent("coder")
    with pytest.raises(TokenError):
        first.verify(newer, DEMAND)

    assert first.verify(other, DEMAND)
    assert second.rotate() == ("other",)
    for action in (lambda: second.rotate("nobody"), lambda: second.revoke_key("nothing")):
        with pytest.raises(UsageError):
            action()


def test_a_clock_set_back_ends_what_was_signed_before(folder: Path) -> None:
    """Also after a restart; tokens of the new time work; a step of a second is no step."""
    clock = [NOW]
    store = IdentityStore(str(folder), {}, clock=lambda: clock[0])
    token, _ = store.issue(grant(since=NOW - 9000), "vault")
    clock[0] = NOW - 1
    assert store.verify(token, DEMAND)
    clock[0] = NOW + 1000
    assert reason(lambda: store.verify(token, DEMAND)) == "token-expired"
    clock[0] = NOW + 10
    assert reason(lambda: store.verify(token, DEMAND)) == "token-key"
    fresh, _ = store.issue(grant(since=NOW - 9000), "vault")
    assert store.verify(fresh, DEMAND)
    clock[0] = NOW - 5000
    restarted = IdentityStore(str(folder), {}, clock=lambda: clock[0])
    assert reason(lambda: restarted.verify(fresh, DEMAND)) == "token-key"
    assert restarted.verify(restarted.issue(grant(since=NOW - 9000), "vault")[0], DEMAND)


def _write_many(folder: str, name: str, count: int) -> None:
    store = IdentityStore(folder, {}, hostname="host")
    for number in range(count):
        store.issue(Grant(agent=f"{name}-{number}", run="r", user="u", policy="0", since=1.0), "cloister")
        store.revoke_run(f"{name}{number}")


def test_writers_do_not_lose_each_others_changes(folder: Path) -> None:
    """Four processes at once, from the very first file on: every key and every revocation is there."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(folder), f"w{number}", 8)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    state = IdentityStore(str(folder), {}).read()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert {key.agent for key in state.keys} == {f"w{a}-{b}" for a in range(4) for b in range(8)}
    assert len(state.revoked) == 32
    assert len(list(folder.glob("master.key*"))) == 1


def test_a_held_lock_is_waited_for_and_then_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging process makes an error, not a hang."""
    monkeypatch.setattr(key_store, "_LOCK_WAIT_S", 0.1)
    store_in(folder).derive("x")
    with KeyFiles(str(folder)).locked(), pytest.raises(RetryError, match="another process"):
        store_in(folder).read()
    assert store_in(folder).read()


def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails with an error for people; the old store is still there, and works."""
    store = store_in(folder)
    token, _ = store.issue(grant(), "vault")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StepError, match="No space left"):
            store.revoke_run("0123456789ab")
    assert store.verify(token, DEMAND)
    assert store_in(folder).verify(token, DEMAND)


# --- the master key changes -------------------------------------------------------------------


def test_a_new_master_key_opens_everything_and_the_old_one_nothing(folder: Path) -> None:
    """Keys, revocations and keys of other purposes stay the same; the file on disk is another one throughout."""
    store = store_in(folder)
    token, _ = store.issue(grant(), "vault")
    secret, document, old = (
        store.derive("recordings"),
        (folder / "store.json").read_bytes(),
        (folder / "master.key").read_text(),
    )
    assert store.rotate_master() == str(folder / "master.key")

    assert (folder / "master.key").read_text() != old
    assert (folder / "store.json").read_bytes() != document
    for opened in (store, store_in(folder)):
        assert opened.verify(token, DEMAND)
        assert opened.derive("recordings") == secret
    assert reason(store_in(folder, CLOISTER_MASTER_KEY=old.strip()).read) == "master-key-wrong"
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "master.key", "store.json"]


def test_a_master_key_that_is_not_ours_needs_its_successor(folder: Path, tmp_path: Path) -> None:
    """From the environment: the new key is given, and the old one opens nothing more. From a file: it is replaced."""
    store = store_in(folder, CLOISTER_MASTER_KEY=KEY)
    secret = store.derive("x")
    assert reason(store.rotate_master) == "master-key-not-ours"
    assert reason(lambda: store.rotate_master("short")) == "master-key-invalid"
    store.rotate_master(OTHER_KEY)
    assert store_in(folder, CLOISTER_MASTER_KEY=OTHER_KEY).derive("x") == secret
    assert reason(store_in(folder, CLOISTER_MASTER_KEY=KEY).read) == "master-key-wrong"

    file = tmp_path / "master"
    file.write_text(OTHER_KEY)
    file.chmod(0o600)
    assert store_in(folder, CLOISTER_MASTER_KEY_PATH=str(file)).rotate_master() == str(file)
    assert file.read_text().strip() != OTHER_KEY
    assert store_in(folder, CLOISTER_MASTER_KEY_PATH=str(file)).derive("x") == secret


CALLS = ("open", "write", "fsync", "rename", "unlink", "link", "close", "stat")


def _die_at(number: int, *, half: bool) -> None:
    """Have this process killed at its system call of that number, counted over `CALLS`."""
    left = [number]

    def wrap(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                if half and name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def killed(action: Callable[[], object], number: int, *, half: bool) -> bool:
    """Run an action in a child that dies at a system call; return whether it did."""
    child = os.fork()
    if child == 0:
        _die_at(number, half=half)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("half", [False, True], ids=["between calls", "in the middle of a write"])
@pytest.mark.parametrize("what", ["first token", "revocation", "new master key", "new master key in a file of ours"])
def test_death_at_any_point_leaves_a_store_that_opens(folder: Path, tmp_path: Path, what: str, half: bool) -> None:
    """`kill -9` at each system call in turn: the next start finds the old state or the new one, and finishes."""
    environment, file = {}, tmp_path / "master"
    if what.endswith("ours"):
        environment["CLOISTER_MASTER_KEY_PATH"] = str(file)
    actions: dict[str, Callable[[], object]] = {
        "first token": lambda: store_in(folder).issue(grant(), "vault"),
        "revocation": lambda: store_in(folder).revoke_run("0123456789ab"),
    }
    action = actions.get(what, lambda: store_in(folder, **environment).rotate_master())
    number, outcomes = 0, set()
    while True:
        for path in folder.glob("*"):
            path.unlink()
        file.write_text(KEY)
        file.chmod(0o600)
        if what != "first token":
            begun = store_in(folder, **environment)
            token, _ = begun.issue(grant(), "vault")
            secret, generation = begun.derive("x"), begun.read().generation
        if not killed(action, number, half=half):
            break
        after = store_in(folder, **environment)
        if what == "first token":
            token, _ = after.issue(grant(), "vault")
        else:
            assert after.derive("x") == secret
            outcomes.add(after.read().generation - generation)
            revoked = after.read().is_revoked("run", "0123456789ab")
            assert revoked == (what == "revocation" and after.read().generation > generation)
        assert what == "revocation" or after.verify(token, DEMAND)
        after.rotate_master()
        assert store_in(folder, **environment).read()
        assert sorted(path.name for path in folder.iterdir() if "master" not in path.name) == ["lock", "store.json"]
        number += 1

    assert number > 15
    assert what == "first token" or outcomes == {0, 1}, "both sides of the change were seen"
