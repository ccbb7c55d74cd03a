"""Files of a home carried into a run under systemd: packed with the user's rights, made anew by root."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import PolicyError, StepError
from cloister.host import tar_format
from cloister.host.carry import find_carried
from cloister.host.tar_format import Entry, encode, end
from cloister.host.unit_carry import SEALS, unpack
from cloister.runs.carry_tar import Packed, pack

pytestmark = pytest.mark.kernel


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with Pi's files in it."""
    home = tmp_path / "home"
    agent = home / ".pi/agent"
    for name in ("extensions/x/bin", "skills/review", "sessions"):
        (agent / name).mkdir(parents=True)
    (agent / "settings.json").write_text('{"a": 1}')
    (agent / "extensions/x/bin/tool").write_text("#!/bin/sh\n")
    (agent / "extensions/x/bin/tool").chmod(0o750)
    (agent / "extensions/x/auth.json").write_text("not the secret one")
    (agent / "skills/review/SKILL.md").write_text("how")
    (agent / "auth.json").write_text("made-up-secret")
    (agent / "sessions/one").write_text("history")
    return home


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    """An empty directory, as a descriptor."""
    (tmp_path / "carry").mkdir()
    opened = os.open(tmp_path / "carry", os.O_RDONLY | os.O_DIRECTORY)
    yield opened
    os.close(opened)


def packed(home: Path, *names: str, secrets: tuple[str, ...] = ("auth.json",), **more: object) -> Packed:
    """Pack names below ~/.pi/agent."""
    hidden = [str(home / ".pi/agent" / name) for name in secrets]
    carried = find_carried(str(home), tuple(f".pi/agent/{name}" if name else ".pi/agent" for name in names), ())
    return pack(carried, hidden, **more)


def unpacked(result: Packed, target: int) -> dict[str, str]:
    """Unpack, and return every file with its content."""
    unpack(result.memory, target)
    os.close(result.memory)
    found = {}
    for directory, _, files in os.walk(f"/proc/self/fd/{target}/"):
        for name in files:
            path = Path(directory, name)
            found[str(path.relative_to(f"/proc/self/fd/{target}"))] = path.read_text()
    return found


def test_named_files_arrive_and_others_do_not(home: Path, target: int) -> None:
    """Contents and the execute bit arrive, readable by another uid and root's; what was not named does not."""
    result = packed(home, "settings.json", "extensions", "skills", "themes")
    assert dict(result.carried) == {
        ".pi/agent/settings.json": "file", ".pi/agent/extensions": "directory", ".pi/agent/skills": "directory",
    }  # fmt: skip
    assert sorted(unpacked(result, target)) == [
        ".pi/agent/extensions/x/auth.json", ".pi/agent/extensions/x/bin/tool", ".pi/agent/settings.json",
        ".pi/agent/skills/review/SKILL.md",
    ]  # fmt: skip
    tool = os.stat(".pi/agent/extensions/x/bin/tool", dir_fd=target)
    assert (stat.S_IMODE(tool.st_mode), tool.st_uid) == (0o755, os.getuid())
    assert stat.S_IMODE(os.stat(".pi/agent/settings.json", dir_fd=target).st_mode) == 0o644
    assert stat.S_IMODE(os.stat(".pi/agent", dir_fd=target).st_mode) == 0o755


def test_secrets_are_left_out_by_their_place_and_not_by_their_name(home: Path, target: int) -> None:
    """Flaw PF12: unanchored excludes dropped `extensions/x/bin` and any `auth.json`, and let others through."""
    found = unpacked(packed(home, "", secrets=("auth.json", "sessions", "bin")), target)
    assert ".pi/agent/auth.json" not in found
    assert ".pi/agent/sessions/one" not in found
    assert "made-up-secret" not in found.values()
    assert {".pi/agent/extensions/x/bin/tool", ".pi/agent/extensions/x/auth.json"} <= set(found)


def test_a_link_to_a_file_that_only_root_can_read_brings_nothing(home: Path, target: int, tmp_path: Path) -> None:
    """Flaws PF2 and PF3: `.env`, a directory or `~/.pi/agent` itself as a link to root's files.

    The user's process reads, so what the user cannot read stays out; a link to a place that is not carried stays out
    whoever reads.
    """
    outside = tmp_path / "shadow"
    outside.write_text("root:made-up")
    agent = home / ".pi/agent"
    (agent / "skills/leak").symlink_to(outside)
    (agent / "skills/dir").symlink_to(tmp_path)
    (agent / "skills/again").symlink_to(agent / "skills/review")
    (agent / "skills/loop").symlink_to(agent / "skills")
    (agent / "skills/secret").symlink_to(agent / "auth.json")
    os.mkfifo(agent / "skills/pipe")
    result = packed(home, "skills")
    found = unpacked(result, target)
    assert found == {".pi/agent/skills/review/SKILL.md": "how", ".pi/agent/skills/again/SKILL.md": "how"}
    assert {notice.split()[0] for notice in result.notices} == {
        f"~/.pi/agent/skills/{name}" for name in ("leak", "dir", "loop", "secret", "pipe")
    }


def test_a_carried_name_that_is_a_link_to_a_secret_is_not_taken(home: Path, target: int) -> None:
    """`settings.json` as a link to `auth.json`: found by its real place, and left out."""
    (home / ".pi/agent/settings.json").unlink()
    (home / ".pi/agent/settings.json").symlink_to("auth.json")
    result = packed(home, "settings.json", "skills")
    assert [name for name, _ in result.carried] == [".pi/agent/skills"]
    assert "made-up-secret" not in unpacked(result, target).values()


def test_made_files_take_the_place_of_carried_ones(home: Path, target: int) -> None:
    """Merged settings win over the file they were made of, also inside a carried directory."""
    made = {".pi/agent/settings.json": b'{"merged": true}'}
    for names in (("settings.json", "skills"), ("",)):
        found = unpacked(packed(home, *names, made=made), target)
        assert found[".pi/agent/settings.json"] == '{"merged": true}'
        assert found[".pi/agent/skills/review/SKILL.md"] == "how"
        shutil.rmtree(".pi", dir_fd=target)


def test_the_same_files_give_the_same_bytes(home: Path) -> None:
    """No times, owners or order of a directory in it."""
    sizes = []
    for _ in range(2):
        memory = packed(home, "").memory
        sizes.append(os.pread(memory, 1 << 20, 0))
        os.close(memory)
        (home / ".pi/agent/settings.json").touch()
    assert sizes[0] == sizes[1]


def test_too_much_is_refused_with_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB and 20,000 entries are the bounds; the one who wrote `carry` is told, and nothing is sent."""
    monkeypatch.setattr("cloister.runs.carry_tar.MAX_BYTES", 10)
    with pytest.raises(PolicyError) as caught:
        packed(home, "skills", "extensions")
    assert caught.value.reference == "carry-too-large"
    monkeypatch.undo()
    monkeypatch.setattr("cloister.runs.carry_tar.MAX_ENTRIES", 4)
    with pytest.raises(PolicyError):
        packed(home, "")


def sealed(data: bytes, seals: int = SEALS) -> int:
    """Return a memory file as a hostile broker of a user could send it."""
    memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(memory, data)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    return memory


FILE, UPPER = encode(Entry("a/b", "file")), encode(Entry("a", "directory"))
HOSTILE = {
    "no tar": b"x" * 1024,
    "nothing": b"",
    "without its directory": FILE + end(),
    "twice": UPPER + FILE + FILE + end(),
    "file as directory": encode(Entry("a", "file")) + FILE + end(),
    "directory over file": UPPER + FILE + encode(Entry("a/b", "directory")) + end(),
    "cut off": UPPER + encode(Entry("a/b", "file", 999)) + end()[:512],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_root_refuses_what_is_not_a_plain_tree(target: int, case: str) -> None:
    """Attack: whatever a user sends, root makes plain files below its own directory, or stops."""
    memory = sealed(HOSTILE[case])
    with pytest.raises(StepError) as caught:
        unpack(memory, target)
    assert caught.value.reference == "carry-refused"
    os.close(memory)


def test_root_refuses_a_file_that_can_still_change(target: int) -> None:
    """Attack: a tar that is changed after it was looked at; and a plain file or socket in its place."""
    good = UPPER + FILE + end()
    for seals in (fcntl.F_SEAL_SHRINK, SEALS & ~fcntl.F_SEAL_WRITE):
        memory = sealed(good, seals)
        with pytest.raises(StepError):
            unpack(memory, target)
        os.close(memory)
    with Path(__file__).open("rb") as plain, pytest.raises(StepError):
        unpack(plain.fileno(), target)
    memory = sealed(good)
    assert unpack(memory, target) == 2
    with pytest.raises(StepError):
        unpack(memory, target)  # the directory is not empty any more
    os.close(memory)


def test_root_follows_no_link_that_stands_in_its_way(target: int, tmp_path: Path) -> None:
    """Flaws PF4 and PF6: a link planted between two steps is not used, wherever it comes from."""
    os.symlink(tmp_path, "a", dir_fd=target)
    memory = sealed(encode(Entry("a", "directory")) + FILE + end())
    with pytest.raises(StepError):
        unpack(memory, target)
    assert not (tmp_path / "b").exists()
    os.close(memory)


def test_twenty_thousand_files_are_made_in_seconds(target: int) -> None:
    """The bound itself works, and is quick enough to be one."""
    body = b"".join(encode(Entry(f"d/{number:05}", "file")) for number in range(tar_format.MAX_ENTRIES - 1))
    memory = sealed(encode(Entry("d", "directory")) + body + end())
    assert unpack(memory, target) == tar_format.MAX_ENTRIES
    os.close(memory)
