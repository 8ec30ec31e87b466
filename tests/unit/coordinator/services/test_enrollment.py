from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from coordinator import ca
from coordinator.services import interceptors
from protos import errors
from protos.identity import Identity, Role, parse_uri
from protos.v1 import agent_pb2


def make_csr(key: Any, *, name: str = "whatever") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def identity_in(certificate: bytes) -> Identity:
    leaf = x509.load_pem_x509_certificate(certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return parse_uri(names.get_values_for_type(x509.UniformResourceIdentifier)[0])


@pytest.mark.parametrize("role", [Role.SITE, Role.HOUSE])
async def test_a_token_buys_a_certificate_for_the_invited_name_and_role_and_no_other(federation: Any, role: Role):
    token = federation.invite("st-olav", role=role)
    answer = await federation.enrollment(token=token.secret, csr=make_csr(ca.new_key(), name="operator"))
    assert identity_in(answer.certificate) == Identity(role, "st-olav")
    assert federation.store.sites.get("st-olav").state == "ENROLLED"


async def test_a_token_works_for_one_key_which_may_repeat_a_lost_answer(federation: Any):
    token = federation.invite("st-olav")
    key = ca.new_key()
    await federation.enrollment(token=token.secret, csr=make_csr(key))
    assert (await federation.enrollment(token=token.secret, csr=make_csr(key))).name == "st-olav"
    with pytest.raises(errors.Unauthenticated, match="used already"):
        await federation.enrollment(token=token.secret, csr=make_csr(ca.new_key()))


async def test_of_many_keys_that_race_for_one_token_exactly_one_wins(federation: Any):
    token = federation.invite("st-olav")
    attempts = [federation.enrollment(token=token.secret, csr=make_csr(ca.new_key())) for _ in range(8)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(outcome, agent_pb2.EnrollResponse) for outcome in outcomes) == 1
    assert all(isinstance(outcome, errors.Unauthenticated | agent_pb2.EnrollResponse) for outcome in outcomes)


async def test_an_expired_or_unknown_token_is_refused(federation: Any):
    expired = federation.invite("st-olav", valid_seconds=-1)
    for secret, reason in ((expired.secret, "expired"), ("guess", "not known"), ("", "not known")):
        with pytest.raises(errors.Unauthenticated, match=reason):
            await federation.enrollment(token=secret, csr=make_csr(ca.new_key()))


async def test_a_bad_signing_request_does_not_use_the_token_up(federation: Any):
    token = federation.invite("st-olav")
    for csr in (b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(errors.InvalidInput, match="signing request"):
            await federation.enrollment(token=token.secret, csr=csr)
    assert (await federation.enrollment(token=token.secret, csr=make_csr(ca.new_key()))).name == "st-olav"


async def test_a_revoked_site_cannot_come_back_with_its_old_token(federation: Any):
    token = federation.invite("st-olav")
    key = ca.new_key()
    await federation.enrollment(token=token.secret, csr=make_csr(key))
    federation.store.sites.revoke("st-olav")
    with pytest.raises(errors.Unauthenticated):
        await federation.enrollment(token=token.secret, csr=make_csr(key))


async def test_an_address_that_tries_too_often_is_slowed_down(federation: Any, monkeypatch: Any):
    limit = interceptors.RateLimit(burst=3, per_second=0.0)

    class Context:
        def peer(self) -> str:
            return "ipv4:10.0.0.1:1234"

    for _ in range(3):
        async with limit._around(Context()):  # type: ignore[arg-type]
            pass
    with pytest.raises(errors.Unavailable, match="Too many"):
        async with limit._around(Context()):  # type: ignore[arg-type]
            pass


async def test_a_certificate_is_renewed_over_a_new_key_for_the_same_identity(federation: Any):
    site = federation.site("st-olav")
    before = federation.store.sites.get("st-olav").certificate_expires_unix_seconds
    request = agent_pb2.RenewCertificateRequest(csr=make_csr(ca.new_key(), name="other"))
    answer = await site.agent("RenewCertificate", request)
    assert identity_in(answer.certificate) == Identity(Role.SITE, "st-olav")
    assert federation.store.sites.get("st-olav").certificate_expires_unix_seconds > before
