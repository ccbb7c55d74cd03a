"""The jail in which images are put together: root to look at, nobody in fact."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.errors import CloisterError, DeniedError, StepError, UnsupportedError
from cloister.host.image_jail import pretend_filter, run
from cloister.host.image_place import build_place

pytestmark = pytest.mark.kernel


@pytest.fixture
def work(tmp_path: Path) -> Iterator[str]:
    """A directory to build in, as a build has it."""
    with build_place(str(tmp_path)) as place:
        yield place.work


def inside(work: str, script: str, *, network: bool = False) -> str:
    """Run a script in the jail."""
    return run(["sh", "-c", script], work, network=network)


def test_it_looks_like_root_and_changes_no_owner(work: str) -> None:
    """What packages do succeeds and is not done: owners, groups, devices, identities."""
    shown = inside(
        work,
        "set -e; id -u; touch file; chown 42:42 file; stat -c %u:%g file; mknod null c 1 3; "
        "[ ! -e null ] && echo none; chmod 4755 file; stat -c %a file",
    )
    assert shown.split() == ["0", "0:0", "none", "4755"]
    assert os.stat(f"{work}/file").st_uid == os.stat(work).st_uid


@pytest.mark.parametrize(
    "script",
    [
        "touch /usr/evil", "ls /root", "ls /home", "cat /etc/shadow", "cat /etc/cloister/cloister.toml", "umount /usr",
        "mount -o remount,rw,bind /usr && touch /usr/evil", "[ $(ls -d /proc/[0-9]* | wc -l) -gt 5 ]", "dmesg",
        "cat /proc/sys/kernel/core_pattern >was; umount /proc/sys; cat was >/proc/sys/kernel/core_pattern",
        "cat /proc/sys/kernel/core_pattern >was; mkdir p; mount -t proc proc p; cat was >p/sys/kernel/core_pattern",
        "echo 1 >/proc/sysrq-trigger", "test -e /sys/kernel", "test -e /var/run/dbus",
        "test -b /dev/sda -o -e /dev/kvm",
    ],
)  # fmt: skip
def test_nothing_of_the_host_is_within_reach(work: str, script: str) -> None:
    """No file, process, sysctl or device of the host: not by the seeming root, nor by what that may mount."""
    assert inside(work, "echo twin >own; cat own") == "twin"
    with pytest.raises(StepError) as caught:
        inside(work, script)
    assert caught.value.reference == "image-build"


def test_without_a_network_there_is_none(work: str) -> None:
    """Scripts of packages reach nothing, not even this machine; what fetches does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}"
        run(["bash", "-c", script], work, network=True)
        with pytest.raises(StepError):
            run(["bash", "-c", script], work, network=False)


def test_only_named_variables_come_along(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token in the environment of whoever builds is seen by a package; a proxy is, where there is a network."""
    monkeypatch.setenv("NPM_TOKEN", "made-up-token")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    names = {line.partition("=")[0] for line in inside(work, "env").splitlines()}
    assert names <= {"PATH", "LC_ALL", "HOME", "TMPDIR", "DEBIAN_FRONTEND", "PWD"}
    assert "https_proxy=" in inside(work, "env", network=True)


def test_hosts_of_mirrors_are_in_no_message(work: str) -> None:
    """What goes wrong is told without the name of a company's mirror."""
    with pytest.raises(StepError) as caught:
        inside(work, "echo 'E: http://mirror.corp.example/debian failed'; exit 3")
    assert "http://…/debian failed" in str(caught.value)
    assert "corp" not in str(caught.value)


def test_an_unknown_architecture_is_refused() -> None:
    """Without the numbers of its calls nothing is pretended."""
    assert len(pretend_filter(platform.machine())) % 8 == 0
    with pytest.raises(UnsupportedError):
        pretend_filter("vax")


@pytest.mark.root
def test_roots_builds_run_as_nobody(tmp_path: Path) -> None:
    """A build of root's is another user's, who exists for it only; programs are never run as root."""
    with pytest.raises(DeniedError) as caught:
        run(["true"], str(tmp_path), network=False)
    assert caught.value.reference == "image-root"
    with build_place(str(tmp_path)) as place:
        assert place.uid is not None
        assert 61184 <= place.uid <= 65519
        assert os.stat(place.work).st_mode & 0o777 == 0o700
        shown = inside(place.work, "id -u; cut -d' ' -f1 /proc/self/uid_map | wc -l; touch made")
        assert shown.split()[0] == "0"
        assert os.stat(f"{place.work}/made").st_uid == place.uid
        for script in (
            "cat /proc/sys/kernel/core_pattern >was; umount /proc/sys; cat was >/proc/sys/kernel/core_pattern",
            "cat /proc/sys/kernel/core_pattern >was; mkdir p; mount -t proc proc p; cat was >p/sys/kernel/core_pattern",
        ):
            with pytest.raises(CloisterError):
                inside(place.work, script)
    assert not os.path.exists(place.base)
