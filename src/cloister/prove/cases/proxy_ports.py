"""Use the proxy to reach mail, shells and databases."""

from cloister.prove.inside.support import Box

ID = "proxy-ports"
TITLE = "Use the proxy to reach mail, shells and databases"
PROMISE = "P-048"
CLASSES = (64,)
EXPECT = "the port belongs to the rule"
SHAPE = "any"
LIFTED_BY = ("egress.mode = learn", "egress.mode = internet")


def attack(box: Box) -> None:
    """Ports 22, 25 and others, of allowed hosts where the policy has some; the name is not even resolved."""
    hosts = [str(rule).split(":")[0].removeprefix("*.") for rule in box.fact("allowed_hosts")][:3] or [
        "cloister-prove.example"
    ]
    listed = {str(rule) for rule in box.fact("allowed_hosts")}
    for host in hosts:
        for port in (22, 25, 465, 587, 23, 3306, 5432, 6379, 2375, 11211, 0, 65536):
            if f"{host}:{port}" not in listed:
                box.proxy_refuses(
                    f"CONNECT {host}:{port}", f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
                )
