"""git's index: paths that git would not have put there are found, in every version of the format."""

import pytest

from cloister.plan.gitindex import forged_paths


def index(*paths: bytes, version: int = 2, hash_bytes: int = 20) -> bytes:
    """Return an index file with these paths, as git lays it out (without its checksum, which is not read)."""
    out = b"DIRC" + version.to_bytes(4, "big") + len(paths).to_bytes(4, "big")
    before = b""
    for path in paths:
        entry = bytes(40 + hash_bytes) + min(len(path), 0xFFF).to_bytes(2, "big")
        if version == 4:
            common = 0
            while common < min(len(path), len(before)) and path[common] == before[common]:
                common += 1
            entry += bytes([len(before) - common]) + path[common:] + b"\0"
            before = path
        else:
            entry += path
            entry += bytes(8 - len(entry) % 8)
        out += entry
    return out


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("hash_bytes", [20, 32])
def test_forged_paths_are_found(version, hash_bytes):
    """Paths into .git in any case, upwards, absolute or empty are found among honest ones."""
    honest = [b"a", b"sub/.gitignore", b".github/x", b"x.git/y", b"...", b"z" * 300]
    forged = [b".git/hooks/pre-commit", b"../up", b"/abs", b"sub/.GIT/config", b"a//b", b"a/./b"]
    data = index(*sorted(honest + forged), version=version, hash_bytes=hash_bytes)

    assert sorted(forged_paths(data, hash_bytes=hash_bytes)) == sorted(path.decode() for path in forged)
    assert forged_paths(index(*honest, version=version, hash_bytes=hash_bytes), hash_bytes=hash_bytes) == []


@pytest.mark.parametrize(
    "data", [b"x", b"DIRC", b"DIRC\0\0\0\x09\0\0\0\0", index(b"a")[:40], index(b"a", version=4)[:-1]]
)
def test_what_cannot_be_read_is_not_clean(data):
    """A file that is cut off or of another version is reported; an empty one is git's own."""
    assert forged_paths(data) == ["(unreadable)"] or data == b"DIRC"
    assert forged_paths(b"") == []
