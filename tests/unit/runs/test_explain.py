"""Reading bubblewrap's argv: the last mount counts, links are followed inside, unknown options are not guessed."""

import pytest

from cloister.plan.steps import Launch, Plan
from cloister.runs.explain import Explainer, Seen, parse_mounts

ARGV = (
    *("bwrap", "--unshare-user", "--uid", "1", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"),
    *("--perms", "0700", "--size", "99", "--tmpfs", "/home/u", "--bind", "/home/u/p", "/home/u/p"),
    *("--ro-bind", "/home/u/p/.git/hooks", "/home/u/p/.git/hooks", "--ro-bind", "/dev/null", "/home/u/p/.env"),
    *("--perms", "0000", "--tmpfs", "/home/u/p/secret", "--remount-ro", "/home/u/p/secret"),
    *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/", "--", "/bin/sh", "--bind", "/", "/"),
)
HOST = {
    "/usr": Seen("directory", "", True, False),
    "/usr/bin/env": Seen("file", "", True, False),
    "/home/u/p": Seen("directory", "", True, True),
    "/home/u/p/file": Seen("file", "", True, True),
    "/home/u/p/out": Seen("link", "/etc/shadow"),
    "/home/u/p/up": Seen("link", "../.ssh/key"),
    "/home/u/p/a": Seen("link", "b"),
    "/home/u/p/b": Seen("link", "a"),
    "/home/u/p/.git/hooks": Seen("directory", "", True, True),
    "/home/u/p/secret": Seen("directory", "", True, True),
    "/home/u/p/secret/key": Seen("file", "", True, True),
    "/home/u/.ssh/key": Seen("file", "", True, True),
    "/etc/shadow": Seen("file", "", True, True),
}


def _ask(path: str, argv: tuple[str, ...] = ARGV) -> str:
    launch = Launch(argv=argv, command=("x",), directory="/", environment={})
    plan = Plan(run="r", agent="a", preset="", isolation="namespace", workspace="", policy_digest="", steps=(launch,))
    access = Explainer(plan, lambda path: HOST.get(path, Seen("absent"))).ask(path)
    flags = zip("erw", (access.exists, access.readable, access.writable), strict=True)
    return "".join(letter for letter, on in flags if on)


@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("/usr/bin/env", "er"),
        ("/bin/env", "er"),
        ("/home/u/p/file", "erw"),
        ("/home/u/p/new", "w"),
        ("/home/u/p/../p/./file", "erw"),
        ("/home/u/p/.git/hooks", "er"),
        ("/home/u/p/.git/hooks/pre-commit", ""),
        ("/home/u/p/.env", "e"),
        ("/home/u/p/secret", "e"),
        ("/home/u/p/secret/key", ""),
        ("/home/u/p/out", ""),
        ("/home/u/p/up", "w"),
        ("/home/u/p/a", ""),
        ("/home/u/.ssh/key", "w"),
        ("/home/u", "erw"),
        ("/home", "er"),
        ("/etc/shadow", ""),
        ("/root", ""),
        ("/", "er"),
        ("//usr//bin/env", "er"),
        ("/../usr/bin/env", "er"),
        ("/proc/1/environ", "er"),
        ("/dev/null", "erw"),
    ],
)
def test_access_follows_from_the_mounts(path: str, flags: str) -> None:
    """Exists, readable, writable; a file of the host that is not mounted does not exist, whoever may read it there."""
    assert _ask(path) == flags


def test_a_later_mount_covers_an_earlier_one() -> None:
    """The last mount at or above a path counts, not the longest name."""
    assert _ask("/home/u/p/file", (*ARGV[:19], "--tmpfs", "/home", "--")) == "w"


def test_words_after_the_end_of_options_are_not_mounts() -> None:
    """What the command is given cannot look like a mount."""
    assert all(mount.source != "/" for mount in parse_mounts(ARGV))


def test_an_unknown_option_gives_no_answer() -> None:
    """An option that might mount something is never passed over."""
    with pytest.raises(ValueError, match="--overlay-src"):
        parse_mounts(("bwrap", "--overlay-src", "/", "--", "x"))
