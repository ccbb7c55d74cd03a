"""Run something under real bubblewrap with one of our filters, as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

import cloister

BWRAP = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
ORDINARY = 4242


def user():
    """Return the arguments of subprocess.run that drop root, where we are root."""
    return {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if os.getuid() == 0 else {}


def memory_file(content):
    """Return a descriptor that reads as `content` from its beginning."""
    descriptor = os.memfd_create("test", 0)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def run(argv, *, program=None, stdin="", files=None):
    """Run `argv` in the sandbox, with the filter `program` if given, and `files` (name to bytes) below /tmp."""
    command, descriptors = [*BWRAP, "--tmpfs", "/tmp"], []
    for name, content in (files or {}).items():
        descriptors.append(memory_file(content))
        command += ["--perms", "0755", "--file", str(descriptors[-1]), f"/tmp/{name}"]
    if program is not None:
        descriptors.append(memory_file(program))
        command += ["--seccomp", str(descriptors[-1])]
    try:
        return subprocess.run(
            [*command, "--chdir", "/tmp", "--", *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            pass_fds=descriptors,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8"},
            **user(),
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def outside(code):
    """Run Python `code` as the ordinary user without any sandbox, with our package importable.

    The system's Python serves where ours lies in a home the user cannot enter.
    """
    paths = [Path(module.__file__).parents[1] for module in (cloister, msgspec)]
    same = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=False,
    )
    system = same.stdout.split() == [str(part) for part in sys.version_info[:2]]
    return subprocess.run(
        ["/usr/bin/python3" if system else sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        **user(),
    )
