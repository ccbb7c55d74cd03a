"""What PID 1 of a guest parses, natively and with sanitizers: command line, fields of a run, tar. Nothing boots."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shim_build
from support.guest_link import fields, tar

pytestmark = pytest.mark.kernel

HASH, SALT = "a1" * 32, "0f" * 32
TABLE = f"cloister.verity=100:101:{HASH}:{SALT}"
USUAL = "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests random.trust_cpu=on"
FIRECRACKERS = "pci=off virtio_mmio.device=4K@0xc0001000:5"
SOURCES = ("guest_line.c", "guest_fields.c", "guest_tar.c", "sys.c")
CALM = {"PATH": "/usr/bin:/bin", "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="session")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile them with a small front end, once."""
    program = tmp_path_factory.mktemp("parsers") / "parsers"
    own = Path(__file__).parent.parent / "support/guest_parsers.c"
    sources = [str(shim_build.SOURCES / name) for name in SOURCES]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *shim_build.SANITIZE, "-o", program, own, *sources], check=True)
    return program


def ask(parsers: Path, what: str, cases: Sequence[bytes]) -> list[str]:
    """Return the answer to each case; a sanitizer's complaint fails."""
    data = b"".join(struct.pack("<I", len(case)) + case for case in cases)
    done = subprocess.run([parsers, what], input=data, capture_output=True, env=CALM, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace").splitlines()


def test_the_one_verity_table_is_taken(parsers: Path) -> None:
    """The usual command line is accepted, wherever the table stands, and with the words that Firecracker adds."""
    lines = [f"{USUAL} {TABLE}", f"{TABLE} {USUAL} tsc_early_khz=2596120\n", f"{USUAL} {TABLE} {FIRECRACKERS}"]
    answers = ask(parsers, "line", [line.encode() for line in lines])
    assert answers == [f"ok 0 100 101 {HASH} {SALT}"] * 3
    assert ask(parsers, "line", [f"{USUAL} cloister.probe".encode()])[0].startswith("ok 1 0 0")


@pytest.mark.parametrize(
    "line",
    [
        "", USUAL, f"{TABLE} {TABLE}", f"{TABLE} cloister.verity=", f"{TABLE} cloister.probe",
        f"{TABLE} cloister.verify=0",
        f"{TABLE} root=/dev/vda", f"{TABLE} init=/bin/sh", f"{TABLE} rdinit=/bin/sh", f"{TABLE} rootfstype=ext4",
        f"{TABLE} dm-mod.create=x", f"{TABLE} dm_verity.dev_wait=1", f"{TABLE} initrd=0x1000,5", f"{TABLE} -- sh",
        f"{TABLE} noinitrd", f"{TABLE} modprobe.blacklist=dm_verity", f'"{TABLE}"', f'{TABLE} a="b c"',
        TABLE.replace("100:", "0:"), TABLE.replace("100:", "-1:"), TABLE.replace("100:", " 100:"),
        TABLE.replace("100:", "0x64:"), TABLE.replace("100:", "0100:"), TABLE.replace(":101", ":100"),
        TABLE.replace(":101", ":99"), TABLE.replace("100:", "18446744073709551617:"), TABLE.replace("100:",
        "5000000000:"),
        TABLE.replace(HASH, HASH.upper()), TABLE.replace(HASH, HASH[:-1]), TABLE.replace(HASH, f"{HASH}0"),
        TABLE.replace(SALT, "-"), f"{TABLE}:", f"{TABLE}:restart_on_corruption", f"{TABLE}0", TABLE.replace(":", "="),
    ],
)  # fmt: skip
def test_any_other_command_line_is_refused(parsers: Path, line: str) -> None:
    """A root missing, doubled, malformed or named in any other way is refused, each with a reason."""
    (answer,) = ask(parsers, "line", [f"{USUAL} {line}".encode()])
    assert answer.startswith("no: the command line")


@settings(max_examples=30)
@given(st.lists(st.one_of(
    st.binary(max_size=200).filter(lambda line: b"\0" not in line),
    st.builds(lambda at, byte: (TABLE[:at] + byte + TABLE[at + 1:]).encode(),
              st.integers(0, len(TABLE) - 1), st.characters(min_codepoint=32, max_codepoint=126)),
), min_size=20, max_size=60))  # fmt: skip
def test_no_damaged_line_is_taken_for_another_table(parsers: Path, cases: list[bytes]) -> None:
    """Any text, and the good line with any one character changed, is refused, or says exactly what is in it."""
    for case, answer in zip(cases, ask(parsers, "line", cases), strict=True):
        if not answer.startswith("no: "):
            words = re.split(rb"[ \n]", case)
            assert any(re.fullmatch(rb"cloister\.verity=\d+:\d+:[0-9a-f]{64}:[0-9a-f]{64}", word) for word in words)


def joined(words: Sequence[str]) -> bytes:
    """Return words as the driver takes them."""
    return b"".join(word.encode() + b"\0" for word in words)


def test_fields_of_a_run_are_taken(parsers: Path) -> None:
    """What the broker and the keeper send is understood."""
    full = fields(
        workspace="/srv/a", state=(".claude", ".local/share/x"), ro=(".git/hooks",), mask=("a/b",), tmpfs=1 << 30,
        stand=("7b7d:.mcp.json", ":.env"), umask="027",
        address="10.0.0.7/24", gateway="10.0.0.1", mac="02:00:00:00:00:07", proxy="10.0.0.1:3128",
    )  # fmt: skip
    assert ask(parsers, "fields", [joined(full)]) == ["ok 1000 1000 1 /home/alice /srv/a"]


@pytest.mark.parametrize(
    "word",
    [
        "uid=0", "uid=", "uid=-1", "uid=4294967296", "gid=0", "user=", "user=a:b", "user=-x", "home=relative",
        "home=/", "home=/a/",
        "home=/a/../b", "home=/a//b", "workspace=/.", "state=/absolute", "state=../up", "state=a/./b", "state=",
        "ro=..", "mask=/", "stand=.env", "stand=:", "stand=:/etc/x", "stand=7:.env", "stand=7B:.env", "stand=00:../x",
        "umask=", "umask=22", "umask=0022", "umask=888", "umask=-22",
        "seed=relative", "nested=0", "nested=", "hostname=a b", "hostname=", "machine_id=xyz", "mac=1", "entropy=00",
        "time_ns=-5", "tmpfs=1G",
        "unknown=1", "=1", "noequal", "address=a", "gateway=::1", "state=" + "a" * 300, "home=/" + "a/" * 2000 + "b",
    ],
)  # fmt: skip
def test_a_field_that_is_not_understood_is_refused(parsers: Path, word: str) -> None:
    """A field unknown, malformed or out of its bounds ends the beginning: root is never the agent."""
    without = [each for each in fields() if each.split("=")[0] != word.split("=", maxsplit=1)[0]]
    (answer,) = ask(parsers, "fields", [joined([*without, word])])
    assert answer.startswith("no: ")


def test_no_single_field_comes_twice(parsers: Path) -> None:
    """A field that may be there once is refused the second time."""
    for word in fields(workspace="/srv/a"):
        if not word.startswith("socket="):
            (answer,) = ask(parsers, "fields", [joined([*fields(workspace="/srv/a"), word])])
            assert answer.startswith("no: "), word


class Home:
    """A home that tars are unpacked into, by an ordinary user in a sandbox where nothing else can be written."""

    def __init__(self, folder: Path, parsers: Path) -> None:
        """Make it, empty."""
        self.path = folder / "home"
        self.path.mkdir()
        self._parsers = parsers

    def unpack(self, data: bytes, piece: int = 4096, seed: str = "") -> str:
        """Unpack, and return the answer; a sanitizer's complaint fails."""
        argv = [
            "bwrap", "--unshare-all", "--uid", "1000", "--gid", "1000", "--ro-bind", "/usr", "/usr", "--symlink",
            "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin", "--proc", "/proc",
            "--dir", "/run/cloister/box", "--dir", "/etc", "--ro-bind", str(self._parsers), "/parsers",
            "--bind", str(self.path), "/home/alice", "--", "/parsers", "tar", str(piece), seed,
        ]  # fmt: skip
        done = subprocess.run(argv, input=data, capture_output=True, env=CALM, check=False)
        assert done.returncode in {0, 1}, done.stderr.decode()
        assert b"Sanitizer" not in done.stderr
        return done.stdout.decode().strip()


@pytest.fixture
def home(tmp_path: Path, parsers: Path) -> Home:
    """Return an empty home."""
    return Home(tmp_path, parsers)


GOOD = {"home/alice/.a": b"x" * 513, "home/alice/dir/" + "n" * 150 + "/f": b"", "home/alice/dir/g": b"y" * 512}


@pytest.mark.parametrize("piece", [1, 511, 512, 513, 1 << 16])
def test_a_tar_is_unpacked_in_pieces_of_any_size(home: Home, piece: int) -> None:
    """Each file has its bytes, is its owner's alone, and long names are whole."""
    assert home.unpack(tar(GOOD), piece) == "ok"
    for name, data in GOOD.items():
        path = home.path / name.removeprefix("home/alice/")
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o600
    assert (home.path / "dir").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["tmp/x", "home/bob/x", "run/cloister/x", "usr/bin/sh", "x", "home/alicex"])
def test_files_in_other_places_are_refused(home: Home, name: str) -> None:
    """A tar that names a file outside /etc, the home and the box is refused."""
    assert home.unpack(tar({name: b"x"})).endswith("in a place that is not the run's")


def test_links_of_an_earlier_run_lead_nowhere(home: Home, tmp_path: Path) -> None:
    """A link that stands where a file or directory belongs is replaced: what it pointed to stays as it was."""
    outside = tmp_path / "home/target"
    outside.mkdir()
    (outside / "file").write_text("as it was")
    (home.path / "dir").symlink_to("target")
    (home.path / ".a").symlink_to("target/file")
    assert home.unpack(tar(GOOD)) == "ok"
    assert not (home.path / "dir").is_symlink()
    assert [each.name for each in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "as it was"


def test_what_stands_in_the_way_is_kept_aside(home: Home) -> None:
    """A directory where a file belongs is renamed, not lost; and a seed that is there stays."""
    (home.path / ".a").mkdir()
    (home.path / ".a/kept").write_text("mine")
    (home.path / "dir").mkdir()
    (home.path / "dir/g").write_text("mine")
    assert home.unpack(tar(GOOD), seed="/home/alice/dir/g") == "ok"
    assert (home.path / ".a.replaced0/kept").read_text() == "mine"
    assert (home.path / "dir/g").read_text() == "mine"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(tar(GOOD)) - 1), st.integers(0, 255)), max_size=4), st.integers(1, 2000))
def test_a_damaged_tar_stays_in_the_home(home: Home, changes: list[tuple[int, int]], piece: int) -> None:
    """With any bytes changed, nothing is read or written out of bounds, and no file appears but regular ones."""
    data = bytearray(tar(GOOD))
    for at, value in changes:
        data[at] = value
    answer = home.unpack(bytes(data), piece)
    assert answer == "ok" or answer.startswith("no: ")
    for each in home.path.rglob("*"):
        assert each.is_file() or each.is_dir()


@pytest.mark.parametrize("cut", [1, 511, 512, 1024, 2048])
def test_a_tar_that_is_cut_off_is_refused(home: Home, cut: int) -> None:
    """Without its whole end a tar is not complete, however much was unpacked."""
    assert home.unpack(tar(GOOD)[:-cut]).startswith("no: ")
    assert home.unpack(tar(GOOD) + bytes(512)).startswith("no: ")
