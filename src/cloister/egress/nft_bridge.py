"""The packet filter of the bridge of microVMs, as nft(8) text: two tables, loaded in one transaction.

`bridge` sees each frame with the tap it came by: it lets pass ARP requests of this guest for the gateway, and TCP of
this guest to its own run's listener, each judged as a whole (tap, MAC, addresses, port) against a set that hostd fills.
So no frame of a guest gets to another guest, to another port or address of the host, or anywhere else, under whatever
name. `inet` sees what arrives on the bridge's own address: it refuses it once more, refuses everybody who is not on the
bridge (the LAN behind another interface, programs of this host), forwards nothing, and lets only the socket of that
guest's own user answer. Each packet is judged by itself; fragments are refused. The text names no address and no guest:
those are elements of its sets. Text out, nothing in.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloister.plan.bridge import BRIDGE, MAC, TABLE, TAP_PREFIX

SETS = {
    ("bridge", "talks"): "ifname . ether_addr . ipv4_addr . ipv4_addr . inet_service",
    ("bridge", "knows"): "ifname . ether_addr . ether_addr . ipv4_addr . ipv4_addr",
    ("inet", "reaches"): "ipv4_addr . ipv4_addr . inet_service",
    ("inet", "listeners"): "uid . ipv4_addr . inet_service",
    ("inet", "gateways"): "ipv4_addr",
}
"""The sets by family and name, and what an element is: tap, MAC, guest, gateway, port, in the order of the rules."""
_BRIDGE = f"""\
	chain prerouting {{
		type filter hook prerouting priority -300; policy accept;
		iifname "{TAP_PREFIX}*" goto from_guest
	}}
	chain from_guest {{
		ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation request \
iifname . ether saddr . arp saddr ether . arp saddr ip . arp daddr ip @knows accept
		ether type ip ip protocol tcp ip frag-off & 0x3fff == 0 ether daddr {MAC} \
iifname . ether saddr . ip saddr . ip daddr . tcp dport @talks accept
		counter name from_guests drop
	}}
	chain forward {{
		type filter hook forward priority -300; policy accept;
		iifname "{TAP_PREFIX}*" counter name between drop
		oifname "{TAP_PREFIX}*" counter name between drop
	}}
	chain output {{
		type filter hook output priority -300; policy accept;
		oifname "{TAP_PREFIX}*" goto to_guest
	}}
	chain to_guest {{
		ether type ip ip protocol tcp ether saddr {MAC} \
oifname . ether daddr . ip daddr . ip saddr . tcp sport @talks accept
		ether type arp ether saddr {MAC} arp operation reply arp saddr ether {MAC} \
oifname . ether daddr . arp daddr ether . arp daddr ip . arp saddr ip @knows accept
		counter name to_guests drop
	}}
"""
_INET = f"""\
	chain input {{
		type filter hook input priority -10; policy accept;
		iifname "{BRIDGE}" goto from_guest
		ip daddr @gateways counter name strangers drop
	}}
	chain from_guest {{
		meta nfproto ipv4 meta l4proto tcp ip saddr . ip daddr . tcp dport @reaches accept
		counter name from_guests drop
	}}
	chain forward {{
		type filter hook forward priority -10; policy accept;
		iifname "{BRIDGE}" counter name forwarded drop
		oifname "{BRIDGE}" counter name forwarded drop
	}}
	chain output {{
		type filter hook output priority -10; policy accept;
		oifname "{BRIDGE}" goto to_guest
	}}
	chain to_guest {{
		meta nfproto != ipv4 counter name to_guests drop
		meta l4proto != tcp counter name to_guests drop
		tcp flags & (syn | ack) == syn counter name to_guests drop
		tcp flags & syn == syn goto answers
		ip daddr . ip saddr . tcp sport @reaches accept
		counter name to_guests drop
	}}
	chain answers {{
		meta skuid . ip saddr . tcp sport @listeners ip daddr . ip saddr . tcp sport @reaches accept
		counter name to_guests drop
	}}
"""
COUNTERS = {
    "bridge": ("from_guests", "to_guests", "between"),
    "inet": ("from_guests", "to_guests", "strangers", "forwarded"),
}
"""What each table counts, all of it refused."""


def ruleset() -> str:
    """Return the text for `nft -f`: new tables, without guests, take the place of the old ones."""
    return "".join(_table(family, chains) for family, chains in (("bridge", _BRIDGE), ("inet", _INET)))


def _table(family: str, chains: str) -> str:
    counters = "".join(f"\tcounter {name} {{ }}\n" for name in COUNTERS[family])
    head = f"table {family} {TABLE} {{}}\ndelete table {family} {TABLE}\ntable {family} {TABLE} {{\n"
    return f"{head}{counters}{''.join(_sets(family))}{chains}}}\n"


def _sets(family: str) -> Iterable[str]:
    for (of, name), kind in SETS.items():
        if of == family:
            yield f"\tset {name} {{\n\t\ttype {kind}\n\t}}\n"
