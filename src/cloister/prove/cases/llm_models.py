"""Call a model that the policy does not name, or by a body that two readers read differently."""

import os
from fnmatch import fnmatchcase

from cloister.prove.inside.clients import model, model_route
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
    patterns = [str(pattern) for pattern in box.fact("models")]
    for what, name in {"another model": OTHER, "another by a blank": f" {(patterns or ['x'])[0]}"}.items():
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            bodies[what] = b'{"model":"%b",%b}' % (name.encode(), REST)
        else:
            box.stopped(f"{what}: the policy allows it")
    for what, body in bodies.items():
        answer = model("POST", model_route(box), key, body)
        if answer.status in (401, 429):
            box.surprises.append(f"{what}: the model was not looked at ({answer})")
        else:
            box.must(answer.ours and answer.status < 500, f"{what}: {answer}")
