"""What is measured inside of a machine of the tests: `python inside.py NAME <JSON`, as its root. Prints JSON.

Times are taken here, beside the commands, so that getting into the machine is not in them. What is measured and
what it means is said by `starts.py`, `load.py`. Standard library alone: it runs with the installed Cloister's Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATH = "/opt/cloister/bin:/usr/bin:/bin"
PROJECT = "src/project"
_CREATE, _DELETE, _MOVED_TO = 0x100, 0x200, 0x80
_EVENT = struct.Struct("iIII")
_QUIET_S = 0.4


def as_user(user: str) -> dict[str, Any]:
    """Return how subprocess starts a command as a user, in the project, without a terminal."""
    entry = pwd.getpwnam(user)
    environment = {"HOME": entry.pw_dir, "USER": user, "LOGNAME": user, "PATH": PATH, "LANG": "C.UTF-8"}
    runtime = f"/run/user/{entry.pw_uid}"
    if os.path.isdir(runtime):
        environment["XDG_RUNTIME_DIR"] = runtime
    identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if entry.pw_uid else {}
    folder = f"{entry.pw_dir}/{PROJECT}" if entry.pw_uid else "/"
    return {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **identity}


def clocked(user: str, argv: list[str], folder: str = "") -> float:
    """Run a command as a user; return milliseconds.

    Raises:
        CalledProcessError: it failed, and a fast failure is no result.
    """
    options = as_user(user)
    options["cwd"] = folder or options["cwd"]
    argv = [shutil.which(argv[0], path=PATH) or argv[0], *argv[1:]]
    began = time.perf_counter()
    done = subprocess.run(argv, check=False, stderr=subprocess.PIPE, text=True, **options)
    taken = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{argv[:6]} ended with {done.returncode}: {done.stderr}")
    return taken * 1000


def rounds(asked: dict[str, Any]) -> dict[str, list[float]]:
    """Run every case once per round; the first rounds do not count."""
    samples: dict[str, list[float]] = {case["name"]: [] for case in asked["cases"]}
    for number in range(asked["rounds"] + asked["warm_up"]):
        for case in asked["cases"]:
            taken = clocked(case["user"], case["argv"], case.get("folder", ""))
            if number >= asked["warm_up"]:
                samples[case["name"]].append(taken)
            time.sleep(asked.get("pause_s", 0))
    return samples


class Watch:
    """Names that come and go in directories, each with its moment: seen from outside, at no cost for who makes them."""

    def __init__(self, folders: list[str]) -> None:
        """Begin."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: dict[int, str] = {}
        for folder in folders:
            mask = _CREATE | _DELETE | _MOVED_TO
            number = self._libc.inotify_add_watch(self._descriptor, folder.encode(), ctypes.c_uint32(mask))
            if number < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
            self._folders[number] = folder

    def during(self, process: subprocess.Popen[Any]) -> list[tuple[float, str, str, str]]:
        """Return moment, folder, what happened, and name, until a process has ended and for a moment after."""
        import select

        seen = []
        until = 0.0
        while not until or time.perf_counter() < until:
            if not until and process.poll() is not None:
                seen.append((time.perf_counter(), "", "end", ""))
                until = time.perf_counter() + _QUIET_S
            select.select([self._descriptor], [], [], 0.0005)
            now = time.perf_counter()
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._descriptor, 1 << 16)
                offset = 0
                while offset < len(data):
                    number, mask, _, length = _EVENT.unpack_from(data, offset)
                    name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0").decode()
                    kind = "delete" if mask & _DELETE else "make"
                    seen.append((now, self._folders.get(number, ""), kind, name))
                    offset += _EVENT.size + length
        return seen

    def close(self) -> None:
        """End."""
        os.close(self._descriptor)


def stages(asked: dict[str, Any]) -> dict[str, list[float]]:
    """Return, for each stage of a run, the milliseconds at which it was reached in each round."""
    found: dict[str, list[float]] = {stage["name"]: [] for stage in asked["stages"]}
    for number in range(asked["rounds"] + 1):
        watch = Watch(asked["folders"])
        options = as_user("alice")
        argv = [shutil.which(asked["argv"][0], path=PATH) or "", *asked["argv"][1:]]
        began = time.perf_counter()
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL, **options) as process:
            seen = watch.during(process)
        watch.close()
        for stage in asked["stages"] if number else ():
            hits = [
                moment for moment, folder, kind, name in seen
                if folder == stage["folder"] and kind == stage["kind"] and name.endswith(stage["ending"])
            ]  # fmt: skip
            if len(hits) > stage.get("nth", 0):
                found[stage["name"]].append((hits[stage.get("nth", 0)] - began) * 1000)
    return found


def sizes(_: dict[str, Any]) -> dict[str, float]:
    """Return the proportional set size of all processes in MiB: of each of our daemons, and of all together."""
    told = {"all": 0.0}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended; one that is hidden is an error
            words = (folder / "cmdline").read_bytes().split(b"\0")
            rollup = (folder / "smaps_rollup").read_text()
            taken = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
            told["all"] += taken
            for name in (b"hostd", b"proxyd", b"broker"):
                if b"cloister.services." + name in words:
                    told[name.decode()] = told.get(name.decode(), 0.0) + taken
    return told


def crowd(asked: dict[str, Any]) -> dict[str, Any]:
    """Start many commands of alice's at once; return seconds until all have ended, and how they ended."""
    argv = [shutil.which(asked["argv"][0], path=PATH) or "", *asked["argv"][1:]]
    options = as_user("alice")
    began = time.perf_counter()
    many = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **options) for _ in range(asked["count"])]
    said = [one.communicate()[1] for one in many]
    taken = time.perf_counter() - began
    failed = [text.strip() for one, text in zip(many, said, strict=True) if one.returncode]
    return {"seconds": taken, "failed": failed}


def main() -> int:
    """Do what is asked."""
    acts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "rounds": rounds, "stages": stages, "sizes": sizes, "crowd": crowd,
    }  # fmt: skip
    print(json.dumps(acts[sys.argv[1]](json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
