"""The federation's own certificate authority: who signs whom, and for how long.

Identity is the URI in a client certificate, so this file decides who anybody is. A site makes its key where it stays
and sends a signing request; of the request only the public key is used, for the name is the invited one. Client
certificates are short-lived and renewed. Revocation is not in the certificates: gRPC for Python cannot check any, so
the registry row is looked at on every call (services/interceptors.py).
"""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.digests import digest_of
from protos.errors import InvalidInput
from protos.identity import Identity, JoinToken, Role

CA_DAYS = 3652
# A site's clock may be behind; a fresh certificate must not be from its future. That of a server is believed by all
# sites at once, some with a clock that is wrong by hours. That of a site says when it was issued (revocations).
BACKDATE = timedelta(minutes=5)
SERVER_BACKDATE = timedelta(days=2)

KEY_FILE = "ca-key.pem"
CERTIFICATE_FILE = "ca.pem"


@dataclass(frozen=True)
class Certificate:
    """A signed certificate, and what the registry keeps of it."""

    pem: bytes
    serial: str
    expires_unix_seconds: float


@dataclass(frozen=True)
class CertificateAuthority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def save(self, directory: Path) -> None:
        write_private(directory / KEY_FILE, key_pem(self.key))
        (directory / CERTIFICATE_FILE).write_bytes(self.pem)

    def issue_server(
        self, key: ec.EllipticCurvePrivateKey, *, hosts: Iterable[str], valid_days: float, now: datetime
    ) -> Certificate:
        """The coordinator's own certificate; `hosts` are the DNS names and IP addresses that agents may dial."""
        names = [x509.UniformResourceIdentifier(Identity(Role.COORDINATOR, "coordinator").uri), *map(_host_name, hosts)]
        return self._issue(
            key.public_key(),
            common_name="coordinator",
            names=names,
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            valid_days=valid_days,
            now=now,
            backdate=SERVER_BACKDATE,
        )

    def issue_client(
        self, key: ec.EllipticCurvePublicKey, *, identity: Identity, valid_days: float, now: datetime
    ) -> Certificate:
        return self._issue(
            key,
            common_name=identity.name,
            names=[x509.UniformResourceIdentifier(identity.uri)],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            valid_days=valid_days,
            now=now,
        )

    def sign_request(self, csr: bytes, *, identity: Identity, valid_days: float, now: datetime) -> Certificate:
        """A certificate for `identity` over the public key of a PEM signing request.

        InvalidInput: not a request, a key that is not EC P-256, or no proof that the sender holds the key.
        """
        return self.issue_client(request_key(csr), identity=identity, valid_days=valid_days, now=now)

    def token(self, name: str, *, enrollment_address: str) -> JoinToken:
        """A fresh join token; only the hash of its secret is ever stored."""
        ca = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        return JoinToken(name=name, secret=secrets.token_urlsafe(24), enrollment_address=enrollment_address, ca=ca)

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        *,
        common_name: str,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        valid_days: float,
        now: datetime,
        backdate: timedelta = BACKDATE,
    ) -> Certificate:
        expires = min(now + timedelta(days=valid_days), self.certificate.not_valid_after_utc).replace(microsecond=0)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - backdate)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Certificate(
            pem=certificate.public_bytes(serialization.Encoding.PEM),
            serial=f"{certificate.serial_number:x}",
            expires_unix_seconds=expires.timestamp(),
        )


def create(*, now: datetime) -> CertificateAuthority:
    """A new authority for one federation, good for ten years."""
    key = new_key()
    name = _name(f"silotune federation {secrets.token_hex(4)}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SERVER_BACKDATE)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificateAuthority(key, certificate)


def load(directory: Path) -> CertificateAuthority:
    """The authority that `save` wrote into `directory`. InvalidInput when a file is missing or broken."""
    try:
        key = serialization.load_pem_private_key((directory / KEY_FILE).read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((directory / CERTIFICATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"The certificate authority in {directory} cannot be read: {error}.",
            hint="Restore the directory from a backup, or begin anew with `silotune-coordinator init`.",
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return CertificateAuthority(key, certificate)


def operators_own(certificate: Path, key: Path, *, now: datetime) -> tuple[bytes, bytes]:
    """The operator's own (key, certificate with its chain), of a CA that is not this one, as PEM.

    InvalidInput: a file cannot be read, the two are not a pair, or the certificate is not valid now.
    """
    try:
        pem, key_bytes = certificate.read_bytes(), key.read_bytes()
        leaf = x509.load_pem_x509_certificates(pem)[0]
        private = serialization.load_pem_private_key(key_bytes, password=None)
    except (OSError, ValueError, TypeError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise InvalidInput(
            f"server_certificate and server_key of [certificates] cannot be read: {what}.",
            hint="Both are PEM files, the key without a password; first the server's certificate, then its chain.",
        ) from error
    if _spki(private.public_key()) != _spki(leaf.public_key()):
        raise InvalidInput(f"The key in {key} is not the one of the certificate in {certificate}.")
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise InvalidInput(
            f"The certificate in {certificate} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}.",
            hint="Put a valid one in its place, or remove server_certificate and server_key to use the federation's.",
        )
    return key_bytes, pem


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def expiry_of(certificate_pem: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc


def hosts_of(certificate_pem: bytes) -> set[str]:
    """The DNS names and IP addresses that a server certificate is good for."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *map(str, addresses)}


def request_key(csr: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a PEM signing request, whose sender has proved that it holds the private one.

    InvalidInput when that is not so, or the key is not EC P-256.
    """
    try:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        proved = request.is_signature_valid
    except (ValueError, TypeError) as error:
        raise InvalidInput("The certificate signing request could not be read.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("The certificate signing request has a key of another kind than EC P-256.")
    if not proved:
        raise InvalidInput("The certificate signing request is not signed with its own key.")
    return key


def public_key_hash(key: ec.EllipticCurvePublicKey) -> str:
    """Names a key, so that the same site may repeat an enrollment whose answer was lost."""
    return digest_of(_spki(key))


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that nobody else may read at any moment."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def utc_now() -> datetime:
    return datetime.now(UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
