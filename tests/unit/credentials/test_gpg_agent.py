"""The filter in front of a gpg-agent, attacked: named keys sign, and nothing else is done."""

import pytest

from cloister.credentials.gpg_agent import GpgAgentFilter, GpgGrant, GpgStep

GRIP, OTHER = "A" * 40, "B" * 40
DIGEST = "0123456789abcdef" * 4
SIGNATURE = [b"D (7:sig-val(5:eddsa(1:r32:%25%0A))) ", b"OK"]


def judge() -> GpgAgentFilter:
    """Return a connection of an agent with one key."""
    return GpgAgentFilter("claude", [GpgGrant("sign", "F" * 40, frozenset({GRIP}))])


def talk(filter_: GpgAgentFilter, *lines: str) -> list[str]:
    """Send lines, let the agent answer OK; return what reached it."""
    asked = []
    for line in lines:
        step = filter_.request(line.encode())
        if step.ask:
            asked.append(step.ask.decode().rstrip("\n"))
            filter_.answered([b"OK"])
    return asked


def test_what_gpg_says_to_sign_passes() -> None:
    """The talk of gpg 2.2, as it is: options are dropped, the person reads our words, the signature comes back."""
    filter_ = judge()
    asked = talk(
        filter_, "RESET", "OPTION ttyname=/dev/pts/1", "GETINFO version", "OPTION allow-pinentry-notify",
        "OPTION agent-awareness=2.1.0", "SCD SERIALNO", f"HAVEKEY {OTHER} {GRIP}", "RESET", f"SIGKEY {GRIP}",
        "SETKEYDESC Your+bank+asks", f"SETHASH 8 {DIGEST}",
    )  # fmt: skip
    step = filter_.request(b"PKSIGN")
    done = filter_.answered([b"S PROGRESS x", *SIGNATURE])

    assert asked[:4] == ["RESET", "GETINFO version", f"HAVEKEY {GRIP}", "RESET"]
    assert asked[4] == f"SIGKEY {GRIP}"
    assert asked[5].startswith("SETKEYDESC The+agent+claude")
    assert asked[6] == f"SETHASH 8 {DIGEST}"
    assert step.ask == b"PKSIGN\n"
    assert done.reply == b"\n".join(SIGNATURE) + b"\n"
    assert done.event is not None
    assert (done.event.verdict, done.event.use, done.event.key, done.event.credential) == (
        "allow", "gpg", "F" * 40, "sign"
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["PKDECRYPT", f"EXPORT_KEY {GRIP}", f"EXPORT_KEY --openpgp {GRIP}", "IMPORT_KEY", f"DELETE_KEY {GRIP}", "GENKEY",
     f"PASSWD {GRIP}", "PRESET_PASSPHRASE x -1 00", "GET_PASSPHRASE x x x x", "CLEAR_PASSPHRASE x", "KILLAGENT",
     "RELOADAGENT", "LEARN", f"READKEY {GRIP}", "KEYWRAP_KEY --export", "GET_CONFIRMATION x", "LISTTRUSTED",
     "MARKTRUSTED a b c", "UPDATESTARTUPTTY", "GETEVENTCOUNTER", "KEYTOCARD x", "PUTVAL x", "GETVAL x", "AGENT_ID",
     "D data", "END", "CAN", "INQUIRE x", "HELP", "KEYATTR x", "GENKEY --preset", "pkdecrypt", "ISTRUSTED " + "A" * 40],
)  # fmt: skip
def test_other_commands_do_not_exist(line: str) -> None:
    """Whatever else gpg-agent knows, also in small letters, is forbidden, recorded, and never reaches it."""
    step = judge().request(line.encode())

    assert step.ask == b""
    assert step.reply.startswith(b"ERR ")
    assert step.event is not None
    assert step.event.verdict == "deny"


@pytest.mark.parametrize(
    "line",
    ["GETINFO socket_name", "GETINFO pid", "GETINFO version extra", "HAVEKEY --list", "HAVEKEY --list=1000", "HAVEKEY",
     f"HAVEKEY {OTHER}", f"KEYINFO {OTHER}", "KEYINFO --list", "KEYINFO --ssh-list", "OPTION pinentry-mode=loopback",
     "OPTION pretend-request-origin=browser", "SCD SERIALNO", "SCD PKSIGN", f"HAVEKEY {GRIP.lower()}"],
)  # fmt: skip
def test_questions_about_more_are_answered_here(line: str) -> None:
    """What a client would like to know or set beyond its keys fails, quietly: gpg asks some of it by itself."""
    step = judge().request(line.encode())

    assert step.ask == b""
    assert step.reply.startswith(b"ERR ")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((f"SIGKEY {OTHER}",), "key-not-named"),
        (("PKSIGN",), "key-not-chosen"),
        ((f"SETHASH 8 {DIGEST}", "PKSIGN"), "key-not-chosen"),
        ((f"SIGKEY {GRIP}", "PKSIGN"), "key-not-chosen"),
        ((f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}", "RESET", "PKSIGN"), "key-not-chosen"),
        ((f"SIGKEY {GRIP}", f"SIGKEY {OTHER}"), "key-not-named"),
        ((f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}", f"SETKEY {OTHER}"), "key-not-named"),
        ((f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}", "PKSIGN", "PKSIGN"), "key-not-chosen"),
        ((f"SIGKEY {GRIP}", f"SETHASH 2 {DIGEST[:40]}"), "data-refused"),
        ((f"SIGKEY {GRIP}", "SETHASH --hash=md5 " + DIGEST[:32]), "data-refused"),
        ((f"SIGKEY {GRIP}", "SETHASH --inquire"), "data-refused"),
        ((f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}00"), "data-refused"),
        ((f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST[:-1]}x"), "data-refused"),
        ((f"SIGKEY {GRIP}\rPKDECRYPT",), "request-malformed"),
        ((f"SIGKEY {GRIP}\nPKDECRYPT",), "request-malformed"),
        (("X" * 1001,), "request-malformed"),
        (("",), "request-malformed"),
        ((" PKSIGN",), "request-malformed"),
    ],
)
def test_attacks_get_no_signature(lines: tuple[str, ...], reason: str) -> None:
    """A signature needs a named key and a fresh SHA-2 digest, on this connection, in this order."""
    filter_ = judge()
    talk(filter_, *lines[:-1])
    step = filter_.request(lines[-1].encode())

    assert step.ask == b""
    assert step.event is not None
    assert step.event.reason == reason


def test_after_another_key_was_tried_none_is_chosen() -> None:
    """A refused SIGKEY takes the earlier choice back, as gpg-agent itself would: no signature by surprise."""
    filter_ = judge()
    talk(filter_, f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}", f"SIGKEY {OTHER}")

    assert filter_.request(b"PKSIGN").ask == b""


@pytest.mark.parametrize("answer", [[], [b""], [b"ERR"], [b"OKAY"], [b"ERR 1 \x1b[2J"], [b"D x"], [b"INQUIRE x"]])
def test_a_broken_agent_gives_no_signature(answer: list[bytes]) -> None:
    """What is no OK is an error, and only errors that can be shown are passed on."""
    filter_ = judge()
    talk(filter_, f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}")
    filter_.request(b"PKSIGN")
    done = filter_.answered(answer)

    assert done.reply.startswith(b"ERR ")
    assert b"\x1b" not in done.reply
    assert done.event is not None
    assert done.event.verdict == "failed"


def test_the_persons_no_reaches_gpg() -> None:
    """A passphrase that was not given is told as that: the error of the agent comes through."""
    filter_ = judge()
    talk(filter_, f"SIGKEY {GRIP}", f"SETHASH 8 {DIGEST}")
    filter_.request(b"PKSIGN")

    assert filter_.answered([b"ERR 83886179 Operation cancelled <Pinentry>"]).reply == (
        b"ERR 83886179 Operation cancelled <Pinentry>\n"
    )


def test_only_named_keys_are_described() -> None:
    """KEYINFO of a named key gives its line, and no other line that an agent might send."""
    filter_ = judge()
    assert filter_.request(f"KEYINFO {GRIP}".encode()).ask
    lines = [f"S KEYINFO {OTHER} D".encode(), f"S KEYINFO {GRIP} D".encode(), b"S KEYINFO", b"D secret", b"OK"]

    assert filter_.answered(lines).reply == f"S KEYINFO {GRIP} D\nOK\n".encode()


def test_leaving_and_an_agent_that_is_gone() -> None:
    """BYE ends the connection; so does an agent that does not answer, with an event that says so."""
    assert judge().request(b"BYE") == GpgStep(b"OK closing connection\n", close=True)
    gone = judge().unreachable()

    assert gone.close
    assert gone.event is not None
    assert gone.event.reason == "agent-unreachable"
