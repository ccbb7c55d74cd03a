"""Learn what a system is like before Cloister is installed, changed or removed there. Reads and asks; changes nothing.

`take_facts` is for the compiler, `look` says what stands at the places of one installation. Accounts are read from
the files, since numbers of ours may not come from anywhere else; users of the policy may come from a directory
service (getpwnam(3)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cloister.errors import StepError
from cloister.host import firewall, programs
from cloister.host.addresses import attached_networks, nameservers
from cloister.host.probe import SHIM, probe
from cloister.plan.firewall import FILE
from cloister.plan.system_diff import Desired, Found, FoundFile, FoundUnit, Made
from cloister.plan.system_facts import KeyFile, SystemFacts
from cloister.plan.unit import SERVICE_PREFIX, UNIT_PREFIX

LISTS = ("/etc/cron.allow", "/etc/cron.deny", "/etc/at.allow", "/etc/at.deny")
_INSTALLATION = (sys.executable, sys.prefix, str(Path(__file__).parent.parent), str(SHIM))
_TIMEOUT_S = 20.0
_MAX_BYTES = 4 << 20
_ENVIRONMENT = {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}


def take_facts(users: Iterable[str] = (), keys: Iterable[str] = (), proxyd: str = "") -> SystemFacts:
    """Return the facts of this host.

    Args:
        users: names in the policy.
        keys: files that the policy names as secrets.
        proxyd: the unit of the system's broker.
    """
    host = probe()
    booted = host.systemd_booted
    return SystemFacts(
        uid=os.geteuid(),
        systemd_booted=booted,
        systemd_version=version(),
        pid1=host.pid1,
        python=sys.executable,
        shim=host.shim.path,
        changeable=changeable(filter(os.path.lexists, _INSTALLATION)),
        nft=host.nft.path,
        attached=attached_networks(),
        resolvers=nameservers(),
        sysusers=users_program(),
        root_links=host.root_links,
        root_directories=host.root_directories,
        users=dict(_known(users)),
        entries=(*_entries("/etc/passwd"), *_entries("/etc/group")),
        subordinate=(*_names("/etc/subuid"), *_names("/etc/subgid")),
        keys={path: fact for path in keys if path.startswith("/") and (fact := _key(path))},
        runs=_runs() if booted else (),
        proxyd_since=_since(proxyd) if booted and proxyd else 0.0,
    )


def changeable(paths: Iterable[str]) -> str:
    """Return the first path that others than root could change, itself or on the way to it, or nothing."""
    owner = os.stat("/").st_uid
    for name in paths:
        path = Path(name)
        real, place = path.resolve(), path.parent.resolve()
        for each in (real, *real.parents, place, *place.parents):
            if not programs.trusted(each, owner):
                return str(each)
    return ""


def look(desired: Desired, made: Made) -> Found:
    """Return what stands at every place that is wanted, or that was made before.

    Raises:
        StepError: `not-ours`: a file there is no text, so it is not ours.
    """
    files = _each("file", (*(file.path for file in desired.files), *made.files))
    directories = _each("directory", (*(one.path for one in desired.directories), *made.directories))
    links = _each("link", (*(link.path for link in desired.links), *made.links))
    filter_there = os.path.lexists(FILE)
    units = dict.fromkeys((*(wanted.unit for wanted in desired.units), *made.units))
    return Found(
        files={path: FoundFile(text=_content(path), **_owner(info)) for path, info in files.items() if info},
        directories={
            path: (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) for path, info in directories.items() if info
        },
        links={path: os.readlink(path) for path, info in links.items() if info},
        odd=tuple(path for found in (files, directories, links) for path, info in found.items() if not info),
        names=tuple(name for name, _ in _entries("/etc/passwd")),
        lines={path: tuple(_text(path).splitlines()) for path in LISTS if os.path.isfile(path)},
        units=unit_states(units),
        firewall=_content(FILE) if filter_there else None,
        firewall_trouble=firewall.trouble() if filter_there else "",
    )


def unit_states(units: Iterable[str]) -> dict[str, FoundUnit]:
    """Return the state of those units that systemd knows."""
    found = {}
    for unit, values in properties(units, ("LoadState", "ActiveState", "UnitFileState")).items():
        active = values.get("ActiveState") in {"active", "activating", "reloading", "deactivating"}
        if values.get("LoadState") in {"loaded", "masked", "bad-setting"} or active:
            found[unit] = FoundUnit(active=active, enabled=values.get("UnitFileState", "").startswith("enabled"))
    return found


def properties(units: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return properties of units, by `systemctl show`; nothing where no manager answers."""
    units = tuple(units)
    if not units:
        return {}
    text = ask(["systemctl", "show", f"--property=Id,{','.join(names)}", "--", *units])
    blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in text.split("\n\n")]
    return dict(zip(units, blocks, strict=False))


def living_units() -> tuple[str, ...]:
    """Return the units of runs and services that live."""
    patterns = (f"{UNIT_PREFIX}*.service", f"{SERVICE_PREFIX}*.service")
    text = ask(["systemctl", "list-units", "--no-legend", "--plain", "--full", "--state=active,activating", *patterns])
    return tuple(line.split()[0] for line in text.splitlines() if line.split())


def ask(words: list[str]) -> str:
    """Return what a program of the system prints; nothing where it is not there or fails."""
    path = programs.find(words[0], "").path
    if not path:
        return ""
    try:
        done = subprocess.run(
            [path, *words[1:]], env=_ENVIRONMENT, cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _runs() -> tuple[tuple[str, str], ...]:
    units = [unit for unit in living_units() if unit.startswith(UNIT_PREFIX)]
    return tuple((unit, values.get("User", "")) for unit, values in properties(units, ("User",)).items())


def _since(unit: str) -> float:
    """Return when a unit was started; systemd prints it in the time zone, so the process is asked instead."""
    values = properties([unit], ("MainPID", "ActiveState")).get(unit, {})
    pid = values.get("MainPID", "0")
    if values.get("ActiveState") != "active" or pid == "0":
        return 0.0
    try:
        ticks = int(_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
        booted = next(int(line.split()[1]) for line in _text("/proc/stat").splitlines() if line.startswith("btime"))
    except (IndexError, ValueError, StopIteration):
        return 0.0
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def version() -> int:
    """Return the major version of systemd; 0 where it is not there."""
    found = re.search(r"systemd (\d+)", ask(["systemctl", "--version"]))
    return int(found[1]) if found else 0


def users_program() -> str:
    """Return the path of systemd-sysusers, which makes the accounts; empty without it: useradd(8) alone is not used."""
    return programs.find("systemd-sysusers", "").path


def _known(users: Iterable[str]) -> Iterable[tuple[str, int]]:
    for name in users:
        with contextlib.suppress(KeyError):
            yield name, pwd.getpwnam(name).pw_uid


def _entries(path: str) -> tuple[tuple[str, int], ...]:
    """Return name and number of each line of passwd(5) or group(5)."""
    lines = (line.split(":") for line in _text(path).splitlines())
    return tuple((parts[0], int(parts[2])) for parts in lines if len(parts) > 2 and parts[2].isdecimal())  # noqa: PLR2004


def _names(path: str) -> tuple[str, ...]:
    return tuple(line.partition(":")[0] for line in _text(path).splitlines() if ":" in line)


def _key(path: str) -> KeyFile | None:
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    owner = os.stat("/").st_uid
    place = Path(path).parent.resolve()
    safe = stat.S_ISREG(info.st_mode) and all(programs.trusted(each, owner) for each in (place, *place.parents))
    return KeyFile(
        uid=info.st_uid, mode=stat.S_IMODE(info.st_mode), changed=max(info.st_mtime, info.st_ctime), safe=safe
    )


def _each(wanted: str, paths: Iterable[str]) -> dict[str, os.stat_result | None]:
    """Look at places, without following a link there: absent ones are left out, others than wanted are None."""
    judge = {"file": stat.S_ISREG, "directory": stat.S_ISDIR, "link": stat.S_ISLNK}[wanted]
    found: dict[str, os.stat_result | None] = {}
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            found[path] = info if judge(info.st_mode) else None
    return found


def _owner(info: os.stat_result) -> dict[str, int]:
    return {"mode": stat.S_IMODE(info.st_mode), "uid": info.st_uid, "gid": info.st_gid}


def _content(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    with contextlib.suppress(UnicodeDecodeError):
        if len(data) <= _MAX_BYTES:
            return data.decode("utf-8")
    message = "there is a file that Cloister did not write"
    raise StepError("not-ours", message, where=path, remedy=f"mv {path} {path}.old")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
