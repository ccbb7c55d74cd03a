"""Statements that an owner adds for one agent: they refuse or count, and cannot leave the agent's chain."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.egress.nft_statements import MAX_LENGTH, check_statement

GOOD = (
    "tcp dport 22 counter reject",
    "tcp dport 22 reject with tcp reset",
    "udp dport 1-1023 drop",
    "ip daddr 198.51.100.0/24 counter drop",
    "ip daddr 198.51.100.1-198.51.100.9 drop",
    "ip6 daddr 2001:4860::/32 tcp dport 443 reject with icmpx admin-prohibited",
    "meta l4proto udp limit rate over 100/second burst 20 packets drop",
    "icmp type echo-request drop",
    "meta length > 1400 counter",
)
BAD = {
    "accept": "only refuse or count",
    "tcp dport 22 accept": "only refuse or count",
    "return": "only refuse or count",
    "continue": "only refuse or count",
    "goto pass": "leads out",
    "jump pass": "leads out",
    "tcp dport vmap { 22 : accept }": "leads out",
    "queue": "leads out",
    "tcp dport { 22, 25 } reject": "without braces",
    "drop }": "without braces",
    "drop; accept": "without braces",
    "drop ; accept": "without braces",
    "drop  counter": "one space",
    "": "one space",
    " drop": "one space",
    "drop\n\t}\n}\nflush ruleset": "printable ASCII",
    "drop\\": "not a word",
    "drop # rest": "not a word",
    'counter comment "x"': "not a word",
    "meta mark set 1": "not a word",
    "notrack": "not a word",
    "dnat to 10.0.0.1": "not a word",
    "redirect to 80": "not a word",
    "masquerade": "not a word",
    "log drop": "not a word",
    "update @refused4_0 reject": "not a word",
    "ip daddr $X drop": "not a word",
    "include /etc/passwd": "not a word",
    "tcp dport 22": "does nothing",
    "ip6 daddr fe80::1%eth0 drop": "not a word",
    "ip daddr 10.0.0.9-10.0.0.1 drop": "not a word",
    "tcp dport \uff12\uff12 drop": "printable ASCII",
    "drop " * 100 + "drop": "longer",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_refuses_or_counts_is_a_statement(text: str) -> None:
    """Ports, networks, protocols, rates and lengths may be refused or counted."""
    check_statement(text)


@pytest.mark.parametrize(("text", "why"), BAD.items())
def test_what_could_do_more_is_none(text: str, why: str) -> None:
    """BF5: nothing that opens, leads elsewhere, ends its line or speaks of others' packets gets into the table."""
    with pytest.raises(ValueError, match=re.escape(why)):
        check_statement(text)


@given(st.text(alphabet='acdejoprtu{};\n\\ "@$#0123456789./:-,<>=!', max_size=60) | st.text(max_size=60))
def test_nothing_with_a_meaning_of_its_own_gets_through(text: str) -> None:
    """Whatever is accepted is one line of plain words, without what nft would read as more than that."""
    try:
        check_statement(text)
    except ValueError:
        return
    assert len(text) <= MAX_LENGTH
    assert text.isprintable()
    assert not set(text) & set("{};\\\"@$#,*'()&|`")
    assert not {"accept", "return", "continue", "jump", "goto"} & set(text.split(" "))
