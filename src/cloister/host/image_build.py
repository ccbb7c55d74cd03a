"""Builds an image: root, kernel, initramfs, lock, list of contents, manifest. Nothing is signed or stored here.

Everything is made in directories that the caller gives and clears away. The same recipe and the same packages give
the same bytes, on whatever machine and for whatever user (`image_root` says how).

    make_tree ─▶ what Debian's packages are ─▶ add_agents ─▶ finish_tree ─▶ make_root ─▶ kernel, initramfs, manifest
    (in jails)   (read before others' scripts)  (in jails)    (in a jail)    (ours)       (ours)
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import msgspec

from cloister.errors import DeniedError, StepError, UnsupportedError
from cloister.host import image_made, image_store
from cloister.host.image_agents import add_agents
from cloister.host.image_jail import Say, run, tool
from cloister.host.image_packages import KeptPackages, lent
from cloister.host.image_place import Place
from cloister.host.image_root import Sources, finish_tree, machine, make_root, make_tree
from cloister.host.vm_link import PROTOCOL
from cloister.images.initramfs import guest_entries, modules_of, newc
from cloister.images.kernel import elf_of
from cloister.images.lock import Lock, Package, decode, differences, from_debian, kernel_package
from cloister.images.manifest import Manifest, Part, Verity
from cloister.images.modules import needed_modules
from cloister.images.recipe import Recipe
from cloister.images.sbom import spdx

CMDLINE = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests random.trust_cpu=on cloister.verity={verity} {clock}"
_SHOWN_DIFFERENCES = 20


class Order(NamedTuple):
    """What to build."""

    version: int
    shim: str
    """Path of our static program, PID 1 of the guest."""
    recipe: Recipe
    locked: Lock | None = None
    """What the packages must be."""
    npm_lock: str = ""
    """Text of the recipe's package-lock.json."""
    kept: KeptPackages | None = None
    """Where packages are kept, and a lock's come from."""


def build(order: Order, place: Place, made: str, come_from: Sources, say: Say) -> Manifest:
    """Make the files of an image in `made`; return its manifest. Other things are there too afterwards.

    Args:
        order: what to build.
        place: where its programs work.
        made: a directory that they do not see.
        come_from: where packages come from.
        say: told what is being done.

    Raises:
        StepError: `image-build`: a package could not be fetched or configured.
        DeniedError: `image-lock`: the packages are not those of the lock.
        UnsupportedError: a tool is missing, or the kernel has not what a guest needs.
        OSError: something cannot be written.
    """
    recipe = order.recipe
    if order.locked is not None:
        _refuse_suite(order.locked, recipe)
        if order.kept is not None:
            come_from = lent(order.kept, order.locked, place, come_from, say)
    make_tree(recipe, place, come_from, say)
    # Before scripts of other packages could change what is told of them.
    packages = _of_debian(recipe, place)
    if order.kept is not None:
        order.kept.keep(packages, place.work)
    packages += add_agents(recipe, place, order.npm_lock, say)
    lock = Lock(name=recipe.name, suite=recipe.suite, packages=tuple(sorted(packages)), tools=_tools())
    finish_tree(place)
    if order.locked is not None and (wrong := differences(lock, order.locked)):
        shown = "; ".join(wrong[:_SHOWN_DIFFERENCES])
        raise DeniedError("image-lock", f"the packages are not those of the lock: {shown}",
                          remedy="build without --locked, and look at what changed")  # fmt: skip
    verity = make_root(recipe, place, made, say)
    say("taking kernel and modules")
    release, kernel, modules = _kernel(recipe, place)
    initramfs = newc(guest_entries(Path(order.shim).read_bytes(), needed_modules(modules)))
    parts = {image_store.KERNEL: elf_of(kernel), image_store.INITRAMFS: initramfs}
    return _finish(order, made, lock, verity, release, parts)


def renew(version: int, shim: str, old: Manifest, path: str, work: str) -> Manifest:
    """Make a version with root, kernel and modules of an older one, and the program of this Cloister as its PID 1.

    Args:
        version: the new one's.
        shim: path of our static program.
        old: the manifest of the older version, which was verified.
        path: its directory.
        work: where the files are made.

    Raises:
        OSError: something cannot be read or written.
        ValueError: its initramfs is none of ours.
    """
    initramfs = Path(path, image_store.INITRAMFS).read_bytes()
    if hashlib.sha256(initramfs).hexdigest() != old.initramfs.sha256:
        raise ValueError("its initramfs is not what was signed")
    for name in (image_store.ROOT, image_store.KERNEL, image_store.LOCK):
        _share(f"{path}/{name}", f"{work}/{name}")
    made = newc(guest_entries(Path(shim).read_bytes(), modules_of(initramfs)))
    part = _write(f"{work}/{image_store.INITRAMFS}", made)
    manifest = msgspec.structs.replace(old, version=version, initramfs=part, protocol=PROTOCOL, cmdline=CMDLINE)
    lock = decode(Path(work, image_store.LOCK).read_bytes())
    _write(f"{work}/{image_store.SBOM}", spdx(lock, manifest))
    _write(f"{work}/{image_store.MANIFEST}", manifest.canonical())
    return manifest


def _share(old: str, new: str) -> None:
    """Give an immutable file of this user's store a second name; copy one of another's, or on another file system.

    A second name is the same file: modes that are set on one hold for the other.
    """
    info = os.lstat(old)
    if info.st_uid == os.getuid() and stat.S_IMODE(info.st_mode) == image_store.FILE_MODE:
        with contextlib.suppress(OSError):
            os.link(old, new)
            return
    shutil.copyfile(old, new)


def _finish(  # noqa: PLR0913  # the parts of an image
    order: Order, made: str, lock: Lock, verity: Verity, release: str, parts: dict[str, bytes]
) -> Manifest:
    digests = {name: _write(f"{made}/{name}", data) for name, data in parts.items()}
    manifest = Manifest(
        name=order.recipe.name, version=order.version, arch=machine(), created=order.recipe.epoch,
        kernel=digests[image_store.KERNEL], kernel_release=release, initramfs=digests[image_store.INITRAMFS],
        root=verity, cmdline=CMDLINE, protocol=PROTOCOL, recipe=order.recipe.digest(), packages=lock.digest(),
    )  # fmt: skip
    _write(f"{made}/{image_store.LOCK}", lock.encoded())
    _write(f"{made}/{image_store.SBOM}", spdx(lock, manifest))
    _write(f"{made}/{image_store.MANIFEST}", manifest.canonical())
    return manifest


def _of_debian(recipe: Recipe, place: Place) -> list[Package]:
    """Return what was installed of Debian's, by what the build left beside the tree, and take its kernel from there.

    Raises:
        StepError: `image-build`: it left something else.
    """

    def text(name: str) -> str:
        return image_made.content(place.work, name, image_store.MAX_SMALL).decode("utf-8", "replace")

    try:
        packages = from_debian(text("packages"), text("records"))
        if not recipe.kernel:
            packages.append(kernel_package(text("kernel-record")))
    except ValueError as error:
        raise StepError("image-build", f"what was installed is not known: {error}") from error
    if not recipe.kernel:
        name = next(iter(image_made.names(place.work, "kernel")), "")
        if not name or image_made.copy(place.work, f"kernel/{name}", _archive(place)) != packages[-1].sha256:
            raise StepError("image-build", "there is no kernel package", remedy="apt-get update")
    return packages


def _archive(place: Place) -> str:
    return f"{place.given}/kernel.deb"


def _refuse_suite(locked: Lock, recipe: Recipe) -> None:
    if locked.suite != recipe.suite:
        message = f"the lock is of {locked.suite}, and the recipe is for {recipe.suite}"
        raise DeniedError("image-lock", message, remedy="build without --locked")


def _tools() -> dict[str, str]:
    """Return the version of mkfs.erofs: another one may write other bits."""
    done = subprocess.run([tool("mkfs.erofs", "erofs-utils"), "--help"], capture_output=True, text=True, check=False)
    told = subprocess.run([tool("mkfs.erofs", "erofs-utils"), "-V"], capture_output=True, text=True, check=False)
    found = re.search(r"erofs(?:-utils\))? (\d[\w.+-]*)", f"{told.stdout}{told.stderr}{done.stdout}{done.stderr}")
    return {"mkfs.erofs": found[1] if found else "unknown"}


def _kernel(recipe: Recipe, place: Place) -> tuple[str, bytes, Path]:
    """Return release, file and directory of modules of the recipe's kernel.

    Debian's is unpacked where nothing else was: scripts that ran before could have put anything in its way.
    """
    if recipe.kernel:
        modules = Path(recipe.modules)
        return modules.name, Path(recipe.kernel).read_bytes(), modules
    archive = _archive(place)
    fresh = place.fresh("unpacked")
    run(["dpkg-deb", "--extract", archive, f"{fresh}/kernel"], fresh, network=False, read=[archive])
    found = glob.glob(f"{glob.escape(fresh)}/kernel/boot/vmlinuz-*")
    if len(found) != 1:
        raise UnsupportedError("kernel-unusable", "the kernel package holds no kernel", where=archive)
    release = os.path.basename(found[0]).removeprefix("vmlinuz-")
    places = [Path(fresh, "kernel", top, "modules", release) for top in ("lib", "usr/lib")]
    return release, Path(found[0]).read_bytes(), next((place for place in places if place.is_dir()), places[0])


def _write(path: str, data: bytes) -> Part:
    with open(path, "xb") as file:
        file.write(data)
    return Part(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
