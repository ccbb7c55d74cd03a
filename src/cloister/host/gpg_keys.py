"""A person's OpenPGP keys, asked of their own gpg: which parts sign, the public key, where the agent listens.

Looking reads only; `wake_agent` starts gpg-agent where it does not run, as gpg would itself. No
secret key is touched. Formats: gnupg's doc/DETAILS ("--with-colons"), gpgconf(1).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

_TIMEOUT_S = 5
_OF_PINENTRY = ("GPG_TTY", "TERM", "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "DBUS_SESSION_BUS_ADDRESS")
"""Where a person can be asked for a passphrase (gpg-agent(1), pinentry)."""
_DEAD = frozenset("rein")  # revoked, expired, invalid, not valid
_MORE = {"c": "certify", "a": "authenticate"}
_KEY, _GRIP, _FINGERPRINT = ("pub", "sub"), "grp", "fpr"
_VALIDITY, _VALUE, _USES = 1, 9, 11


class GpgKey(NamedTuple):
    """One key with what is needed to sign with it."""

    fingerprint: str
    grips: tuple[str, ...]
    """Keygrips of the parts that sign: subkeys where there are any, else the primary key."""
    also: tuple[str, ...]
    """What else these parts are for, `certify` and `authenticate`: over a digest, nobody can tell that apart."""
    public: bytes
    subkey: bool = False
    """Whether the fingerprint is that of a subkey."""


class Part(NamedTuple):
    """A primary key or subkey that is alive, with the letters of what it is for."""

    primary: bool
    fingerprint: str
    grip: str
    uses: str


class GpgError(Exception):
    """gpg is not there, or does not know a key."""


class GpgKeys:
    """Keys looked up before: gpg is asked again when its keyring has changed."""

    def __init__(self) -> None:
        """Ask nothing yet."""
        self._known: dict[tuple[str, str], tuple[int, GpgKey]] = {}
        self._sockets: dict[tuple[str, str], str] = {}

    def find(self, fingerprint: str, *, home: str, gnupg_home: str) -> GpgKey:
        """Return what `find_key` does.

        Raises:
            GpgError: says what is missing.
        """
        stamp = _stamp(gnupg_home or f"{home}/.gnupg")
        kept = self._known.get((fingerprint, gnupg_home))
        if kept is None or kept[0] != stamp:
            kept = (stamp, find_key(fingerprint, home=home, gnupg_home=gnupg_home))
            self._known[fingerprint, gnupg_home] = kept
        return kept[1]

    def agent_socket(self, *, home: str, gnupg_home: str) -> str:
        """Return what `agent_socket` does, asked once.

        Raises:
            GpgError: gpg is not installed.
        """
        if (home, gnupg_home) not in self._sockets:
            self._sockets[home, gnupg_home] = agent_socket(home=home, gnupg_home=gnupg_home)
        return self._sockets[home, gnupg_home]


def find_key(fingerprint: str, *, home: str, gnupg_home: str) -> GpgKey:
    """Return a key by the fingerprint of its primary key or of one subkey.

    Args:
        fingerprint: hexadecimal digits.
        home: the person's home.
        gnupg_home: their `GNUPGHOME`, or nothing.

    Raises:
        GpgError: says what is missing.
    """
    wanted = fingerprint.upper()
    listing = _gpg(["--with-colons", "--with-keygrip", "--list-keys", wanted], home, gnupg_home).decode(
        "utf-8", "replace"
    )
    chosen = choose(listing, wanted)
    if not chosen:
        raise GpgError(f"no part of the key {wanted} can sign: it is unknown, revoked or expired")
    public = _gpg(["--export-options", "export-minimal", "--export", wanted], home, gnupg_home)
    if not public:
        raise GpgError(f"gpg does not give out the public key {wanted}")
    also = tuple(word for sign, word in _MORE.items() if any(sign in part.uses for part in chosen))
    subkey = all(part.fingerprint == wanted and not part.primary for part in chosen)
    return GpgKey(wanted, tuple(part.grip for part in chosen), also, public, subkey=subkey)


def choose(listing: str, wanted: str) -> list[Part]:
    """Return the parts of a key that sign, by gpg's listing: the subkey that was named, else those that do least.

    Keys that only sign come before those that do more, subkeys before the primary key.
    """
    parts = [part for part in _parts(listing) if "s" in part.uses and part.grip]
    exact = [part for part in parts if part.fingerprint == wanted and not part.primary]
    below = [part for part in parts if not part.primary]
    return exact or [part for part in below if not set(part.uses) & set(_MORE)] or below or parts


def agent_socket(*, home: str, gnupg_home: str) -> str:
    """Return the path of gpg-agent's socket for other machines, which does less than its main one.

    Raises:
        GpgError: gpg is not installed.
    """
    listing = _run(["gpgconf", "--list-dirs", "agent-extra-socket"], home, gnupg_home).decode(
        "utf-8", "surrogateescape"
    )
    path = unquote(listing.strip(), errors="surrogateescape")
    if not path.startswith("/"):
        raise GpgError("gpgconf does not say where the gpg-agent listens")
    return path


def wake_agent(*, home: str, gnupg_home: str, caller: Mapping[str, str]) -> None:
    """Start gpg-agent where it does not run, so that it asks where the caller sits.

    Raises:
        GpgError: it does not start.
    """
    places = {name: caller[name] for name in _OF_PINENTRY if caller.get(name)}
    _run(["gpgconf", "--launch", "gpg-agent"], home, gnupg_home, places)


def _parts(listing: str) -> list[Part]:
    """Return the living parts of the key, in gpg's order."""
    parts: list[Part] = []
    alive = False
    for line in listing.splitlines():
        fields = line.split(":")
        if len(fields) <= _VALUE:
            continue
        if fields[0] in _KEY:
            alive = fields[_VALIDITY][:1] not in _DEAD and len(fields) > _USES
            if alive:
                uses = "".join(sign for sign in fields[_USES] if sign.islower())  # capitals are the whole key's
                parts.append(Part(fields[0] == _KEY[0], "", "", uses))
        elif alive and fields[0] == _FINGERPRINT and not parts[-1].fingerprint:
            parts[-1] = parts[-1]._replace(fingerprint=fields[_VALUE])
        elif alive and fields[0] == _GRIP:
            parts[-1] = parts[-1]._replace(grip=fields[_VALUE])
    return parts


def _stamp(folder: str) -> int:
    """Return what changes with a keyring: the latest time of the files it may be in."""
    times = [0]
    for name in ("pubring.kbx", "pubring.gpg", "public-keys.d/pubring.db"):
        with contextlib.suppress(OSError):
            times.append(os.stat(f"{folder}/{name}").st_mtime_ns)
    return max(times)


def _gpg(words: list[str], home: str, gnupg_home: str) -> bytes:
    return _run(["gpg", "--batch", "--no-tty", "--quiet", "--no-auto-check-trustdb", *words], home, gnupg_home)


def _run(words: list[str], home: str, gnupg_home: str, more: Mapping[str, str] | None = None) -> bytes:
    environment = {"HOME": home, "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **(more or {})}
    environment |= {"GNUPGHOME": gnupg_home} if gnupg_home else {}
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    environment |= {"XDG_RUNTIME_DIR": runtime} if runtime else {}
    try:
        done = subprocess.run(
            words,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GpgError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise GpgError(said[-1] if said else f"{words[0]} failed with {done.returncode}")
    return done.stdout
