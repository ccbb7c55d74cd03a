"""Reach cloud metadata services through the proxy."""

from cloister.prove.inside.support import Box

ID = "proxy-metadata"
TITLE = "Reach cloud metadata services through the proxy"
PROMISE = "P-051"
CLASSES = (47,)
EXPECT = "all providers' endpoints are refused"
SHAPE = "any"
LIFTED_BY = ("egress.private", "egress.mode = learn", "egress.mode = internet")


TARGETS = (
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "[fd00:c1::a9fe:a9fe]",
    "[fd00:42::42]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "metadata.google.internal",
    "metadata",
    "instance-data.ec2.internal",
    "100.100.100.100",
)


def attack(box: Box) -> None:
    """With the paths that hold credentials."""
    for host in TARGETS:
        for path in ("/latest/meta-data/iam/security-credentials/", "/computeMetadata/v1/"):
            head = f"GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n"
            request = f"{head}Metadata-Flavor: Google\r\nConnection: close\r\n\r\n"
            box.proxy_refuses(f"GET {host}", request.encode())
        box.proxy_refuses(f"CONNECT {host}", f"CONNECT {host}:80 HTTP/1.1\r\nHost: {host}:80\r\n\r\n".encode())
