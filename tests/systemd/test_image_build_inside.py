"""Guest images are built on Debian 13 too: by its mmdebstrap, its apt, its erofs-utils and its bubblewrap.

The machine has a network of its own that leads nowhere. So what needs the mirror runs in all namespaces of the machine
but that one: it has the network of this host, as a build on a real Debian 13 has one.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.cloister import BASE, User
from support.homes import make_home, make_workspace
from support.machines import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STORE = "/home/alice/.local/share/cloister/images"
_NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--cgroup")
_BOOT_S = 300


def on_our_network(machine: Machine, argv: Sequence[str], user: str = "root") -> str:
    """Run a command in a machine, with the network of this host; return what it printed."""
    words = machine.command(argv, user=user)
    at = words.index("--all")
    words[at : at + 1] = _NAMESPACES
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def give_a_mirror(machine: Machine) -> None:
    """Let the machine's apt find what this host's apt finds: the mirror, security updates, names and authorities."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, str] = {}
    for origin, codename, uri in map(str.split, told.splitlines()):
        if origin == "Debian":
            found.setdefault("-security" if codename.endswith("-security") else "", uri)
    lines = [f"deb {uri} {machine.suite}{suffix} main\n" for suffix, uri in found.items()]
    machine.write("/etc/apt/sources.list", "".join(lines))
    for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        machine.write(name, Path(name).read_text(encoding="utf-8"))
    on_our_network(machine, ["apt-get", "update", "-qq"])
    on_our_network(machine, ["apt-get", "install", "-qq", "--no-install-recommends", "mmdebstrap", "erofs-utils"])


@pytest.mark.parametrize("suite", ["trixie"], indirect=True)
def test_an_image_is_built_on_debian_13_and_boots(fresh_machine: Callable[..., Machine], tmp_path: Path) -> None:
    """By an ordinary user there; it verifies there and here, and its guest runs a command on this host."""
    machine = fresh_machine()
    give_a_mirror(machine)
    told = on_our_network(machine, ["cloister", "image", "build", "minimal", "--json"], user="alice")
    built = json.loads(told[told.index("{") :])
    verified = machine.run(["cloister", "image", "verify", "minimal"], user="alice")
    lock = json.loads(machine.read(f"{STORE}/minimal/1/lock.json"))
    assert verified.returncode == 0
    assert built["path"] == f"{STORE}/minimal/1"
    assert lock["tools"]["mkfs.erofs"] >= "1.8", lock["tools"]

    home = make_home(tmp_path / "home")
    workspace = make_workspace(home / "src/project")
    target = home / ".local/share/cloister/images/minimal/1"
    target.mkdir(parents=True, mode=0o700)
    for name in ("vmlinux", "initramfs.cpio", "root.img", "manifest.json", "manifest.sig", "lock.json", "sbom.json"):
        (target / name).write_bytes(machine.path(f"{STORE}/minimal/1/{name}").read_bytes())
    trusted = home / ".config/cloister/trust.d/alice.pub"
    trusted.parent.mkdir(parents=True, mode=0o700)
    trusted.write_bytes(machine.path("/home/alice/.config/cloister/image-key/image-key.pem.pub").read_bytes())
    trusted.chmod(0o600)
    table = '[agents.shell.microvm]\nimage = "minimal"\nwarm = false\n'
    user = User(home, f'{BASE}isolation = "microvm"\ncommand = ["/bin/sh"]\n{table}')
    done = user.inside("cat /etc/debian_version", cwd=workspace, timeout_s=_BOOT_S)
    user.close()
    assert (done.returncode, done.stdout[:3]) == (0, "12."), done.stderr
