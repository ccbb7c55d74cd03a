"""First processes of guests that leave out a lock on purpose, for tests that the battery finds it out.

Each is the shipped shim's own source with a few lines changed, compiled into a folder of the tests: so the shim itself
has no switch that weakens it. A change whose line is no longer there fails, instead of leaving a guest strong.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from shim_build import SOURCES

FLAGS = ("-std=gnu11", "-O1", "-fPIE", "-w")


class Change(NamedTuple):
    """One text of one file, and what stands there instead."""

    file: str
    old: str
    new: str


def _row(name: str) -> Change:
    """Return the change that leaves out a row of the kernel's locks."""
    return Change("guest_init.c", f'    {{"kernel/{name}", "1"}},', "")


_DEVICES = """
    {
        /* All devices of the machine, for everybody. */
        static const char *const places[] = {"", "/mapper"};
        char from[600], to[600];
        struct stat about;
        (void)!mkdir("/dev/mapper", 0755);
        for (int i = 0; i < 2; i++) {
            snprintf(from, sizeof from, GUEST_DEVICES "%s", places[i]);
            DIR *all = opendir(from);
            for (struct dirent *entry; all && (entry = readdir(all));) {
                snprintf(from, sizeof from, GUEST_DEVICES "%s/%s", places[i], entry->d_name);
                snprintf(to, sizeof to, "/dev%s/%s", places[i], entry->d_name);
                if (stat(from, &about) < 0 || S_ISDIR(about.st_mode) || mknod(to, about.st_mode, about.st_rdev) < 0)
                    continue;
                chmod(to, 0666);
            }
        }
    }
    if (chown(GUEST_BOX, 0, fields.gid) < 0)"""

_BIND = "return mkdir(to, 0755) < 0 ? -1 : mount(from, to, NULL, MS_BIND, NULL);"
_OVERLAY = """{
        char upper[600], work[600], options[2000];
        snprintf(upper, sizeof upper, "/layers/upper-%s", name);
        snprintf(work, sizeof work, "/layers/work-%s", name);
        snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s", from, upper, work);
        if (mkdir("/layers", 0755) == 0)
            (void)!mount("tmpfs", "/layers", "tmpfs", 0, "mode=755");
        return mkdir(to, 0755) < 0 || mkdir(upper, 0777) < 0 || chmod(upper, 0777) < 0 || mkdir(work, 0700) < 0
                   ? -1 : mount("overlay", to, "overlay", 0, options);
    }"""

_ROOT = """    if (setsid() < 0 || setgroups(0, NULL) < 0 || setresgid(fields.gid, fields.gid, fields.gid) < 0 ||
        setresuid(fields.uid, fields.uid, fields.uid) < 0 || drop_capabilities() < 0 ||"""

LOCKS: dict[str, tuple[Change, ...]] = {
    "modules": (_row("modules_disabled"),),
    "kexec": (_row("kexec_load_disabled"),),
    "messages": (_row("dmesg_restrict"),),
    "devices": (
        Change("guest_run.c", "#include <errno.h>", "#include <dirent.h>\n#include <errno.h>"),
        Change("guest_run.c", "\n    if (chown(GUEST_BOX, 0, fields.gid) < 0)", _DEVICES),
    ),
    "root": (Change("guest_root.c", _BIND, _OVERLAY),),
    "tree": (Change("guest_mounts.c", "return wrong ? wrong : seal();", "return wrong;"),),
    "uid": (
        Change("guest_run.c", _ROOT, "    if (setsid() < 0 || drop_capabilities() < 0 ||"),
        Change("probe.c", "return good && bare && getuid() != 0", "return good && bare"),
    ),
    "families": (
        Change("guest_root.c", "    bool found = false;\n", "    bool found = type == 19;\n"),
        Change("filter.c", "    if (!path)\n        return true;", "    return true;"),
        Change("probe.c", "SECCOMP_FILTERED) && good;", "SECCOMP_FILTERED) || good;"),
        Change("probe.c", "good = (options->nested || error == EPERM) && good;", ""),
    ),
}  # fmt: skip
"""What each leaves out: one lock, with the self-probe's look at it where there is one."""

OPEN: tuple[Change, ...] = (
    Change("guest_init.c", "    lock_kernel();\n", ""),
    *LOCKS["devices"],
    *LOCKS["root"],
    *LOCKS["tree"],
    *LOCKS["families"][:2],
    Change("guest_root.c", '{"/sys", 0555, "sysfs", QUIET | MS_RDONLY, NULL}', '{"/sys", 0555, "sysfs", QUIET, NULL}'),
    Change(
        "guest_run.c", "        if (prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0 && errno != EINVAL)\n", "        if (0)\n"
    ),
    Change("guest_run.c", _ROOT, "    if (setsid() < 0 ||"),
    Change("landlock.c", "    int abi = best_abi();\n", "    int abi = best_abi();\n    return true;\n"),
    Change("probe.c", "    return error == 0 && good;\n", "    return true;\n"),
)
"""Nothing holds: the agent is root with every right, and all of the machine is its own."""


class Workshop:
    """A folder of objects: the shim's sources are compiled once, and what a weak one changes once more."""

    def __init__(self, folder: Path) -> None:
        """Use an empty folder."""
        self._folder = folder
        folder.mkdir()
        self._compile(SOURCES.glob("*.c"), folder)

    def make(self, name: str, changes: Iterable[Change]) -> Path:
        """Return a shim with these changes.

        Raises:
            LookupError: a line to change is not there, or not once.
        """
        own = self._folder / name
        own.mkdir()
        texts: dict[str, str] = {}
        for change in changes:
            text = texts.get(change.file) or (SOURCES / change.file).read_text()
            if text.count(change.old) != 1:
                raise LookupError(f"{name}: {change.file} has not exactly one {change.old!r}")
            texts[change.file] = text.replace(change.old, change.new)
        for file, text in texts.items():
            (own / file).write_text(text)
        self._compile(own.glob("*.c"), own)
        objects = {path.name: path for folder in (self._folder, own) for path in folder.glob("*.o")}
        program = own / "cloister-shim"
        self._run("-static-pie", "-s", "-o", str(program), *map(str, objects.values()))
        return program

    def _compile(self, sources: Iterable[Path], into: Path) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [
                pool.submit(self._run, *FLAGS, "-I", str(SOURCES), "-c", "-o", str(into / f"{path.stem}.o"), str(path))
                for path in sources
            ]:
                done.result()

    @staticmethod
    def _run(*words: str) -> None:
        done = subprocess.run([os.environ.get("CC", "cc"), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
