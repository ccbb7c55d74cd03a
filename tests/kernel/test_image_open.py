"""Opening a guest image: whatever was changed is found, and what was checked is what boots."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloister.errors import DeniedError, StepError, UsageError
from cloister.host import image_open
from cloister.host.image_open import Trust, open_image
from cloister.host.image_store import FILES, ImageStore, SeenVersions
from cloister.host.image_verify import verify_root
from cloister.images.manifest import Manifest
from cloister.images.verity import BLOCK
from support.made_image import DATA_BLOCKS, Signer, change, make

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    image_open.forget()


@pytest.fixture
def signer() -> Signer:
    """A key that is trusted."""
    return Signer()


@pytest.fixture
def store(tmp_path: Path, signer: Signer) -> ImageStore:
    """A store with one image, signed by it."""
    return make(tmp_path / "images", (signer,))[0]


def rewrite(store: ImageStore, file: str, data: bytes) -> None:
    """Put other content into a file of the image."""
    path = Path(store.path("made"), file)
    path.parent.chmod(0o700)
    path.chmod(0o600)
    path.write_bytes(data)


def refused(store: ImageStore, trusted: Trust, **more: object) -> str:
    """The reference with which an image is refused, by opening it or by looking at every byte."""
    with pytest.raises(DeniedError) as caught, open_image(store, "made", trusted, **more) as opened:  # type: ignore[arg-type]
        verify_root(opened)
    return caught.value.reference


def test_an_untouched_image_is_opened(store: ImageStore, signer: Signer) -> None:
    """The twin of all refusals below: what was signed opens, and the descriptors hold it."""
    with open_image(store, "made", signer.trust()) as opened:
        verify_root(opened)
        assert opened.signer is not None
        assert opened.signer.public == signer.public
        for descriptor, name in (
            (opened.kernel, "vmlinux"),
            (opened.initramfs, "initramfs.cpio"),
            (opened.root, "root.img"),
        ):
            assert os.pread(descriptor, 1 << 24, 0) == Path(opened.path, name).read_bytes()
            assert not os.get_inheritable(descriptor)


@pytest.mark.parametrize(
    ("file", "at"),
    [
        ("vmlinux", 60_000), ("initramfs.cpio", 10), ("manifest.json", 30),
        ("root.img", 0), ("root.img", 1024), ("root.img", 299 * BLOCK + 4095), ("root.img", DATA_BLOCKS * BLOCK),
        ("root.img", DATA_BLOCKS * BLOCK + 20), ("root.img", (DATA_BLOCKS + 1) * BLOCK),
        ("root.img", (DATA_BLOCKS + 4) * BLOCK + 3000),
    ],
)  # fmt: skip
def test_one_flipped_bit_is_found(store: ImageStore, signer: Signer, file: str, at: int) -> None:
    """Kernel, initramfs, manifest, data, superblocks and hash tree: one bit anywhere, and the image is refused."""
    change(Path(store.path("made"), file), at)
    assert refused(store, signer.trust()) in {"image-changed", "image-signature-bad"}


@pytest.mark.parametrize("file", FILES[:5])
def test_a_file_that_is_cut_off_is_found(store: ImageStore, signer: Signer, file: str) -> None:
    """An image with a shorter file, or without one, is refused."""
    path = Path(store.path("made"), file)
    rewrite(store, file, path.read_bytes()[:-2])
    assert refused(store, signer.trust()) in {"image-changed", "image-signature-bad"}
    path.unlink()
    assert refused(store, signer.trust()) == "image-changed"


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd"])
@pytest.mark.parametrize("file", ["vmlinux", "root.img", "manifest.json"])
def test_a_link_is_never_followed(store: ImageStore, signer: Signer, file: str, target: str) -> None:
    """A file of an image that became a link is refused, wherever it points."""
    path = Path(store.path("made"), file)
    path.parent.chmod(0o700)
    path.unlink()
    path.symlink_to(target)
    assert refused(store, signer.trust()) == "image-changed"


def fields(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The manifest with each of its fields changed."""
    plain = msgspec.to_builtins(manifest)
    yield "cmdline", msgspec.structs.replace(manifest, cmdline=f"{manifest.cmdline} init=/bin/sh")
    for name in ("root_hash", "salt"):
        yield (
            f"root.{name}",
            msgspec.structs.replace(manifest, root=msgspec.structs.replace(manifest.root, **{name: "f" * 64})),
        )
    for name, value in plain.items():
        if isinstance(value, int) and name != "schema":
            yield name, msgspec.structs.replace(manifest, **{name: value + 1})
        elif isinstance(value, str) and name != "arch":
            yield (
                name,
                msgspec.structs.replace(manifest, **{name: value[:-1] + "0" if value[-1] != "0" else value[:-1] + "1"}),
            )


def test_no_field_of_the_manifest_can_be_changed(store: ImageStore, signer: Signer) -> None:
    """The signature covers every field: command line, version, root hash, salt, names."""
    original = image_open.decode_manifest(Path(store.path("made"), "manifest.json").read_bytes(), "")
    tried = list(fields(original))
    assert len(tried) > 9
    for name, other in tried:
        rewrite(store, "manifest.json", other.canonical())
        assert refused(store, signer.trust()) == "image-signature-bad", name
    rewrite(store, "manifest.json", original.canonical())
    open_image(store, "made", signer.trust()).close()


def test_another_form_of_the_same_manifest_is_refused(store: ImageStore, signer: Signer) -> None:
    """One more space is another message, also where no signature is asked for: two readers must read the same."""
    data = Path(store.path("made"), "manifest.json").read_bytes()
    rewrite(store, "manifest.json", data.replace(b":", b": ", 1))
    rewrite(store, "manifest.sig", b"")
    assert refused(store, signer.trust(required=False)) == "image-manifest"


def test_who_signed_decides(tmp_path: Path, signer: Signer) -> None:
    """Unsigned, by a stranger, by a key for other names: each is refused by its own name; a key for it counts."""
    unsigned, _ = make(tmp_path / "a", ())
    stranger, _ = make(tmp_path / "b", (Signer(),))
    both, _ = make(tmp_path / "c", (Signer(), signer))
    assert refused(unsigned, signer.trust()) == "image-unsigned"
    assert refused(stranger, signer.trust()) == "image-key-unknown"
    assert refused(both, signer.trust("other*")) == "image-key-name"
    open_image(both, "made", signer.trust("ma*")).close()


def test_without_required_signatures_a_wrong_one_is_still_refused(tmp_path: Path, signer: Signer) -> None:
    """`require_signature = false` lets unsigned images in, and never one whose signature is wrong."""
    unsigned, _ = make(tmp_path / "a", ())
    with open_image(unsigned, "made", signer.trust(required=False)) as opened:
        assert opened.signer is None
    signed, _ = make(tmp_path / "b", (signer,))
    change(Path(signed.path("made"), "manifest.sig"), 150, bit=2)
    assert refused(signed, signer.trust(required=False)) == "image-signature-bad"


def test_a_signature_of_another_image_is_worth_nothing(tmp_path: Path, signer: Signer) -> None:
    """Manifest and signature carried over from another image or version are refused by their name."""
    store, _ = make(tmp_path / "a", (signer,))
    for other in (
        make(tmp_path / "b", (signer,), name="other")[0].path("other"),
        make(tmp_path / "c", (signer,), version=9)[0].path("made"),
    ):
        for file in FILES:
            rewrite(store, file, Path(other, file).read_bytes())
        assert refused(store, signer.trust()) == "image-changed"


def test_an_older_version_is_refused(tmp_path: Path, signer: Signer) -> None:
    """What was used once is not gone back behind, though it is signed; a person can allow it."""
    store, _ = make(tmp_path / "images", (signer,), version=3)
    make(tmp_path / "images", (signer,), version=4)
    seen = SeenVersions(str(tmp_path / "state/seen.json"))
    open_image(store, "made", signer.trust(), version=3, seen=seen).close()
    open_image(store, "made", signer.trust(), seen=seen).close()
    assert refused(store, signer.trust(), version=3, seen=seen) == "image-older"
    seen.note("made", signer.public, 3, lower=True)
    open_image(store, "made", signer.trust(), version=3, seen=seen).close()


def test_replacing_the_whole_store_does_not_go_back(tmp_path: Path, signer: Signer) -> None:
    """The record is kept outside of the store: an old copy of the whole store is refused as well."""
    new, _ = make(tmp_path / "new", (signer,), version=7)
    old, _ = make(tmp_path / "old", (signer,), version=6)
    seen = SeenVersions(str(tmp_path / "seen.json"))
    open_image(new, "made", signer.trust(), seen=seen).close()
    assert refused(old, signer.trust(), seen=seen) == "image-older"


def test_a_damaged_record_of_versions_opens_nothing(store: ImageStore, signer: Signer, tmp_path: Path) -> None:
    """Who cannot know whether this goes back refuses."""
    path = tmp_path / "seen.json"
    path.write_text("{")
    path.chmod(0o600)
    with pytest.raises(StepError) as caught:
        open_image(store, "made", signer.trust(), seen=SeenVersions(str(path)))
    assert caught.value.reference == "image-seen"


def test_the_planned_image_is_the_one(store: ImageStore, signer: Signer) -> None:
    """A run gets the image that its plan was made with, or none."""
    with open_image(store, "made", signer.trust()) as opened:
        digest = opened.manifest.digest()
    open_image(store, "made", signer.trust(), manifest=digest).close()
    assert refused(store, signer.trust(), manifest="0" * 64) == "image-changed"
    with pytest.raises(UsageError):
        open_image(store, "made/../made", signer.trust())


def test_what_was_checked_cannot_be_changed_any_more(store: ImageStore, signer: Signer) -> None:
    """Time of check, time of use: rename, write in place, and a mapping made before the check all change nothing."""
    path = Path(store.path("made"), "vmlinux")
    good = path.read_bytes()
    path.parent.chmod(0o700)
    path.chmod(0o600)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0:4] = good[0:4]  # the page is dirty, so a later write through it moves no time
        with open_image(store, "made", signer.trust()) as opened:
            mapped[100:104] = b"evil"
            os.pwrite(file.fileno(), b"evil", 5000)
            other = path.with_name("other")
            other.write_bytes(b"evil")
            other.rename(path)
            assert os.pread(opened.kernel, len(good), 0) == good
            for attempt in (
                lambda: os.pwrite(opened.kernel, b"evil", 0),
                lambda: os.ftruncate(opened.kernel, 0),
                lambda: os.close(os.open(f"/proc/self/fd/{opened.kernel}", os.O_RDWR)) or _write_anew(opened.kernel),
                lambda: mmap.mmap(opened.kernel, 0, prot=mmap.PROT_WRITE),
            ):
                with pytest.raises(OSError):  # noqa: PT011  # EBADF, EPERM or EACCES
                    attempt()
            assert os.pread(opened.kernel, len(good), 0) == good
    assert refused(store, signer.trust()) == "image-changed"


def _write_anew(descriptor: int) -> None:
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    try:
        os.write(again, b"evil")
    finally:
        os.close(again)


def test_a_second_opening_reads_nothing_and_a_change_is_seen(
    store: ImageStore, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are kept; they are given out only while the file looks as it did when it was copied."""
    open_image(store, "made", signer.trust()).close()
    copied: list[str] = []
    copy = image_open._copy
    monkeypatch.setattr(image_open, "_copy", lambda source, path, part: copied.append(path) or copy(source, path, part))
    open_image(store, "made", signer.trust()).close()
    assert copied == []
    path = Path(store.path("made"), "vmlinux")
    os.utime(path)
    open_image(store, "made", signer.trust()).close()
    assert copied == [str(path)]
    change(path, 0)
    assert refused(store, signer.trust()) == "image-changed"


def test_two_users_of_one_copy_do_not_move_each_other(store: ImageStore, signer: Signer) -> None:
    """Each opening has an offset of its own."""
    with open_image(store, "made", signer.trust()) as one, open_image(store, "made", signer.trust()) as two:
        os.lseek(one.kernel, 1000, os.SEEK_SET)
        assert os.lseek(two.kernel, 0, os.SEEK_CUR) == 0
