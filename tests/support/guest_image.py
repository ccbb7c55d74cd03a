"""The guest image of the tests: renewed with the program under test as its PID 1, and carried to where it is booted."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec

from cloister.host import vm_probe
from cloister.images.manifest import Manifest
from cloister.policy.model import Images
from cloister.runs.images import Builder, ImagePlaces
from cloister.runs.prepare_vm import find_qemu
from cloister.runs.vm_accelerator import Guest, accelerator

STORE, TRUST = ".local/share/cloister/images", ".config/cloister/trust.d"
"""In a home without XDG variables."""


class GuestImage(NamedTuple):
    """The image of the tests, as a store that a test can use or copy from."""

    name: str
    path: Path
    """Directory of the version: vmlinux, initramfs.cpio, root.img, manifest.json, manifest.sig."""
    store: Path
    """What would be `images` in a data directory."""
    trust: Path
    """A trust.d with the key that it is signed with."""
    manifest: Manifest

    def install(self, home: Path) -> None:
        """Put it into the store of a user with this home and no XDG variables, and let the user trust its key."""
        version = home / STORE / self.name / str(self.manifest.version)
        version.mkdir(parents=True, mode=0o700)
        for file in self.path.iterdir():
            try:
                (version / file.name).hardlink_to(file)
            except OSError:  # another file system
                (version / file.name).write_bytes(file.read_bytes())
        _trust(self.trust, home)


class CarriedImage(NamedTuple):
    """The same in another machine: a home into which it was installed, owned by anybody."""

    home: Path

    def install(self, home: Path) -> None:
        """Copy it into the store of a user, and let the user trust its key."""
        shutil.copytree(self.home / STORE, home / STORE, copy_function=shutil.copyfile)
        for folder in (home / STORE).rglob("*"):
            folder.chmod(0o700 if folder.is_dir() else 0o400)
        _trust(self.home / TRUST, home)


def _trust(keys: Path, home: Path) -> None:
    trusted = home / TRUST
    trusted.mkdir(parents=True, mode=0o700, exist_ok=True)
    for each in keys.iterdir():
        target = trusted / each.name
        target.write_bytes(each.read_bytes())
        target.chmod(0o600)


def renewed(made: str, home: Path) -> GuestImage:
    """Return the image that tools/guest-image made, with the helper of the Cloister under test as PID 1.

    Args:
        made: the folder that it printed.
        home: an empty folder for store and keys.
    """
    where = ImagePlaces(
        store=str(home / "images"), key=str(home / "key/image-key.pem"), trust=str(home / "trust.d"),
        seen=str(home / "seen.json"), system_store=f"{made}/store", system_trust=str(home / "none"),
    )  # fmt: skip
    trusted = home / "trust.d"
    trusted.mkdir(mode=0o700)
    for each in Path(made, "trust.d").iterdir():
        (trusted / each.name).write_bytes(each.read_bytes())
        (trusted / each.name).chmod(0o600)
    built = Builder(where, lambda _: None).renew("test", Images(), os.getuid())
    (trusted / "renewed.pub").write_bytes(Path(f"{where.key}.pub").read_bytes())
    (trusted / "test.pub").unlink()
    return GuestImage("test", Path(built.path), Path(where.store), trusted, built.manifest)


def see_kvm(home: Path, runtime: Path, *, patience_s: float = 120) -> str:
    """Have a user's program know whether KVM boots the image here, after more patience than it has; return why not.

    Where processors are emulated a boot takes longer than any that a program should wait for.
    """
    (version,) = (home / STORE / "test").iterdir()
    manifest = msgspec.json.decode((version / "manifest.json").read_bytes(), type=Manifest)
    guest = Guest(f"{version}/vmlinux", f"{version}/initramfs.cpio", manifest.digest())
    kept = runtime / "cloister"
    kept.mkdir(mode=0o700, exist_ok=True)
    with mock.patch.object(vm_probe, "hear", partial(vm_probe.hear, first_word_s=patience_s, bound_s=patience_s)):
        return accelerator(find_qemu(), guest, str(kept)).why
