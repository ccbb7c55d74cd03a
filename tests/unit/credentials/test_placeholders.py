"""Placeholders: unique, recognised in every spelling tools use, and no false alarm."""

import base64
from itertools import pairwise
from urllib.parse import quote

import pytest

from cloister.credentials.placeholders import Placeholders, decode_base64

KINDS = {"github": "bearer", "aws": "sigv4", "npm-token": "npm"}


def fresh() -> Placeholders:
    """Return placeholders of a made-up run."""
    return Placeholders(KINDS)


def test_every_run_and_every_credential_has_its_own() -> None:
    """No two credentials and no two runs share a placeholder."""
    runs = [fresh() for _ in range(50)]
    tokens = [run[name].token for run in runs for name in KINDS]

    assert len(set(tokens)) == len(tokens)
    assert len({run["aws"].key_id for run in runs}) == 50


def test_a_placeholder_says_what_it_is() -> None:
    """A person who finds one in a log sees that it is no secret; AWS tools get the lengths they expect."""
    run = fresh()

    assert run["github"].token.startswith("cloister-github-")
    assert run["aws"].key_id.startswith("AKIA")
    assert (len(run["aws"].key_id), len(run["aws"].token)) == (20, 40)
    assert run["github"].key_id == ""


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_a_leak_is_seen_in_every_spelling(name: str, before: bytes) -> None:
    """Plain, base64 at every offset and in both alphabets, and percent-encoded, wholly or in part."""
    run = fresh()
    for text in filter(None, (run[name].token, run[name].key_id)):
        raw = before + text.encode() + b"/tail"
        spellings = [raw, base64.b64encode(raw), base64.urlsafe_b64encode(raw), quote(raw).encode()]
        spellings += ["".join(f"%{byte:02x}" for byte in raw).encode(), b"%63" + raw.replace(b"s", b"%73")]
        for spelled in spellings:
            assert run.leaks(b"noise " * 100 + spelled + b" noise"), spelled


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_each_is_told_from_the_others_in_every_spelling(name: str, before: bytes) -> None:
    """Whose placeholder stands in bytes is known, however it is spelled, and nobody else's is taken for it."""
    run = fresh()
    for text in filter(None, (run[name].token, run[name].key_id)):
        raw = before + text.encode() + b"/tail"
        everywhere = "".join(f"%{byte:02x}" for byte in raw).encode()
        for spelled in (raw, base64.b64encode(raw), base64.urlsafe_b64encode(raw), everywhere, b"%63" + raw):
            assert run.names_in(b"noise " * 100 + spelled + b" noise", KINDS) == {name}, spelled
            assert not run.names_in(spelled, set(KINDS) - {name})
    assert not run.names_in(fresh()[name].token.encode(), KINDS)


def test_nothing_else_is_taken_for_a_leak() -> None:
    """Text about cloister, another run's placeholder and random bytes pass."""
    run, other = fresh(), fresh()
    harmless = [b"cloister-github-", b"cloister", other["github"].token.encode(), bytes(range(256)) * 40, b"%zz%"]

    assert not any(run.leaks(data) for data in harmless)
    assert not Placeholders({}).leaks(b"%41" + run["github"].token.encode())


def test_a_leak_across_chunks_is_seen_with_the_overlap() -> None:
    """With `overlap` bytes of the chunk before in front, no cut hides a placeholder, however it is spelled."""
    run = fresh()
    raw = run["github"].token.encode()
    for spelled in (raw, base64.b64encode(b"x:" + raw), "".join(f"%{byte:02X}" for byte in raw).encode()):
        data = b"a" * 50 + spelled + b"b" * 50
        for cut in range(1, len(data)):
            first, second = data[:cut], data[cut:]
            assert run.leaks(first) or run.leaks(first[-run.overlap :] + second), cut


def test_small_chunks_are_searched_as_one() -> None:
    """Byte by byte, with a window of the overlap, a leak is still seen."""
    run = fresh()
    data, kept, seen = b"--" + run["aws"].key_id.encode() + b"--", b"", False
    for byte in data:
        window = kept + bytes([byte])
        seen = seen or run.leaks(window)
        kept = window[-run.overlap :]

    assert seen


def test_base64_without_padding_and_garbage() -> None:
    """Both alphabets are read, padding or not; garbage is nothing."""
    assert decode_base64(b"PDw_Pz8-Pg") == decode_base64(b"PDw/Pz8+Pg==") == b"<<???>>"
    assert decode_base64(b"not base64 at all") == b""


def test_names_are_those_of_the_start() -> None:
    """A credential that the run did not have has no placeholder."""
    run = fresh()

    assert "github" in run
    assert "later" not in run
    assert all(one != two for one, two in pairwise(sorted(run.names())))


def former_of(run: Placeholders) -> dict[str, tuple[str, str]]:
    """Return a run's placeholders as the record of a snapshot has them."""
    return {name: (run[name].token, run[name].key_id) for name in run.names()}


def test_what_stood_for_a_secret_in_a_kept_memory_stands_for_it_still() -> None:
    """The run that goes on knows its own and those of the run it goes on from; another run's are nothing to it."""
    was, other = fresh(), fresh()
    run = Placeholders(KINDS, former=former_of(was))
    for name in KINDS:
        assert run[name].token != was[name].token
        for good in (run[name].token, was[name].token):
            assert run[name].stands_in(good.encode())
        assert not run[name].stands_in(other[name].token.encode())
    assert run["aws"].stands_in(f"Credential={was['aws'].key_id}/2026".encode())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_former_placeholders_do_not_leave_either(name: str) -> None:
    """In every spelling, as its own; and each is told from the others."""
    was = fresh()
    run = Placeholders(KINDS, former=former_of(was))
    for text in filter(None, (was[name].token, was[name].key_id)):
        raw = b"x" + text.encode() + b"/tail"
        for spelled in (raw, base64.b64encode(raw), quote(raw).encode(), b"%63" + raw.replace(b"s", b"%73")):
            assert run.leaks(b"noise " * 100 + spelled)
            assert run.names_in(b"noise " * 100 + spelled, KINDS) == {name}
    assert not run.leaks(fresh()[name].token.encode())
    assert run.overlap >= Placeholders(KINDS).overlap


def test_a_former_placeholder_of_nothing_is_known_as_such() -> None:
    """The policy grants that credential no more: its placeholder is found, so that it is refused and kept inside."""
    was = fresh()
    run = Placeholders({"github": "bearer"}, former=former_of(was))
    assert set(run.names()) == set(KINDS)
    assert run.leaks(was["npm-token"].token.encode())
