from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from coordinator import ca
from protos.digests import digest_of
from protos.errors import InvalidInput
from protos.identity import Identity, JoinToken, Role

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
ST_OLAV = Identity(Role.SITE, "st-olav")


@pytest.fixture(scope="module")
def authority() -> ca.CertificateAuthority:
    return ca.create(now=NOW)


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")])
    wanted = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://silotune/operator/me")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(wanted, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def names(pem: bytes) -> x509.SubjectAlternativeName:
    return x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_of_a_signing_request_only_the_key_is_used(authority: ca.CertificateAuthority):
    key = ca.new_key()
    issued = authority.sign_request(csr(key), identity=ST_OLAV, valid_days=30, now=NOW)
    leaf = x509.load_pem_x509_certificate(issued.pem)
    assert leaf.public_key() == key.public_key()
    assert names(issued.pem).get_values_for_type(x509.UniformResourceIdentifier) == [ST_OLAV.uri]
    assert leaf.subject.rfc4514_string() == "CN=st-olav"
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    leaf.verify_directly_issued_by(authority.certificate)
    assert issued.serial == f"{leaf.serial_number:x}"


def test_a_certificate_begins_a_little_in_the_past_and_ends_with_the_authority_at_the_latest(
    authority: ca.CertificateAuthority,
):
    key = ca.new_key().public_key()
    leaf = x509.load_pem_x509_certificate(authority.issue_client(key, identity=ST_OLAV, valid_days=30, now=NOW).pem)
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(days=30)
    server = authority.issue_server(ca.new_key(), hosts=["localhost"], valid_days=30, now=NOW)
    # All sites must believe it, also one whose clock is some hours behind.
    assert x509.load_pem_x509_certificate(server.pem).not_valid_before_utc == NOW - timedelta(days=2)
    late = authority.issue_client(key, identity=ST_OLAV, valid_days=9999, now=NOW)
    assert late.expires_unix_seconds == authority.certificate.not_valid_after_utc.timestamp()


@pytest.mark.parametrize(
    "request_pem",
    [b"", b"junk", csr(ec.generate_private_key(ec.SECP384R1())), csr(rsa.generate_private_key(65537, 2048))],
)
def test_a_request_that_is_none_or_has_another_kind_of_key_is_refused(request_pem: bytes):
    with pytest.raises(InvalidInput, match="signing request"):
        ca.request_key(request_pem)


def test_a_request_for_a_key_that_the_sender_does_not_hold_is_refused():
    honest = x509.load_pem_x509_csr(csr(ca.new_key())).public_bytes(serialization.Encoding.DER)
    forged = honest[:-1] + bytes([honest[-1] ^ 1])
    pem = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InvalidInput, match="not signed with its own key"):
        ca.request_key(pem)


def test_the_server_certificate_is_good_for_each_name_and_address(authority: ca.CertificateAuthority):
    hosts = ["fl.example.org", "127.0.0.1", "::1"]
    issued = authority.issue_server(ca.new_key(), hosts=hosts, valid_days=10, now=NOW)
    assert ca.hosts_of(issued.pem) == set(hosts)
    assert ca.expiry_of(issued.pem) == NOW + timedelta(days=10)


def test_the_authority_signs_certificates_and_cannot_make_further_authorities(authority: ca.CertificateAuthority):
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert authority.certificate.not_valid_after_utc - NOW > timedelta(days=3650)


def test_a_saved_authority_is_the_same_and_its_key_is_private(authority: ca.CertificateAuthority, tmp_path: Path):
    authority.save(tmp_path)
    assert stat.S_IMODE((tmp_path / ca.KEY_FILE).stat().st_mode) == 0o600
    again = ca.load(tmp_path)
    assert again.pem == authority.pem
    assert again.key.private_numbers() == authority.key.private_numbers()


@pytest.mark.parametrize("broken", [ca.KEY_FILE, ca.CERTIFICATE_FILE])
def test_a_missing_or_broken_authority_says_so(authority: ca.CertificateAuthority, tmp_path: Path, broken: str):
    with pytest.raises(InvalidInput, match="cannot be read"):
        ca.load(tmp_path)
    authority.save(tmp_path)
    (tmp_path / broken).write_text("junk")
    with pytest.raises(InvalidInput, match="cannot be read"):
        ca.load(tmp_path)


def test_a_token_carries_the_authority_and_a_secret_that_only_its_hash_is_kept_of(authority: ca.CertificateAuthority):
    tokens = [authority.token("st-olav", enrollment_address="host:9444") for _ in range(2)]
    assert tokens[0].secret != tokens[1].secret
    read = JoinToken.decode(tokens[0].encode())
    assert (read.name, read.enrollment_address) == ("st-olav", "host:9444")
    assert read.secret_hash == digest_of(tokens[0].secret.encode())
    assert x509.load_der_x509_certificate(read.ca_der) == authority.certificate


def own_pair(
    directory: Path, *, now: datetime = NOW, days: float = 10, key: ec.EllipticCurvePrivateKey | None = None
) -> tuple[Path, Path]:
    """A server certificate of another CA, and a key, as files."""
    mine = ca.new_key()
    issued = ca.create(now=now).issue_server(mine, hosts=["fl.example.org"], valid_days=days, now=now)
    (directory / "own.pem").write_bytes(issued.pem)
    (directory / "own-key.pem").write_bytes(ca.key_pem(key or mine))
    return directory / "own.pem", directory / "own-key.pem"


def test_an_operators_own_certificate_is_taken_with_its_key(tmp_path: Path):
    certificate, key = own_pair(tmp_path)
    assert ca.operators_own(certificate, key, now=NOW) == (key.read_bytes(), certificate.read_bytes())


def test_an_operators_own_certificate_with_another_key_is_refused(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"The key in .*own-key.pem is not the one of the certificate in .*own.pem"):
        ca.operators_own(*own_pair(tmp_path, key=ca.new_key()), now=NOW)


@pytest.mark.parametrize("days_later", [-3, 11])
def test_an_operators_own_certificate_that_is_not_valid_now_is_refused(tmp_path: Path, days_later: int):
    with pytest.raises(InvalidInput, match="is valid from 2026-11-19 12:00 to 2026-12-01 12:00 UTC, and now it is"):
        ca.operators_own(*own_pair(tmp_path), now=NOW + timedelta(days=days_later))


def test_files_that_are_no_certificate_and_key_are_refused(tmp_path: Path):
    certificate, key = own_pair(tmp_path)
    key.write_text("junk")
    with pytest.raises(InvalidInput, match="cannot be read"):
        ca.operators_own(certificate, key, now=NOW)
    with pytest.raises(InvalidInput, match="No such file"):
        ca.operators_own(tmp_path / "none.pem", key, now=NOW)
