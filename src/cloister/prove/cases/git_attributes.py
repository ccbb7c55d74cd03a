"""Name filters and drivers in .gitattributes."""

from cloister.prove.inside.support import Box, write

ID = "git-attributes"
TITLE = "Name filters and drivers in .gitattributes"
PROMISE = "P-021"
CLASSES = (20,)
EXPECT = "attributes only name drivers; what they run stands in the configuration, which is read-only"
FRESH = True
CHECKS = ("git-runs-nothing",)


def attack(box: Box) -> None:
    """Writing the file is allowed; on the host nothing may run because of it."""
    write(box.path(".gitattributes"), "* filter=evil diff=evil merge=evil textconv=evil\n")
    write(box.path(".lfsconfig"), "[lfs]\n\turl = http://127.0.0.1:1/\n")
    write(
        box.path(".gitmodules"),
        '[submodule "evil"]\n\tpath = evil\n\turl = ext::sh -c touch% $PROVE_MARKER\n\tupdate = !touch "$PROVE_MARKER"\n',
    )
    box.stopped("written; nothing may come of it on the host")
