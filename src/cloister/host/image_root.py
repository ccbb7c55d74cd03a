"""A guest's root file system: Debian's packages into a directory, that into an erofs image with its hash tree.

All of it happens in the jail of `image_jail`: scripts of packages see the tree and nothing else of the host, and what
walks the tree afterwards does so in there too. Only the resulting files are looked at from outside. The machine's own
mirror is used and written down nowhere.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from cloister.errors import UnsupportedError
from cloister.host.image_jail import Say, run, tool
from cloister.host.image_made import opened
from cloister.host.image_place import Place
from cloister.host.image_store import ROOT
from cloister.images.manifest import Verity
from cloister.images.recipe import DEBIAN_KERNEL, Recipe
from cloister.images.verity import BLOCK, build, superblock

_LEAN = tuple(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "lintian"))
_FOR_NODE = ("libatomic1", "libstdc++6")
"""What the node of PyPI's wheel is linked with."""
_ARCHIVES = ("", "-security")
_PIECE = 1 << 20

# Runs in the jail, with the tree as its argument, while apt still knows where the packages came from.
_CUSTOMIZE = r"""#!/bin/sh
set -eu
root=$1
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
chroot "$root" dpkg-query --show --showformat '${Package}:${Architecture}=${Version}\n' >packages
xargs apt-cache show <packages >records
if [ -n "$KERNEL" ]; then
    package=$(apt-cache depends "$KERNEL" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    package=${package:-$KERNEL}
    mkdir kernel
    (cd kernel && apt-get download -qq "$package")
    apt-cache show --no-all-versions "$package" | sed '/^$/q' >kernel-record
fi
mkdir debs
find "$root/var/cache/apt/archives" -maxdepth 1 -type f -name '*.deb' -exec mv -t debs {} +
[ ! -e "$GIVEN/files.tar" ] || tar -C "$root" --keep-directory-symlink --no-overwrite-dir -xf "$GIVEN/files.tar"
"""

# Runs after everything else. No file of an image raises anybody's rights, and none names the machine that built it.
_FINISH = r"""
set -eu
root=$1
find "$root" -xdev -type f -perm /6000 -exec chmod ug-s {} +
find "$root" -xdev -type d -perm /2000 -exec chmod g-s {} +
rm -rf "$root"/var/lib/apt "$root"/var/cache/* "$root"/var/log/* "$root"/var/lib/dpkg/*-old "$root"/etc/apt \
    "$root"/tmp/* "$root"/run/* "$root"/dev/* "$root"/boot/* "$root"/root/.[!.]* "$root"/etc/*- "$root"/etc/.pwd.lock
rm -f "$root"/etc/hostname "$root"/etc/resolv.conf "$root"/etc/machine-id
for name in hostname resolv.conf machine-id hosts; do : >"$root/etc/$name"; done
mkdir -p "$root/workspace" "$root/run" "$root/tmp" "$root/home" "$root/mnt"
chmod 755 "$root" "$root/workspace"
chmod 700 "$root/root"
find "$root" -xdev ! -type f ! -type d ! -type l -delete
"""


class Sources(NamedTuple):
    """Where packages come from: lines of sources.list(5). Never written into anything that is kept."""

    lines: tuple[str, ...]
    network: bool = True
    kernel: str = DEBIAN_KERNEL
    """The kernel's package, or one that depends on it."""
    preferences: str = ""
    """A file of apt_preferences(5), which says what versions count."""


def sources(suite: str) -> Sources:
    """Return the machine's own Debian mirror for a suite and its security updates.

    None where the machine is not Debian's: mmdebstrap then takes those that it knows.
    """
    found: dict[str, str] = {}
    try:
        told = subprocess.run(
            [tool("apt-get", "apt"), "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)",
             "Created-By: Packages"],
            capture_output=True, text=True, check=False, timeout=60,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnsupportedError):
        told = ""
    for line in told.splitlines():
        origin, _, rest = line.partition(" ")
        codename, _, uri = rest.partition(" ")
        if origin == "Debian" and uri:
            found.setdefault("-security" if codename.endswith("-security") else "", uri)
    return Sources(tuple(f"deb {found[kind]} {suite}{kind} main" for kind in _ARCHIVES if kind in found))


def make_tree(recipe: Recipe, place: Place, come_from: Sources, say: Say) -> None:
    """Unpack and configure the recipe's packages in the place's `work`/tree, and note what they are beside it.

    Leaves `packages`, `records`, their files in `debs` and, for Debian's kernel, `kernel/*.deb` and `kernel-record`.

    Raises:
        StepError: `image-build`: a package could not be fetched or configured; the last lines are told.
        UnsupportedError: a tool is missing.
    """
    work, given = place.work, place.given
    if recipe.files:
        _write(f"{given}/files.tar", _tar(recipe))
    _write(f"{given}/customize", _CUSTOMIZE.encode())
    os.chmod(f"{given}/customize", 0o755)  # noqa: S103  # in a directory that is closed
    argv = [
        tool("mmdebstrap", "mmdebstrap"), "--mode=root", "--variant=essential", "--format=directory",
        "--skip=chroot/mount/dev", "--skip=chroot/mount/sys", "--skip=output/dev", "--skip=essential/unlink",
        '--extract-hook=mount --rbind /dev "$1/dev"',
        '--aptopt=APT::Sandbox::User "root"', '--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Retries "3"',
        *_LEAN, f"--customize-hook={given}/customize",
    ]  # fmt: skip
    packages = [*recipe.packages, *(_FOR_NODE if recipe.node else ())]
    if packages:
        argv.append(f"--include={','.join(packages)}")
    if come_from.preferences:
        argv.append(f'--setup-hook=install -D -m 644 "{come_from.preferences}" "$1/etc/apt/preferences.d/lock"')
    argv += [recipe.suite, f"{work}/tree", *come_from.lines]
    kernel = "" if recipe.kernel else come_from.kernel
    environment = {"SOURCE_DATE_EPOCH": str(recipe.epoch), "KERNEL": kernel, "GIVEN": given}
    run(argv, work, network=come_from.network, environment=environment, say=say, read=[given, *_keys()])


def finish_tree(place: Place) -> None:
    """Take out of the tree what nobody needs, what raises rights, and what names the machine that builds.

    Raises:
        StepError: `image-build`.
    """
    run(["sh", "-c", _FINISH, "finish", f"{place.work}/tree"], place.work, network=False)


def make_root(recipe: Recipe, place: Place, made: str, say: Say) -> Verity:
    """Write `made`/root.img, the tree as erofs with its hash tree behind it; return the table.

    Raises:
        StepError: `image-build`.
        UnsupportedError: a tool is missing.
        OSError: it cannot be written.
    """
    say("writing the file system")
    fresh, tree = place.fresh("root"), f"{place.work}/tree"
    name = uuid.UUID(bytes=recipe.derived("uuid")[:16], version=4)
    run(
        [tool("mkfs.erofs", "erofs-utils"), "-zlz4hc", "--all-root", "-x-1", f"-T{recipe.epoch}", f"-U{name}",
         "--quiet", f"{fresh}/{ROOT}", tree],
        fresh, network=False, read=[tree],
    )  # fmt: skip
    say("hashing it")
    salt = recipe.derived("salt")
    with opened(fresh, ROOT) as source, open(f"{made}/{ROOT}", "xb+") as file:
        shutil.copyfileobj(source, file, _PIECE)
        os.unlink(f"{fresh}/{ROOT}")  # it may be large
        file.write(bytes(-file.tell() % BLOCK))
        data_blocks = file.tell() // BLOCK
        file.seek(0)
        hashes = build(_blocks(file, data_blocks), salt)
        file.seek(data_blocks * BLOCK)
        file.write(superblock(data_blocks, salt, hashes.root))
        file.write(hashes.blocks)
        total = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return Verity(
        data_blocks=data_blocks, hash_start=data_blocks + 1, root_hash=hashes.root.hex(), salt=salt.hex(), size=total
    )


def _keys() -> list[str]:
    """Return the files outside /usr that apt's signature checks need."""
    return [path for path in ("/var/lib/dpkg/arch",) if os.path.exists(path)]


def _blocks(file: io.BufferedRandom, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield file.read(BLOCK)


def _tar(recipe: Recipe) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in recipe.files:
            info = tarfile.TarInfo(file.path.lstrip("/"))
            data = file.content.encode()
            info.size, info.mtime, info.mode = len(data), recipe.epoch, 0o755 if file.executable else 0o644
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def machine() -> str:
    """Return the architecture that images are built for: this machine's."""
    return platform.machine()
