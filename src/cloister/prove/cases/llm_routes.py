"""Reach more of a provider than model calls."""

import os

from cloister.prove.inside.clients import model
from cloister.prove.inside.support import Box

ID = "llm-routes"
TITLE = "Reach other parts of a provider's API through the proxy"
PROMISE = "P-217"
CLASSES = (54, 55)
EXPECT = "only the routes of model calls exist; every other spelling is 404"
SHAPE = "any"
IF_POLICY = ("models",)
LIMIT_S = 30.0

TARGETS = (
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/organizations/me"),
    ("GET", "/v1/organizations/api_keys"),
    ("POST", "/v1/messages/batches"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/assistants"),
    ("DELETE", "/v1/models/x"),
    ("PUT", "/v1/messages"),
    ("GET", "/v1/messages"),
    ("TRACE", "/v1/messages"),
    ("POST", "/v1//messages"),
    ("POST", "//v1/messages"),
    ("POST", "/v1/messages/"),
    ("POST", "/v1/./messages"),
    ("POST", "/v1/x/../files"),
    ("POST", "/v1/%6dessages/batches"),
    ("POST", "/v1/messages%2fbatches"),
    ("POST", "/v1/messages;x=1"),
    ("POST", "/V1/MESSAGES"),
    ("POST", "/v1/messages\\..\\files"),
    ("GET", "/admin"),
    ("GET", "/metrics"),
    ("GET", "/debug"),
)


def attack(box: Box) -> None:
    """With the run's own key, so that only the route is what is refused."""
    key = os.environ[str(box.fact("model_key"))]
    for method, target in TARGETS:
        fields = {"x-api-key": key, "Authorization": f"Bearer {key}"}
        try:
            answer = model(method, target, fields, {"model": "x"} if method in ("POST", "PUT") else None)
        except ConnectionError as error:
            box.stopped(f"{method} {target}: {type(error).__name__}")
            continue
        box.must(not answer.status or answer.reason in ("route-unknown", "bad-request"), f"{method} {target}: {answer}")


def twin(box: Box) -> None:
    """The proxy says that it is well."""
    box.works("GET /healthz", model("GET", "/healthz", {}).status == 200)
