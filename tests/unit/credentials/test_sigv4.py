"""AWS signatures made anew, with AWS's own example and botocore as oracles."""

import hashlib
from dataclasses import astuple, replace

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from cloister.credentials import sigv4
from cloister.credentials.bindings import InjectionError, Request

FAKE = Credentials("AKIACLOISTER00000000", "cloister-placeholder-key")
REAL = sigv4.Keys("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
HOST = "examplebucket.s3.amazonaws.com"


def signed_by_botocore(keys: Credentials, service: str, method: str, path: str, body: bytes, **headers: str) -> Request:
    """Return a request that botocore has signed."""
    sent = AWSRequest(method, f"https://{HOST}{path}", data=body, headers=headers)
    kind = S3SigV4Auth if service == "s3" else SigV4Auth
    kind(keys, service, "us-east-1").add_auth(sent)
    pairs = [(name.lower().encode(), str(value).encode()) for name, value in sent.headers.items()]
    return Request(method, path, pairs, body, HOST)


def authorization(request: Request) -> str:
    """Return its signature."""
    return dict(request.headers)[b"authorization"].decode()


def again_by_botocore(request: Request, keys: sigv4.Keys, service: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what botocore would write for the same request at the same time with the real pair."""
    moment = dict(request.headers)[b"x-amz-date"].decode()
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: _at(moment))
    kept = {name.decode(): value.decode() for name, value in request.headers}
    for name in ("authorization", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256"):
        kept.pop(name, None)
    real = Credentials(keys.key_id, keys.secret_key, keys.session_token or None)
    return authorization(signed_by_botocore(real, service, request.method, request.path, request.body, **kept))


def _at(moment: str):
    from datetime import UTC, datetime

    return datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def test_the_example_of_the_documentation() -> None:
    """Amazon S3 API reference, "Example: GET Object", with its published signature."""
    empty = hashlib.sha256(b"").hexdigest()
    headers = [
        (b"range", b"bytes=0-9"), (b"x-amz-content-sha256", empty.encode()), (b"x-amz-date", b"20130524T000000Z"),
        (b"authorization", b"AWS4-HMAC-SHA256 Credential=AKIAFAKE/20130524/us-east-1/s3/aws4_request, "
         b"SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, Signature=" + b"0" * 64),
    ]  # fmt: skip
    keys = sigv4.Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    result = sigv4.sign(Request("GET", "/test.txt", headers, b"", "examplebucket.s3.amazonaws.com"), keys)

    assert authorization(result).endswith("f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")


CASES = [
    ("s3", "GET", "/", b""),
    ("s3", "PUT", "/a%20b/%C3%A4//x/../y", b"content"),
    ("s3", "GET", "/?list-type=2&prefix=a%2Fb&delimiter=%2F", b""),
    ("s3", "GET", "/?acl", b""),
    ("sts", "POST", "/", b"Action=GetCallerIdentity&Version=2011-06-15"),
    ("lambda", "POST", "/2015-03-31/functions/a%3Ab/invocations?b=2&a=1&a=0", b"{}"),
    ("execute-api", "GET", "/stage/a%20b//c/./d/../e/?x=%20&y", b""),
    ("bedrock", "POST", "/model/anthropic.claude-v2%3A1/invoke", b'{"a": 1}'),
]


@pytest.mark.parametrize(("service", "method", "path", "body"), CASES)
@pytest.mark.parametrize("token", ["", "session/token+=="])
def test_botocore_agrees(  # noqa: PLR0913  # four parts of a request
    service: str, method: str, path: str, body: bytes, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves is what botocore would have sent with the real pair, with and without a session token."""
    keys = replace(REAL, session_token=token)
    sent = signed_by_botocore(FAKE, service, method, path, body, **{"content-type": "application/json"})
    result = sigv4.sign(sent, keys)

    assert authorization(result) == again_by_botocore(sent, keys, service, monkeypatch)
    assert dict(result.headers).get(b"x-amz-security-token", b"").decode() == token
    assert FAKE.access_key not in f"{result.headers}"
    assert REAL.secret_key not in repr((result, keys))


def test_a_token_of_the_clients_own_is_taken_out() -> None:
    """Where the real pair has no session token, none is sent or signed."""
    keys = Credentials(FAKE.access_key, FAKE.secret_key, "cloister-token")
    result = sigv4.sign(signed_by_botocore(keys, "sts", "POST", "/", b"x"), REAL)

    assert b"x-amz-security-token" not in dict(result.headers)
    assert "x-amz-security-token" not in authorization(result)


def test_unsigned_payloads_stay_so() -> None:
    """`UNSIGNED-PAYLOAD` and its streaming form over TLS are signed as the client said; no body is asked for."""
    for payload in ("UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"):
        sent = signed_by_botocore(FAKE, "sts", "PUT", "/x", b"")
        sent = replace(sent, headers=[*sent.headers, (b"X-Amz-Content-Sha256", payload.encode())])

        assert sigv4.body_needed(sent.headers) == 0
        assert payload in sigv4.canonical_request(sent, ["host"], "s3")
        assert REAL.key_id in authorization(sigv4.sign(sent, REAL))


def test_a_body_is_asked_for_where_its_hash_is_missing() -> None:
    """Services other than S3 sign the body without saying its hash."""
    assert sigv4.body_needed([]) == 16 << 20
    assert sigv4.body_needed([(b"x-amz-content-sha256", b"UNSIGNED-PAYLOAD")]) == 0


def broken(**changes: bytes | None) -> Request:
    """Return a signed request with fields changed or taken out."""
    sent = signed_by_botocore(FAKE, "s3", "GET", "/x", b"")
    fields = dict(sent.headers)
    for name, value in changes.items():
        key = name.replace("_", "-").encode()
        fields.pop(key, None)
        if value is not None:
            fields[key] = value
    return replace(sent, headers=list(fields.items()))


@pytest.mark.parametrize(
    "request_",
    [
        broken(authorization=b"AWS4-ECDSA-P256-SHA256 Credential=a/b, SignedHeaders=host, Signature=0"),
        broken(authorization=b"Bearer x"),
        broken(authorization=None),
        broken(x_amz_date=b"20200101T000000Z"),
        broken(x_amz_date=None),
        broken(x_amz_content_sha256=b"STREAMING-AWS4-HMAC-SHA256-PAYLOAD"),
        broken(x_amz_content_sha256=b"0" * 63),
    ],
)
def test_other_kinds_of_signatures_are_refused(request_: Request) -> None:
    """Nothing is signed that is not understood; the twin is a signature that is."""
    with pytest.raises(InjectionError) as caught:
        sigv4.sign(request_, REAL)

    assert caught.value.reason == "signature-unsupported"
    assert sigv4.sign(broken(), REAL).headers


@pytest.mark.parametrize(
    "secret",
    [
        b"AKIDEXAMPLE:the/key+=:the-token",
        b"[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key=the/key+=\naws_session_token = the-token\n",
        (
            b"[other]\naws_access_key_id=x\naws_secret_access_key=y\n[default]\naws_access_key_id=AKIDEXAMPLE\n"
            b"aws_secret_access_key=the/key+=\naws_session_token=the-token"
        ),
        b'{"Version": 1, "AccessKeyId": "AKIDEXAMPLE", "SecretAccessKey": "the/key+=", "SessionToken": "the-token"}',
    ],
)
def test_forms_of_a_pair(secret: bytes) -> None:
    """A line, the file of the AWS tools, and what `credential_process` prints."""
    assert astuple(sigv4.parse_keys(secret)) == ("AKIDEXAMPLE", "the/key+=", "the-token")
    assert "the/key" not in repr(sigv4.parse_keys(secret))


NO_PAIR = [b"", b"only-one", b"{", b"[]", b'{"AccessKeyId": 1}', b"a:", b"a:b\r\nc", b"a:\xff"]


@pytest.mark.parametrize("secret", NO_PAIR)
def test_what_is_no_pair_is_refused(secret: bytes) -> None:
    """An error that holds nothing of the secret."""
    with pytest.raises(InjectionError) as caught:
        sigv4.parse_keys(secret)

    assert "only-one" not in f"{caught.value.explanation}{caught.value!r}"


@given(st.binary(max_size=300), st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(value: bytes, secret: bytes) -> None:
    """No input makes anything but a signed request or a refusal."""
    try:
        keys = sigv4.parse_keys(secret)
        sigv4.sign(Request("GET", "/", [(b"authorization", value)], b"", HOST), keys)
    except InjectionError:
        return


def test_fields_that_the_relay_rewrites_are_not_signed() -> None:
    """A signature survives new framing: only fields that arrive as they were signed are in it."""
    sent = signed_by_botocore(FAKE, "sts", "POST", "/", b"x", **{"content-length": "1", "x-custom": " a   b "})
    result = authorization(sigv4.sign(sent, REAL))

    assert "content-length" not in result
    assert "x-custom" in result
    assert "host;" in result
