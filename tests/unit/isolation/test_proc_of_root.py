"""What belongs to root in `/proc` is covered when root runs an agent."""

from cloister.isolation.namespace import Box, bubblewrap_argv


def argv(uid: int) -> tuple[str, ...]:
    """Return bubblewrap's argv for a user id."""
    return bubblewrap_argv(
        Box(
            bubblewrap="/usr/bin/bwrap", shim="/s", box_directory="/b", etc_directory="/e", home="/h", uid=uid, gid=uid,
            hostname="x", system=(), mounts=(),
        )
    )  # fmt: skip


def test_sysctls_are_read_only_for_root() -> None:
    """Files of /proc/sys belong to root and need no capability: for uid 0 they are mounted read-only."""
    words = argv(0)
    position = words.index("/proc/sys")

    assert words[position - 1 : position + 2] == ("--ro-bind-try", "/proc/sys", "/proc/sys")
    assert position > words.index("--proc")


def test_other_users_need_no_cover() -> None:
    """For everybody else the kernel refuses by ownership, and mounts cost time."""
    assert "/proc/sys" not in argv(1000)
