"""Loading the packet filter of agents' accounts, and saying whether it is still what was loaded.

The text is made elsewhere (`egress/nft_units.py`) and stands in `FILE`. Whether the kernel has it
is found out by loading the same file into a network namespace of its own and comparing both
listings, without handles and counts: that needs no second reading of nft's words, and a changed
rule, a missing element, a second chain or a dormant table all show. Root only. Nothing is decided here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from cloister.errors import CloisterError, StepError, UnsupportedError
from cloister.host import private_files, programs
from cloister.plan.firewall import EXPECTED, FILE, FIREWALL_UNIT, TABLE
from cloister.plan.unit import FIRST_UID, UID_COUNT

TIMEOUT_S = 20.0
"""Of one call of nft; a thousand agents take less than one."""
_DELETE = f"table inet {TABLE} {{}}\ndelete table inet {TABLE}\n"
_COUNTS = frozenset({"handle", "packets", "bytes", "used"})
_MAX_BYTES = 64 << 20
_APART = ("--net", "--")


class Places(NamedTuple):
    """Where the file and its digest lie; other than the system's in tests."""

    file: str = FILE
    expected: str = EXPECTED


def install(text: str, places: Places = Places()) -> None:  # noqa: B008  # immutable
    """Check a text, put it in place of the file that is loaded at boot, and load it.

    When the kernel does not take it after all, the old file stands again, and the old table was never away.

    Raises:
        StepError: nft refuses the text, or the table is not what it says.
        UnsupportedError: there is no nft that can be trusted.
        OSError: the file cannot be written.
    """
    wanted = _apart(text.encode())
    with _turn(places):
        before = private_files.read(places.file, _MAX_BYTES)
        private_files.replace(places.file, text.encode())
        try:
            _load(text.encode(), wanted, places)
        except CloisterError:
            if before is None:
                os.unlink(places.file)
            else:
                private_files.replace(places.file, before)
            raise


def load(places: Places = Places()) -> None:  # noqa: B008  # immutable
    """Load the file again, whatever the kernel has, and compare.

    Raises:
        StepError: there is no such file of root's alone, or the kernel has something else afterwards.
        UnsupportedError: there is no nft that can be trusted.
    """
    with _turn(places):
        text = _text(places)
        _load(text, _expected(text, places), places)


def remove(places: Places = Places()) -> None:  # noqa: B008  # immutable
    """Take the table and its file away. Nothing holds the accounts back then: stop their units and the watchdog first.

    Raises:
        StepError: the kernel refuses.
        OSError: the file cannot be removed.
    """
    with _turn(places):
        run_nft(_DELETE.encode())
        for path in (places.file, places.expected):
            if os.path.lexists(path):
                os.unlink(path)


def trouble(places: Places = Places()) -> str:  # noqa: B008  # immutable
    """Return in one sentence what is wrong with the kernel's table; empty when it is what the file says."""
    try:
        with _turn(places):
            text = _text(places)
            wanted, found = _expected(text, places), digest(listing())
    except CloisterError as error:
        return str(error)
    except OSError as error:
        return f"the packet filter cannot be looked at: {error}"
    return "" if wanted == found else "the packet filter in the kernel is not what Cloister has loaded"


def uid_filtered(uid: int, places: Places = Places()) -> bool:  # noqa: B008  # immutable
    """Say whether the kernel filters the packets of this account now. Anything that is unclear is a no.

    The whole table is compared: it refuses each uid of our range, and only what it says to let pass may pass.
    """
    return FIRST_UID <= uid < FIRST_UID + UID_COUNT and not trouble(places)


def expect(places: Places = Places()) -> None:  # noqa: B008  # immutable
    """Note what a listing must look like, for a watchdog that may make no network namespace itself.

    Raises:
        StepError: there is no file, or nft does not take it.
        UnsupportedError: there is no nft that can be trusted.
        OSError: it cannot be noted.
    """
    with _turn(places):
        _expected(_text(places), places)


def expected(places: Places = Places()) -> bool:  # noqa: B008  # immutable
    """Say whether it is noted what a listing must look like: by the nft of now, for the file of now.

    Raises:
        StepError: there is no file.
        UnsupportedError: there is no nft that can be trusted.
        OSError: it cannot be looked at.
    """
    with _turn(places):
        return _noted(_text(places), places) is not None


def listing() -> bytes:
    """Return the kernel's table as JSON, with its counters (`egress.nft_units.passed` reads them).

    Raises:
        StepError: there is none.
        UnsupportedError: there is no nft that can be trusted.
    """
    return list_table("inet", TABLE)


def list_table(family: str, name: str) -> bytes:
    """Return a table of the kernel's as JSON.

    Raises:
        StepError: there is none.
        UnsupportedError: there is no nft that can be trusted.
    """
    # PRIVILEGE: root's, to read the host's packet filter (CAP_NET_ADMIN).
    words = [_program("nft"), "-j", "list", "table", family, name]
    return _output(words, b"", "firewall-gone", "the packet filter is not loaded")


def digest(listed: bytes) -> str:
    """Return a digest of a listing without what changes by itself: handles, counts, the order of elements.

    Raises:
        StepError: it is no listing.
    """
    try:
        items = [_plain(item) for item in json.loads(listed)["nftables"] if "metainfo" not in item]
        # Rules of one chain keep their order: it has a meaning.
        items.sort(key=lambda item: item["rule"]["chain"] if "rule" in item else json.dumps(item, sort_keys=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StepError("firewall-unreadable", f"nft listed something that cannot be read: {error!r}") from error
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: sorted(map(_plain, each), key=json.dumps) if key == "elem" and isinstance(each, list) else _plain(each)
            for key, each in value.items()
            if key not in _COUNTS or isinstance(each, (dict, list))
        }
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _text(places: Places) -> bytes:
    text = private_files.read(places.file, _MAX_BYTES)
    if text is None:
        raise StepError(
            "firewall-missing", "there is no packet filter that only root could have written",
            where=places.file, remedy="sudo cloister apply",
        )  # fmt: skip
    return text


def _load(text: bytes, wanted: str, places: Places) -> None:
    run_nft(text)
    if digest(listing()) != wanted:
        raise StepError(
            "firewall-not-loaded", "the kernel has another packet filter than the one just loaded",
            where=places.file, remedy="sudo nft list table inet cloister; then sudo cloister apply",
        )  # fmt: skip
    _note(text, wanted, places)


def _expected(text: bytes, places: Places) -> str:
    """Return the digest that a listing of this text must have."""
    wanted = _noted(text, places)
    if wanted is None:
        wanted = _apart(text)
        _note(text, wanted, places)
    return wanted


def _noted(text: bytes, places: Places) -> str | None:
    """Return what was noted for this text and this nft."""
    noted = (private_files.read(places.expected) or b"").decode("ascii", "replace").split()
    return noted[-1] if noted[:-1] == [key(text)] else None


def _note(text: bytes, wanted: str, places: Places) -> None:
    private_files.replace(places.expected, f"{key(text)} {wanted}\n".encode())


@contextlib.contextmanager
def _turn(places: Places) -> Iterator[None]:
    """Keep others from looking while the file and the kernel's table differ, as they do while one is loaded."""
    # Not the directory of the file: that is STATE, which `setup` and `apply` hold while they load what they wrote.
    descriptor = os.open(os.path.dirname(places.expected), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def key(text: bytes) -> str:
    """Return what a note holds for: the text, and the program that lists it, since versions list differently."""
    info = os.stat(_program("nft"))
    return hashlib.sha256(text + f"{info.st_dev} {info.st_ino} {info.st_mtime_ns}".encode()).hexdigest()


def _apart(text: bytes) -> str:
    """Load a text into a network namespace of its own, which ends with this call, and return the listing's digest."""
    return digest(listed_apart(text, [["list", "table", "inet", TABLE]])[0])


def listed_apart(text: bytes, listings: list[list[str]]) -> list[bytes]:
    """Load a text into a network namespace of its own, which ends with this call, and return what is listed there.

    Raises:
        StepError: nft refuses the text.
        UnsupportedError: there is no nft that can be trusted.
    """
    # PRIVILEGE: root's, to make a network namespace (CAP_SYS_ADMIN); what nft changes there is gone with it.
    script = '"$0" -f - && for each; do "$0" -j $each && printf "\\036" || exit; done'
    words = [_program("unshare"), *_APART, "/bin/sh", "-c", script, _program("nft"), *map(" ".join, listings)]
    return _output(words, text, "firewall-invalid", "nft does not take the packet filter").split(b"\x1e")[:-1]


def run_nft(text: bytes) -> None:
    """Have nft change the host's packet filter, all of the text or nothing.

    Raises:
        StepError: it refuses.
        UnsupportedError: there is no nft that can be trusted.
    """
    # PRIVILEGE: root's, to change the host's packet filter (CAP_NET_ADMIN); the text names our own table only.
    _output([_program("nft"), "-f", "-"], text, "firewall-refused", "nft does not load the packet filter")


def _output(words: list[str], stdin: bytes, reference: str, what: str) -> bytes:
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}, cwd="/",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StepError(reference, f"{what}: {error}") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise StepError(
            reference, f"{what}: {said or f'status {done.returncode}'}", where=FILE,
            remedy=f"systemctl status {FIREWALL_UNIT}; sudo cloister apply",
        )  # fmt: skip
    return done.stdout


def _program(name: str) -> str:
    found = programs.find(name, "")
    if not found.path:
        raise UnsupportedError(
            "firewall-no-nft", f"{name} is not installed where only root can change it",
            where=found.refused, remedy="sudo apt install nftables util-linux",
        )  # fmt: skip
    return found.path
