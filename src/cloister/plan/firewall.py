"""Names that the packet filter of agents' accounts goes by: its table, its file, its units.

Several rooms speak of them: `egress` writes the table's text, `isolation` the units', `host` loads and compares,
`services` watches. Nothing is decided here.
"""

from __future__ import annotations

from cloister.plan.unit import RUNTIME, STATE

TABLE = "cloister"
"""In the family inet of the host's own network namespace. A run in mode `internet` has one of this name in its own."""
FILE = f"{STATE}/firewall.nft"
"""What is loaded at boot, root's, mode 0600."""
EXPECTED = f"{RUNTIME}/firewall.expected"
"""What a listing of the table must look like, as a digest; made of `FILE` in a network namespace of its own."""
FIREWALL_UNIT = "cloister-firewall.service"
WATCHDOG_UNIT = "cloister-watchdog.service"
