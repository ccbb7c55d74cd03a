"""The image of the tests: verified, cheap to open, nothing of its builder in it; and the verbs about images."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.cli.entry import main
from cloister.host.image_keys import trust_store
from cloister.host.image_open import Trust, open_image
from cloister.host.image_store import ImageStore
from cloister.host.image_verify import verify_root
from microvm.conftest import GuestImage
from support.made_image import change

Verb = Callable[..., tuple[int, str]]


@pytest.fixture
def verb(
    image: GuestImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Verb:
    """Call `cloister image …` as a user who has the image of the tests: exit code and all that was printed."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    image.install(home)
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str]:
        code = main(["image", *words])
        out = capsys.readouterr()
        return code, out.out + out.err

    return call


def test_the_shared_image_is_what_was_signed(image: GuestImage) -> None:
    """Building, signing and renewing make an image whose every byte is the signed one."""
    trusted = Trust(tuple(trust_store(str(image.trust), frozenset({os.getuid()}))))
    with open_image(ImageStore(str(image.store)), image.name, trusted) as opened:
        verify_root(opened)
        assert opened.manifest == image.manifest
        assert os.pread(opened.kernel, 4, 0) == b"\x7fELF"
        assert os.pread(opened.initramfs, 6, 0) == b"070701"
    begin = time.perf_counter()
    open_image(ImageStore(str(image.store)), image.name, trusted).close()
    assert time.perf_counter() - begin < 0.1  # measured 0.5 ms; without the kept copies 70 ms


def test_nothing_in_an_image_raises_rights_or_names_the_builder(image: GuestImage, tmp_path: Path) -> None:
    """No setuid file, no device, no name of the machine, no apt source, no machine-id; what was asked for is."""
    tree = tmp_path / "tree"
    subprocess.run(["fsck.erofs", f"--extract={tree}", image.path / "root.img"], check=True, capture_output=True)
    seen = 0
    for place, directories, files in os.walk(tree):
        for name in (*directories, *files):
            mode = os.lstat(f"{place}/{name}").st_mode
            assert not mode & (stat.S_ISUID | stat.S_ISGID), f"{place}/{name}"
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode), f"{place}/{name}"
            seen += 1
    assert seen > 3000
    for name in ("hostname", "resolv.conf", "machine-id", "hosts"):
        assert (tree / "etc" / name).read_bytes() == b""
    for gone in ("etc/apt", "var/lib/apt", "var/log/dpkg.log", "etc/.pwd.lock", "boot/vmlinuz"):
        assert not (tree / gone).exists()
    assert os.listdir(tree / "dev") == os.listdir(tree / "tmp") == os.listdir(tree / "run") == []
    assert (tree / "usr/bin/python3").exists()
    assert (tree / "usr/bin/git").exists()
    assert (tree / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 100_000


def test_everything_in_an_image_is_roots(image: GuestImage) -> None:
    """Owners are decided when the image is written, not by what the builder seemed to be."""
    shown = subprocess.run(
        ["dump.erofs", "--path=/etc/passwd", image.path / "root.img"], check=True, capture_output=True, text=True
    )
    assert "Uid: 0" in shown.stdout
    assert "Gid: 0" in shown.stdout


def test_list_inspect_and_verify_say_what_there_is(verb: Verb, image: GuestImage) -> None:
    """A person sees version, signer, packages with their digests; JSON has the same."""
    code, text = verb("list", "--json")
    (row,) = json.loads(text)
    assert (code, row["name"], row["version"], row["problem"]) == (0, "test", image.manifest.version, "")
    code, text = verb("inspect", "test", "--json")
    shown = json.loads(text)
    assert (code, shown["digest"], shown["problem"]) == (0, image.manifest.digest(), "")
    kinds = {package["kind"] for package in shown["packages"]}
    assert kinds == {"deb", "kernel"}
    assert all(len(package["sha256"]) == 64 for package in shown["packages"])
    code, text = verb("verify", "test")
    assert code == 0
    assert "is what was signed" in text
    assert "test " in verb("list")[1]
    assert "bash" in verb("inspect", "test")[1]


def test_verify_names_what_is_wrong(verb: Verb, image: GuestImage, tmp_path: Path) -> None:
    """Exit 77 and the block that is another; unsigned and unknown keys by their names. Twin: the test above."""
    version = tmp_path / "home/.local/share/cloister/images/test" / str(image.manifest.version)
    for file in image.path.iterdir():
        (version / file.name).unlink()
        (version / file.name).write_bytes(file.read_bytes())
    change(version / "root.img", 12345 * 4096 + 17)
    code, text = verb("verify", "test")
    assert (code, "block 12345 of the file system" in text) == (77, True)
    trusted = tmp_path / "home/.config/cloister/trust.d"
    for each in trusted.iterdir():
        each.unlink()
    code, text = verb("verify", "test")
    assert (code, "[image-key-unknown]" in text) == (77, True)
    assert "image-key-unknown" in verb("list")[1]
    (version / "manifest.sig").chmod(0o600)
    (version / "manifest.sig").write_bytes(b"")
    code, text = verb("verify", "test")
    assert (code, "[image-unsigned]" in text) == (77, True)


def test_renewing_keeps_the_packages_and_takes_the_next_version(verb: Verb, image: GuestImage) -> None:
    """After an update of Cloister: same root, same kernel, this Cloister's program, signed by the user's own key."""
    code, text = verb("renew", "test", "--json")
    made = json.loads(text)
    assert (code, made["version"], made["root_hash"]) == (0, image.manifest.version + 1, image.manifest.root.root_hash)
    assert verb("verify", "test", "--version", str(made["version"]))[0] == 0
    code, text = verb("gc", "--keep", "1", "--dry-run", "--json")
    assert (code, len(json.loads(text)["removed"])) == (0, 1)
    code, text = verb("keygen")
    assert (code, "[image-key-exists]" in text) == (71, True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("verify", "tset"), 64, "image-missing"), (("build", "minmal"), 64, "cloister image build minimal"),
        (("build", "./none.toml"), 64, "recipe-missing"), (("biuld", "dev"), 64, "did you mean build?"),
        (("build", "dev", "--version", "0"), 64, "image-version"), (("sign", "test"), 64, "cloister image keygen"),
        (("gc", "--keep", "0"), 64, "image-keep"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_get_something_to_type(
    verb: Verb, words: tuple[str, ...], code: int, said: str
) -> None:
    """Names that are not there, recipes that are not there, wrong numbers."""
    found, text = verb(*words)
    assert (found, said in text) == (code, True), text
