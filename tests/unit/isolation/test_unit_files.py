"""Unit files of our daemons: what they may and may not, said once, and no word of a path changes its meaning."""

import configparser
import shlex

from hypothesis import given
from hypothesis import strategies as st

from cloister.isolation import unit_files
from cloister.isolation.unit_files import DaemonFacts
from cloister.plan.system_diff import HEAD
from cloister.plan.unit import SKELETON, Account

FACTS = DaemonFacts(
    python="/opt/cloister/bin/python",
    root_links={"bin": "usr/bin", "lib": "usr/lib"},
    root_directories=("usr", "etc", "opt", "run", "var"),
)
ACCOUNT = Account(name="cl-pi-alice", uid=1_900_000_000, agent="pi", user="alice")
GATEWAY = Account(name="cl-home", uid=1_900_000_001, agent="openclaw", service="home")


def values(text: str, section: str = "Service") -> dict[str, list[str]]:
    """Return the settings of a section; those that stand several times, in order."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif "=" in line and not line.startswith("#") and current == section:
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_all_files_say_whose_they_are() -> None:
    """The first line tells a reader, and `cloister apply`, who wrote it."""
    texts = [*unit_files.daemon_units(FACTS).values(), unit_files.sysusers(()), unit_files.tmpfiles((), ())]
    assert all(text.startswith(HEAD) for text in texts)
    assert set(unit_files.daemon_units(FACTS)) == {
        f"/etc/systemd/system/{name}"
        for name in (
            "cloister.slice", "cloister-hostd.socket", "cloister-hostd.service",
            "cloister-proxyd.socket", "cloister-proxyd.service",
        )
    }  # fmt: skip


def test_the_daemon_of_root_keeps_eight_capabilities_each_with_its_reason() -> None:
    """What is left of root is listed, and the file itself says why; without a network, without new programs' rights."""
    text = unit_files.hostd_service(FACTS)
    found = values(text)
    names = [name for name, _ in unit_files.HOSTD_CAPABILITIES]
    assert found["CapabilityBoundingSet"] == [" ".join(names)]
    assert "CAP_NET_RAW" not in names
    assert "CAP_SYS_MODULE" not in names
    for name, why in unit_files.HOSTD_CAPABILITIES:
        assert f"#   {name}: {why}" in text
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["RestrictAddressFamilies"] == ["AF_UNIX AF_NETLINK"]
    assert found["IPAddressDeny"] == ["any"]
    assert len(names) == 8
    assert found["ProtectSystem"] == ["full"]
    assert not {"ProtectHome", "PrivateTmp", "TemporaryFileSystem"} & set(found), "workspaces must be seen as they are"


def test_the_systems_broker_has_no_power_and_only_the_keys_that_are_named() -> None:
    """Its own user, no capability, a read-only system; each key by its own line, with or without a path."""
    found = values(unit_files.proxyd_service(FACTS, [("file-1", "/etc/cloister/keys/a b%c"), ("token", "")]))
    assert found["User"] == ["cloister-proxy"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"]
    assert found["ProtectHome"] == ["yes"]
    assert found["LoadCredential"] == ['"file-1:/etc/cloister/keys/a b%%c"', "token"]
    assert "LoadCredential" not in values(unit_files.proxyd_service(FACTS))
    assert "Environment" not in found


def test_the_interpreter_is_isolated_from_who_calls() -> None:
    """-I: neither variables nor the current directory say what is imported."""
    for text, module in ((unit_files.hostd_service(FACTS), "hostd"), (unit_files.proxyd_service(FACTS), "proxyd")):
        assert values(text)["ExecStart"] == [f"/opt/cloister/bin/python -I -m cloister.services.{module}"]


def test_everybody_may_ask_hostd_and_only_root_the_broker() -> None:
    """Modes of the sockets."""
    assert values(unit_files.hostd_socket(), "Socket")["SocketMode"] == ["0666"]
    assert values(unit_files.proxyd_socket(), "Socket")["SocketMode"] == ["0600"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=40))
def test_a_word_stays_one_word(text: str) -> None:
    """Spaces, quotes, specifiers and variables in a path mean nothing to systemd: unquoting gives the path back."""
    quoted = unit_files.word(text)
    assert "\n" not in quoted
    if quoted != text:
        assert quoted[0] == quoted[-1] == '"'
        inner = quoted[1:-1].replace("\\n", "\n").replace("\\t", "\t") if "\\\\" not in quoted else None
        if inner is not None:
            assert inner.replace('\\"', '"').replace("%%", "%").replace("$$", "$") == text
    else:
        assert shlex.split(text) == [text]


def test_users_have_neither_home_nor_shell_and_their_own_number() -> None:
    """sysusers.d(5) would take another number where ours is not given, and a colon in a comment is refused."""
    lines = unit_files.sysusers((ACCOUNT, GATEWAY)).splitlines()[1:]
    assert lines[0].split()[:3] == ["u", "cloister-proxy", "-"]
    assert lines[1].split()[:3] == ["u", "cloister-audit", "-"]
    assert lines[2].split()[:3] == ["u", "cloister-export", "-"]
    assert lines[3] == 'u cl-pi-alice 1900000000 "Cloister pi of alice" /nonexistent /usr/sbin/nologin'
    assert lines[4] == 'u cl-home 1900000001 "Cloister service home" /nonexistent /usr/sbin/nologin'
    assert all(line.endswith("/usr/sbin/nologin") for line in lines)
    assert not any(":" in shlex.split(line)[3] for line in lines)


def test_the_skeleton_is_like_the_host() -> None:
    """`bin` is a link where it is one here, and a place to mount on where it is a directory; nothing else is in it."""
    real, links = unit_files.skeleton(FACTS)
    assert {link.path: link.target for link in links} == {f"{SKELETON}/bin": "usr/bin", f"{SKELETON}/lib": "usr/lib"}
    assert [one.path for one in real] == [f"{SKELETON}/opt"]
    split = DaemonFacts(python="/p", root_links={}, root_directories=("bin", "lib", "usr"))
    assert [one.path for one in unit_files.skeleton(split)[0]] == [f"{SKELETON}/bin", f"{SKELETON}/lib"]
    text = unit_files.tmpfiles((*unit_files.runtime_directories(), *real), links)
    assert f"d {SKELETON}/run/cloister/box 0755 root root -" in text
    assert f"L {SKELETON}/bin - - - - usr/bin" in text
    assert all(line.startswith(("#", "d /run/cloister", "L /run/cloister")) for line in text.splitlines())


def test_units_are_read_by_a_strict_parser() -> None:
    """Sections and keys are where systemd looks for them."""
    for path, text in unit_files.daemon_units(FACTS).items():
        parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
        parser.read_string(text)
        assert "Unit" in parser, path
