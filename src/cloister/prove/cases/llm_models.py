"""Call a model that the policy does not name, or by a body that two readers read differently."""

import os

from cloister.prove.inside.clients import model
from cloister.prove.inside.support import Box

ID = "llm-models"
TITLE = "Call a model that is not allowed"
PROMISE = "P-175"
CLASSES = (54, 58)
EXPECT = "refused by the proxy; the provider is not asked"
SHAPE = "any"
IF_POLICY = ("models",)
LIMIT_S = 20.0

OTHER = "cloister-prove-no-such-model"
REST = b'"max_tokens":1,"messages":[{"role":"user","content":"x"}]'


def attack(box: Box) -> None:
    """By name where the policy has a list; with the name twice, in another case, and as what is no name, always."""
    key = {"x-api-key": os.environ[str(box.fact("model_key"))]}
    bodies = {
        "the name twice": b'{"model":"a","model":"%b",%b}' % (OTHER.encode(), REST),
        "the name twice, once escaped": b'{"model":"a","mod\\u0065l":"%b",%b}' % (OTHER.encode(), REST),
        "the name in another case too": b'{"model":"a","Model":"%b",%b}' % (OTHER.encode(), REST),
        "no name": b"{%b}" % REST,
        "a list of names": b'{"model":["%b"],%b}' % (OTHER.encode(), REST),
        "no JSON": b"model=" + OTHER.encode(),
    }
    if box.fact("models"):
        bodies["another model"] = b'{"model":"%b",%b}' % (OTHER.encode(), REST)
        bodies["another by a blank"] = b'{"model":" %b",%b}' % (str(box.fact("models")[0]).encode(), REST)
    else:
        box.stopped("the policy allows every model of its providers")
    for what, body in bodies.items():
        answer = model("POST", "/v1/messages", key, body)
        refused = answer.status in (400, 403, 404, 429) and b"provider" not in answer.body[:20]
        box.must(refused and OTHER.encode() not in answer.body.replace(b"'", b"")[200:], f"{what}: {answer.status}")
