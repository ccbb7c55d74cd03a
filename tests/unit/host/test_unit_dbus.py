"""The properties of a unit as D-Bus has them, and the call that asks for one."""

import struct

import pytest

from cloister.host import unit_dbus, unit_floor, unit_floor_network
from cloister.host.unit_start import asked_of_manager
from cloister.plan.unit import FIRST_UID, UnitLaunch

UNIT = UnitLaunch(
    unit="cloister-run-x.service", account="a", uid=FIRST_UID, mounts=(),
    properties=(("User", "a"), ("StandardOutput", "null"), ("CollectMode", "inactive-or-failed")),
)  # fmt: skip


def test_every_property_of_the_floor_has_a_form_and_no_other() -> None:
    """Two tables of one set of names: a name in one of them alone would be refused, or set by nobody's leave."""
    streams = {"StandardInput", "StandardOutput", "StandardError"}
    floor = set(unit_floor._ALLOWED) | set(unit_floor_network._PROPERTIES)  # the tables themselves are meant
    assert set(unit_dbus.FORMS) == (floor | {"NetworkNamespacePath"}) - streams


@pytest.mark.parametrize("value", ["no", "user time-travel"])
def test_an_unknown_namespace_is_not_left_out(value: str) -> None:
    """A word that is not understood is an error, never a weaker restriction; those of clone(2) are its flags."""
    with pytest.raises(ValueError, match="RestrictNamespaces"):
        unit_dbus.convert("RestrictNamespaces", value)
    assert unit_dbus.convert("RestrictNamespaces", "user net") == [("RestrictNamespaces", "t", 0x50000000)]


def test_streams_are_descriptors_and_a_failed_unit_is_kept() -> None:
    """What a plan says of streams is replaced by descriptors, and of CollectMode by what tells how a unit ended."""
    assert asked_of_manager(UNIT) == (("User", "a"), ("CollectMode", "inactive"))


def test_words_reach_the_shim_as_they_are() -> None:
    """The manager is told not to replace `$NAME`; words, properties and streams stand in the call, and nothing else."""
    call = unit_dbus.start_call(UNIT.unit, asked_of_manager(UNIT), ("/shim", "$HOME", "%n"))

    def text(word: str) -> bytes:
        return struct.pack("<I", len(word)) + word.encode() + b"\0"

    for word in ("cloister-run-x.service", "fail", "User", "CollectMode", "/shim", "$HOME", "%n", "no-env-expand"):
        assert text(word) in call, word
    for at, stream in enumerate((b"StandardInput", b"StandardOutput", b"StandardError")):
        place = call.index(stream + b"FileDescriptor\0") + len(stream) + len(b"FileDescriptor\0")
        assert call[place : place + 3] == b"\x01h\0"
        assert struct.unpack_from("<I", call, place + 3 + -(place + 3) % 4) == (at,)
    assert call.count(b"\0\x01s\0") == 2  # as variants
    assert call.endswith(bytes(4))  # no other units are made with it


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("MemoryMax", "infinity", [("MemoryMax", "t", unit_dbus.NO_END)]),
        ("MemoryMax", "2G", [("MemoryMax", "t", 2 << 30)]),
        ("CPUQuota", "150%", [("CPUQuotaPerSecUSec", "t", 1_500_000)]),
        ("CPUQuota", "0.5%", [("CPUQuotaPerSecUSec", "t", 5_000)]),
        ("RuntimeMaxSec", "90.5s", [("RuntimeMaxUSec", "t", 90_500_000)]),
        ("RuntimeMaxSec", "infinity", [("RuntimeMaxUSec", "t", unit_dbus.NO_END)]),
        ("LimitCORE", "0", [("LimitCORE", "t", 0), ("LimitCORESoft", "t", 0)]),
        ("RestrictNamespaces", "yes", [("RestrictNamespaces", "t", 0)]),
        ("SystemCallErrorNumber", "EPERM", [("SystemCallErrorNumber", "i", 1)]),
        ("SystemCallFilter", "~@mount swapon", [("SystemCallFilter", "(bas)", (False, ["@mount", "swapon"]))]),
        ("RestrictAddressFamilies", "none", [("RestrictAddressFamilies", "(bas)", (True, []))]),
        ("BindReadOnlyPaths", "-/bin", [("BindReadOnlyPaths", "a(ssbt)", [("/bin", "/bin", True, 0x4000)])]),
        ("UMask", "0077", [("UMask", "u", 0o77)]),
        ("PrivateUsers", "yes", [("PrivateUsers", "b", True)]),
        ("PrivateUsers", "self", [("PrivateUsersEx", "s", "self")]),
    ],
)
def test_what_a_property_becomes(name: str, value: str, typed: list[unit_dbus.Typed]) -> None:
    """Numbers, times, lists and sets are those that systemd-run sends."""
    assert unit_dbus.convert(name, value) == typed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ExecStartPre", "/bin/sh"), ("Environment", "A=b"), ("NoNewPrivileges", "perhaps"), ("NoNewPrivileges", ""),
        ("CapabilityBoundingSet", "CAP_SYS_ADMIN"), ("RestrictNamespaces", "no"), ("SystemCallErrorNumber", "kill"),
        ("IPAddressDeny", "everything"), ("UMask", "rwx"), ("CPUQuota", "much"), ("RuntimeMaxSec", "1 fortnight"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_no_property(name: str, value: str) -> None:
    """A name without a form, or a value of another one, ends the start; it is never left out."""
    with pytest.raises(ValueError, match=r".+"):
        unit_dbus.convert(name, value)


def test_values_are_written_as_d_bus_has_them() -> None:
    """Alignment, lengths and nesting: the example is an array of structs as `dbus-send` writes it."""
    call = unit_dbus.start_call("u", (("BindReadOnlyPaths", "/a:/b"),), ("/c",))
    place = call.index(b"a(ssbt)\0") + 8
    place += -place % 4
    (length,) = struct.unpack_from("<I", call, place)
    start = place + 4 + -(place + 4) % 8
    wanted = struct.pack("<I2sxxI2sxxI4xQ", 2, b"/a", 2, b"/b", 0, 0x4000)
    assert call[start : start + length] == wanted
