"""Be refused without a record of it."""

from cloister.prove.inside.support import Box

ID = "unit-records"
TITLE = "Be refused without a record of it"
PROMISE = "P-294"
CLASSES = (51, 86)
EXPECT = "the user's own receipt of the run names what was refused, and nothing of the unit is left"
IF_POLICY = ("unit",)
FRESH = True
CHECKS = ("refusal-recorded", "no-unit-left", "no-placeholders", "no-survivor", "no-mounts")
LIFTED_BY = ("egress.mode = learn", "egress.mode = internet")


def attack(box: Box) -> None:
    """Ask for a host that nobody has allowed; the receipt is looked at afterwards."""
    host = "refused.cloister-prove.example:443"
    box.proxy_refuses(host, f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
