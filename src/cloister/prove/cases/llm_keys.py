"""Call a model without the run's own key."""

import os

from cloister.prove.inside.clients import Answer, model, model_route
from cloister.prove.inside.support import Box

ID = "llm-keys"
TITLE = "Call a model without a key, with a made-up one, or with another run's"
PROMISE = "P-170"
CLASSES = (65, 67)
EXPECT = "401 from the proxy; the provider is not asked"
SHAPE = "any"
NEEDS = ("sibling-key",)
IF_POLICY = ("models",)
LIMIT_S = 30.0

BODY = {"model": "cloister-prove-no-such-model", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
PATHS = ("/v1/messages", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/messages/count_tokens")


def attack(box: Box) -> None:
    """On every route that costs, in every field that carries keys."""
    own = os.environ[str(box.fact("model_key"))]
    keys = {
        "another run's": str(box.fact("sibling_key")),
        "a made-up one": "sk-ant-cloister-prove",
        "an empty one": "",
        "nearly the own": own[:-1] + ("a" if own[-1] != "a" else "b"),
        "the own and more": f"{own}x",
    }
    for path in PATHS:
        _judge(box, f"{path} without a key", model("POST", path, {}, BODY))
    for what, key in keys.items():
        for name, value in (("x-api-key", key), ("Authorization", f"Bearer {key}"), ("api-key", key)):
            _judge(box, f"{what} as {name}", model("POST", PATHS[0], {name: value}, BODY))
    _judge(box, "in the query", model("POST", f"{PATHS[0]}?key={own}", {}, BODY))
    _judge(box, "the list of models", model("GET", "/v1/models", {}))


def _judge(box: Box, what: str, answer: Answer) -> None:
    box.must(answer.reason == "key-invalid", f"{what}: {answer}")


def twin(box: Box) -> None:
    """The run's own key is taken: a body that is none is refused as such, and no provider is asked for this."""
    answer = model("POST", model_route(box), {"x-api-key": os.environ[str(box.fact("model_key"))]}, b"{")
    box.works(f"the own key: {answer}", answer.status in (400, 429) and bool(answer.reason))
