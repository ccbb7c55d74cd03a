"""Disks of guests without guests: made by the product, changed with debugfs, checked by e2fsck."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cloister.host.e2fs import Filters, Tools
from cloister.host.ext4 import tree
from cloister.host.ext4.image import Image
from cloister.host.vm_workspace import WorkspaceDisk, make_workspace_disk
from cloister.plan.workspace import Mount, Node, Placeholder, WorkspaceLayout
from cloister.runs.disk_tools import disk_tools

ROOM = 32 << 20
ENVIRONMENT = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}


def tools() -> Tools:
    """The programs of this machine."""
    return disk_tools("/usr/bin/bwrap")


def tools_with(**filters: bytes) -> Tools:
    """The programs of this machine, with other filters."""
    found = tools()
    parts = {name: getattr(found, name) for name in Tools.__struct_fields__}
    own = {"tool": found.filters.tool, "reader": found.filters.reader}
    return Tools(**parts | {"filters": Filters(**own | filters)})


def layout(root: Path, *, mounts: Iterable[Mount] = (), placeholders: Iterable[Placeholder] = ()) -> WorkspaceLayout:
    """A workspace at `root` with these mounts besides its own."""
    return WorkspaceLayout(str(root), (Mount("bind", str(root), str(root)), *mounts), tuple(placeholders))


def mask(path: Path) -> Mount:
    """A hidden path."""
    status = path.lstat()
    return Mount("mask", str(path), node=Node("directory" if path.is_dir() else "file", status.st_dev, status.st_ino))


def fill(root: Path, target: Path, shown: WorkspaceLayout | None = None) -> WorkspaceDisk:
    """Make the disk of a workspace, owned by 1000:1000 in the guest."""
    return make_workspace_disk(tools(), shown or layout(root), str(target), room_bytes=ROOM, uid=1000, gid=1000)


def check(image: Path) -> None:
    """Fail unless e2fsck finds nothing at all."""
    done = subprocess.run(["e2fsck", "-fn", image], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def debugfs(image: Path, *commands: str, write: bool = True) -> str:
    """Do to an image what a guest would; return what debugfs says."""
    script = "".join(f"{command}\n" for command in commands)
    words = ["debugfs", *(["-w"] if write else []), "-f", "-", str(image)]
    done = subprocess.run(words, env=ENVIRONMENT, input=script, capture_output=True, text=True, check=True)
    assert "not found" not in done.stderr, done.stderr
    return done.stdout


def write(image: Path, name: str, content: bytes, *, scratch: Path) -> None:
    """Put a new file into an image, in place of what is there."""
    source = scratch / "content"
    source.write_bytes(content)
    place, _, last = name.rpartition("/")
    if name.encode()[1:] in seen(image):
        debugfs(image, f'rm "{name}"')
    debugfs(image, f'cd "{place or "/"}"', f'write "{source}" "{last}"', f'sif "{last}" mode 0100644')


def seen(image: Path) -> dict[bytes, object]:
    """What the reader finds: directories as None, links as their target, files as their content."""
    found: dict[bytes, object] = {}
    with Image(str(image)) as opened:
        for path, inode in tree.walk(opened):
            if inode.is_directory:
                found[path] = None
            elif inode.is_link:
                found[path] = ("link", tree.link(opened, inode))
            else:
                data = bytearray(inode.size)
                for at, part in tree.contents(opened, inode):
                    data[at : at + len(part)] = part
                found[path] = bytes(data)
    return found


def on_host(root: Path) -> dict[bytes, object]:
    """What is really there, in the same form; what is neither file, directory nor link is left out."""
    found: dict[bytes, object] = {}
    top = os.fsencode(root)
    for place, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            key = path[len(top) + 1 :]
            if stat.S_ISLNK(mode):
                found[key] = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                found[key] = None
            elif stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    found[key] = file.read()
    return found
