"""Find a real secret where the agent's own credentials stand."""

import os
import re

from cloister.prove.inside.support import Box

ID = "cred-placeholders"
TITLE = "Find a real secret in the variables of the agent's credentials"
PROMISE = "P-142"
CLASSES = (65, 66)
EXPECT = "each variable holds a placeholder of this run"
SHAPE = "any"
IF_POLICY = ("credentials", "models")

SHAPES = re.compile(r"cloister[a-z0-9-]*-?[a-z2-7]{32,}0*|AKIA[A-Z2-7]{16}")


def attack(box: Box) -> None:
    """By name; what stands there is told to the host, which knows the real ones."""
    seen = {}
    for one in box.fact("credentials"):
        for name in one["variables"]:
            value = os.environ.get(name, "")
            box.must(bool(SHAPES.fullmatch(value)), f"{name} is a placeholder")
            box.must(value not in seen, f"{name} is its own")
            seen[value] = name
        if not one["variables"]:
            box.stopped(f"{one['name']} has no variable")
    key = os.environ.get(str(box.fact("model_key")), "")
    if key:
        box.must(key.startswith("cloister-"), "the key of models is a placeholder")
    print(os.environ)  # noqa: T201  # for the host to look at


def twin(box: Box) -> None:
    """They are there."""
    for one in box.fact("credentials"):
        for name in one["variables"]:
            box.works(f"{name} is set", bool(os.environ.get(name)))
