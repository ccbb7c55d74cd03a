"""The packages of Debian that images were built from, kept: Debian's archive forgets them, and a lock shall not.

    STORE/.packages/SHA256.deb    0400, of one's own

A file's name says what it holds, and whoever takes one reads it against that: what was changed is not there. They are
written by every build, lent to one with `--locked`, and go with the last image whose lock names them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from cloister.errors import StepError
from cloister.host import image_made, private_files
from cloister.host.image_jail import Say, run
from cloister.host.image_place import Place
from cloister.host.image_root import Sources
from cloister.images import packages
from cloister.images.lock import Lock, Package

_FETCHED = ("debs", "kernel")
"""Where a build leaves the files that it was made from, below its directory of work."""
_FRESH = ".new"
_YOUNG_S = 3600.0
"""What a build has just written or used is its own: its image may not be in the store yet."""
_MAX_INDEX = 64 << 20

# Runs in the jail, with the archive's directory as its argument: control files are what a package's maker wrote.
_LIST = r"""
set -eu
index=$PWD/Packages
cd "$1"
for one in *.deb; do
    dpkg-deb --field "$one"
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$one" "$(stat -c %s "$one")" "${one%.deb}"
done >"$index"
"""


class KeptPackages:
    """A directory of packages."""

    def __init__(self, directory: str) -> None:
        """Name it; it is made by the first build."""
        self.directory = directory

    def keep(self, used: Iterable[Package], work: str) -> None:
        """Keep the files of packages that a build has used, and nothing else.

        Raises:
            OSError: there is no room.
        """
        wanted = packages.of_debian(used)
        with private_files.locked(self.directory):
            self._clear()
            for path in (f"{name}/{one}" for name in _FETCHED for one in image_made.names(work, name)):
                with contextlib.suppress(StepError):  # not what a build leaves there: nothing to keep
                    digest = image_made.digest(work, path)
                    if digest in wanted:
                        self._take(work, path, digest)

    def lend(self, lock: Lock, directory: str) -> list[Package]:
        """Copy the lock's packages into a directory that is there; return those that are not kept.

        One whose bytes have changed is not kept any more, and is removed.

        Raises:
            OSError: it cannot be written there.
        """
        missing = []
        for digest, package in packages.of_debian(lock.packages).items():
            name = f"{digest}.deb"
            with contextlib.suppress(StepError):
                if image_made.copy(self.directory, name, f"{directory}/{name}") == digest:
                    os.utime(f"{self.directory}/{name}")
                    continue
            missing.append(package)
            for path in (f"{directory}/{name}", f"{self.directory}/{name}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return missing

    def count(self, lock: Lock) -> tuple[int, int]:
        """Return how many of the lock's packages of Debian are here, unread, and how many there are."""
        wanted = packages.of_debian(lock.packages)
        return sum(os.path.lexists(f"{self.directory}/{digest}.deb") for digest in wanted), len(wanted)

    def collect(self, locks: Iterable[Lock], *, dry_run: bool) -> list[str]:
        """Remove what none of these locks names and no build has just used; return the paths.

        Raises:
            OSError: one cannot be removed.
        """
        if not os.path.isdir(self.directory):
            return []
        wanted = {digest for lock in locks for digest in packages.of_debian(lock.packages)}
        gone = []
        with private_files.locked(self.directory):
            if not dry_run:
                self._clear()
            for name in sorted(os.listdir(self.directory)):
                path = f"{self.directory}/{name}"
                young = time.time() - os.lstat(path).st_mtime < _YOUNG_S
                if name.endswith(".deb") and name.removesuffix(".deb") not in wanted and not young:
                    gone.append(path)
                    if not dry_run:
                        os.unlink(path)
        return gone

    def _take(self, work: str, path: str, digest: str) -> None:
        target, fresh = f"{self.directory}/{digest}.deb", f"{self.directory}/{_FRESH}"
        if os.path.lexists(target):
            os.utime(target, follow_symlinks=False)
        elif image_made.copy(work, path, fresh) == digest:
            os.chmod(fresh, 0o400)
            os.rename(fresh, target)

    def _clear(self) -> None:
        """Remove what a killed build left half written; called under the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{_FRESH}")


def lent(kept: KeptPackages, lock: Lock, place: Place, come_from: Sources, say: Say) -> Sources:
    """Return where the packages of a lock come from: what is kept, and Debian's archive for the rest of them.

    Where all are kept nothing is fetched, and there is no network.

    Raises:
        StepError: `image-build`: what is kept are no packages.
        OSError: it cannot be written.
    """
    archive, pins = f"{place.given}/archive", f"{place.given}/preferences"
    os.mkdir(archive)
    missing = kept.lend(lock, archive)
    count = len(packages.of_debian(lock.packages)) - len(missing)
    say(f"{count} of the lock's packages are kept here" + (f", {len(missing)} are to be fetched" if missing else ""))
    lines: tuple[str, ...] = ()
    if count:
        fresh = place.fresh("index")
        run(["sh", "-c", _LIST, "list", archive], fresh, network=False, read=[archive])
        index = image_made.content(fresh, packages.INDEX, _MAX_INDEX)
        Path(archive, packages.INDEX).write_bytes(index)
        Path(archive, packages.RELEASE).write_bytes(packages.release(lock.suite, index))
        lines = (packages.source(archive),)
    Path(pins).write_bytes(packages.preferences(lock))
    return Sources(
        lines + (come_from.lines if missing else ()),
        network=bool(missing), kernel=packages.kernel_of(lock) or come_from.kernel, preferences=pins,
    )  # fmt: skip
