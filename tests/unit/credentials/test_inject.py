"""Injection: the secret stands at its place in its form, and nowhere else."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials import inject
from cloister.credentials.bindings import Binding, InjectionError, Request, bind
from cloister.credentials.inject import find, masks
from cloister.credentials.placeholders import Placeholder
from cloister.policy.model import Credential, Injection
from cloister.policy.variables import variables

TOKEN = Placeholder("cloister-github-mark")
SECRET = b"made-up-secret"


def binding(scheme: str, **keys: object) -> Binding:
    """Return a binding as the policy would give it."""
    inject = Injection(host="api.example.org", scheme=scheme, **keys)  # type: ignore[arg-type]
    made = bind("github", Credential(secret="file:/x", inject=inject, env="TOKEN"), lambda _method, _path: True)
    assert made is not None
    return made


def request(*headers: tuple[bytes, bytes], path: str = "/x") -> Request:
    """Return a request to the bound host."""
    return Request("GET", path, list(headers), b"", "api.example.org")


def put(bound: Binding, secret: bytes, sent: Request) -> Request:
    """Return what leaves."""
    return inject.put(bound, secret, sent, TOKEN)


def basic(user: str, word: str) -> bytes:
    """Return the value of an Authorization field."""
    return b"Basic " + base64.b64encode(f"{user}:{word}".encode())


FORMS = [
    (binding("header", header="X-Api-Key"), b"x-api-key", b"made-up-secret"),
    (binding("header", header="Authorization", value="token {secret}"), b"authorization", b"token made-up-secret"),
    (binding("bearer"), b"authorization", b"Bearer made-up-secret"),
    (binding("basic", user="me"), b"authorization", basic("me", "made-up-secret")),
    (binding("basic", user="me", value="x{secret}y"), b"authorization", basic("me", "xmade-up-secrety")),
    (binding("git"), b"authorization", basic("x-access-token", "made-up-secret")),
    (binding("git", user="oauth2"), b"authorization", basic("oauth2", "made-up-secret")),
    (binding("npm"), b"authorization", b"Bearer made-up-secret"),
    (binding("pip"), b"authorization", basic("__token__", "made-up-secret")),
]


@pytest.mark.parametrize(("bound", "name", "value"), FORMS, ids=lambda one: getattr(one, "scheme", ""))
def test_each_scheme_has_its_form(bound: Binding, name: bytes, value: bytes) -> None:
    """Whatever the client wrote round the placeholder, the form that leaves is the policy's."""
    sent = request((b"accept", b"*/*"), (name.title(), b"Odd " + TOKEN.token.encode()), (b"x-last", b"1"))

    assert find(bound, TOKEN, sent) == "placeholder"
    assert put(bound, SECRET, sent).headers == [(b"accept", b"*/*"), (name.title(), value), (b"x-last", b"1")]
    assert put(bound, SECRET, request()).headers == [(name, value)]


SPELLINGS = [basic("any", TOKEN.token), basic(TOKEN.token, ""), b"Bearer " + TOKEN.token.encode()]


@pytest.mark.parametrize("value", SPELLINGS)
def test_a_placeholder_is_found_in_basic_and_bearer(value: bytes) -> None:
    """Tools send a token as Bearer, as a password or as a user name; each is the placeholder."""
    assert find(binding("git"), TOKEN, request((b"Authorization", value))) == "placeholder"


def test_absent_and_own_values_are_told_apart() -> None:
    """A value of the client's own is neither absent nor ours; a placeholder elsewhere does not count."""
    own = request((b"authorization", b"Bearer other"), (b"x-elsewhere", TOKEN.token.encode()))

    assert find(binding("bearer"), TOKEN, own) == "own"
    assert find(binding("bearer"), TOKEN, request((b"x-elsewhere", TOKEN.token.encode()))) == "absent"
    assert find(binding("header", header="x-key"), TOKEN, own) == "absent"


def test_two_fields_become_one() -> None:
    """A client cannot get its own value beside the secret by sending the field twice."""
    sent = request((b"Authorization", b"Bearer own"), (b"x", b"y"), (b"authorization", TOKEN.token.encode()))

    assert put(binding("bearer"), SECRET, sent).headers == [(b"Authorization", b"Bearer made-up-secret"), (b"x", b"y")]


@pytest.mark.parametrize("secret", [b"", b"a\r\nX-Evil: 1", b"a\nb", b"a\0b", b" a", b"a\t", b"\x7f"])
@pytest.mark.parametrize("scheme", ["bearer", "basic", "git", "header"])
def test_line_breaks_never_get_into_a_field(secret: bytes, scheme: str) -> None:
    """A secret that would break a header is refused, and the error holds nothing of it."""
    with pytest.raises(InjectionError) as caught:
        put(binding(scheme, header="x-key"), secret, request())

    assert caught.value.reason == "secret-unusable"
    assert "Evil" not in f"{caught.value!r} {caught.value.explanation}"


def test_odd_bytes_travel_as_they_are() -> None:
    """Bytes over 127 are allowed in a field (obs-text) and in base64."""
    secret = "pä$$:wörd".encode()

    assert put(binding("bearer"), secret, request()).headers[0][1] == b"Bearer " + secret
    assert base64.b64decode(put(binding("basic", user="me"), secret, request()).headers[0][1][6:]) == b"me:" + secret


def test_query_parameters() -> None:
    """The parameter is replaced where it stands, once; the others stay byte for byte; a missing one is added."""
    bound = binding("query", query="key")
    sent = request(path=f"/x?a=%2f+&key={TOKEN.token}&b&k%65y=own")

    assert find(bound, TOKEN, sent) == "placeholder"
    assert put(bound, b"a&b=c d", sent).path == "/x?a=%2f+&key=a%26b%3Dc%20d&b"
    assert put(bound, SECRET, request(path="/x")).path == "/x?key=made-up-secret"
    assert put(bound, SECRET, request(path="/x?a=1")).path == "/x?a=1&key=made-up-secret"
    assert find(bound, TOKEN, request(path="/x?key=own")) == "own"
    assert find(bound, TOKEN, request(path=f"/x?other={TOKEN.token}")) == "absent"
    assert find(bound, TOKEN, request(path="/x?key=" + TOKEN.token.replace("c", "%63"))) == "placeholder"


BOT = binding("path", value="bot{secret}")


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        ("/bot{}/getMe", "/botmade-up-secret/getMe"),
        ("/bot{}/getMe?a=%2f+", "/botmade-up-secret/getMe?a=%2f+"),
        ("/file/bot{}/a%2Fb/../c", "/file/botmade-up-secret/a%2Fb/../c"),
        ("/%62ot{}", "/botmade-up-secret"),
    ],
)
def test_a_segment_of_the_path(sent: str, left: str) -> None:
    """The segment that is the form with the placeholder becomes the form with the secret; the rest stays."""
    asked = request(path=sent.format(TOKEN.token))
    assert find(BOT, TOKEN, asked) == "placeholder"
    assert put(BOT, SECRET, asked).path == left


@pytest.mark.parametrize("path", ["/x/{}/y", "/botany?bot{}", "/x?a=/bot{}/b", "/bo/t{}", "/Bot{}/x", "/x/bot"])
def test_a_placeholder_elsewhere_in_the_path_gets_nothing(path: str) -> None:
    """Other segments, the query, other forms: nothing is swapped there, and what leaves is searched afterwards."""
    asked = request(path=path.format(TOKEN.token))
    assert find(BOT, TOKEN, asked) != "placeholder"
    assert put(BOT, SECRET, asked).path == asked.path


@pytest.mark.parametrize("path", ["/bot{}x/getMe", "/botx{}/getMe", "/bot{0}{0}/getMe"])
def test_a_placeholder_with_more_in_its_segment_is_left_for_the_search(path: str) -> None:
    """It is known as ours, not replaced, and so refused as what leaves still holds it."""
    asked = request(path=path.format(TOKEN.token))
    assert find(BOT, TOKEN, asked) == "placeholder"
    assert TOKEN.token in put(BOT, SECRET, asked).path


def test_a_secret_stays_in_its_segment() -> None:
    """What would end a segment, or begin a query, is encoded; a secret that is no text for a path is refused."""
    asked = request(path=f"/bot{TOKEN.token}/getMe")
    assert put(BOT, b"12:AA-_/../x?y#z%", asked).path == "/bot12:AA-_%2F..%2Fx%3Fy%23z%25/getMe"
    assert find(BOT, TOKEN, request(path="/bot12:AA/getMe")) == "own"
    assert find(BOT, TOKEN, request(path="/getMe")) == "absent"
    for secret in (b"", b"a b", b"a\r\nb", b"\0"):
        with pytest.raises(InjectionError):
            put(BOT, secret, asked)
    with pytest.raises(InjectionError):
        put(binding("path", value="{secret}"), b"..", request(path=f"/{TOKEN.token}"))
    inject_ = Injection(host="api.example.org", scheme="path", value="bot{secret}")
    made = bind("t", Credential(secret="file:/x", inject=inject_), lambda _method, _path: True)
    assert made
    assert not made.always
    assert set(masks(BOT, b"1:a/b")) == {b"1:a/b", b"1:a%2Fb", b"1%3Aa%2Fb"}


def test_what_is_masked_in_answers() -> None:
    """The secret and the form in which it was sent: an echo of the Authorization field shows neither."""
    assert set(masks(binding("basic", user="me"), SECRET)) == {SECRET, basic("me", "made-up-secret")[6:]}
    assert masks(binding("bearer"), SECRET) == (SECRET,)
    assert set(masks(binding("query", query="key"), b"a b")) == {b"a b", b"a%20b"}


def test_always_and_variables() -> None:
    """git, npm and pip need no set-up inside; others without a variable are put in too; sigv4 has its pair."""
    plain = Credential(secret="file:/x", inject=Injection(host="a.example.org", scheme="bearer"))
    pair = Credential(secret="file:/x", inject=Injection(host="a.example.org", scheme="sigv4"))
    bound = bind("x", plain, lambda _method, _path: True)

    assert bound is not None
    assert bound.always
    assert not binding("bearer").always
    assert binding("git").always
    assert variables(pair) == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert variables(plain) == ()
    assert bind("ssh", Credential(keys=("SHA256:x",)), lambda _method, _path: True) is None


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"Authorization", b"AUTHORIZATION", b"b"]), st.binary(max_size=8))),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30),
)
def test_the_other_fields_are_untouched(headers: list[tuple[bytes, bytes]], secret: str) -> None:
    """Any headers: the others keep their bytes and order, and there is exactly one field with the secret."""
    result = put(binding("bearer"), secret.encode(), request(*headers)).headers
    others = [pair for pair in headers if pair[0].lower() != b"authorization"]

    assert [pair for pair in result if pair[0].lower() != b"authorization"] == others
    assert [value for name, value in result if name.lower() == b"authorization"] == [b"Bearer " + secret.encode()]
