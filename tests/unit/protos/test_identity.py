"""Names are narrow, certificates name one role, and a join token is whole or refused."""

from __future__ import annotations

import base64
import json

import pytest

from protos import identity
from protos.errors import InvalidInput, Unauthenticated
from protos.identity import Identity, JoinToken, Role

TOKEN = JoinToken("st-olav", "s3cret", "fed.example.org:9444", base64.b64encode(b"\x30\x82\x01certificate").decode())


@pytest.mark.parametrize("name", ["a", "st-olav", "site-1", "0", "a" * 63])
def test_a_site_name_is_a_host_label(name: str) -> None:
    assert identity.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "St-Olav", "a_b", "a.b", "../x", "a" * 64, "a\n", "å", "a b", "spiffe://x"]
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="not a site name"):
        identity.check_name(name)


@pytest.mark.parametrize("role", Role)
def test_an_identity_is_read_back_from_its_certificate(role: Role) -> None:
    someone = Identity(role, "st-olav")
    assert identity.parse_uri(someone.uri) == someone


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://silotune/site/",
        "spiffe://silotune/admin/st-olav",
        "spiffe://other/site/st-olav",
        "spiffe://silotune/site/st-olav/extra",
        "spiffe://silotune/site/st-olav\n",
        "SPIFFE://silotune/site/st-olav",
        "spiffe://silotune/site/" + "a" * 64,
    ],
)
def test_a_foreign_uri_is_nobody(uri: str) -> None:
    with pytest.raises(Unauthenticated):
        identity.parse_uri(uri)


def test_a_token_comes_back_as_it_was() -> None:
    text = TOKEN.encode()
    assert text.startswith("silo1.") and text.isprintable() and " " not in text
    assert JoinToken.decode(text) == TOKEN
    assert JoinToken.decode(f"  {text}\n") == TOKEN
    assert JoinToken.decode(text).ca_der == b"\x30\x82\x01certificate"


def test_the_coordinator_keeps_only_a_hash_of_the_secret() -> None:
    assert TOKEN.secret not in TOKEN.secret_hash
    assert TOKEN.secret_hash == JoinToken.decode(TOKEN.encode()).secret_hash
    assert len(TOKEN.secret_hash) == 64


def test_a_cut_token_is_refused() -> None:
    text = TOKEN.encode()
    for length in range(len(text) - 1):
        with pytest.raises(InvalidInput, match="not a join token"):
            JoinToken.decode(text[:length])


def encoded(content: object) -> str:
    return "silo1." + base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


@pytest.mark.parametrize("text", ["", "silo1.", "hello", "silo1.%%%", "silo1.é", "silo2.abc"])
def test_a_text_that_is_no_token_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        JoinToken.decode(text)
    assert "silotune site invite" in caught.value.hint


@pytest.mark.parametrize("content", [[], 3, None, "x", {}, {"name": "a"}, {**TOKEN.__dict__, "more": 1}])
def test_a_token_with_other_fields_is_refused(content: object) -> None:
    with pytest.raises(InvalidInput, match="not a join token"):
        JoinToken.decode(encoded(content))


@pytest.mark.parametrize("job_id", ["j1", "question-kinds-0a1b2c", "a" * 80, "0"])
def test_a_job_id_is_a_plain_word(job_id: str) -> None:
    assert identity.check_job_id(job_id) == job_id


@pytest.mark.parametrize("job_id", ["", "-a", "/etc", "../x", "a/b", "a.b", "A", "a_b", "a\n", "a" * 81, "a\0b"])
def test_a_job_id_that_could_be_a_path_is_refused(job_id: str) -> None:
    with pytest.raises(InvalidInput, match="not the id of a job"):
        identity.check_job_id(job_id)
