"""Who this agent is: its key, its certificate, its coordinator.

The key is made here and never leaves. Enrollment trades a one-time token and a signing request for a certificate;
renewal trades the valid certificate for one over a fresh key. Both may be cut off at any line: a repeated enrollment
sends the same key, and a renewal that was cut between its two renames is completed at the next start.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client_agent.probe import probe
from client_agent.route import Route, route_of
from client_agent.rpc import from_rpc_error
from client_agent.settings import Network
from client_agent.taskdir import sync_directory, write_json
from protos.errors import AlreadyExists, InvalidInput, SilotuneError, Unauthenticated, Unavailable
from protos.identity import Identity, JoinToken, addresses_of, parse_uri
from protos.v1 import agent_pb2, agent_pb2_grpc

KEY, CERTIFICATE, CA, FACTS = "key.pem", "certificate.pem", "ca.pem", "identity.json"
_NEW = ".new"
RENEW_AT = 2 / 3
ENROLL_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class SiteIdentity:
    """An enrolled agent: where it reports, and the PEM files with which it does."""

    name: str
    coordinator: str  # host:port of the coordinator's main listener; of each replica, with commas between
    key: bytes
    certificate: bytes
    ca: bytes

    @property
    def addresses(self) -> tuple[str, ...]:
        return addresses_of(self.coordinator)

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def expires(self) -> datetime:
        return self.leaf.not_valid_after_utc

    @property
    def role(self) -> str:
        return _certified(self.leaf).role.value

    @property
    def uri(self) -> str:
        return _certified(self.leaf).uri

    def renewal_due(self, *, now: datetime) -> bool:
        """Two thirds into its life, so that an outage of the coordinator of the last third is survived."""
        leaf = self.leaf
        life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
        return now >= leaf.not_valid_before_utc + RENEW_AT * life

    def check_valid(self, *, now: datetime) -> None:
        """Unauthenticated when the certificate has expired: gRPC itself would only say "socket closed"."""
        if now >= self.expires:
            raise Unauthenticated(
                f"The certificate of {self.name} expired at {self.expires:%Y-%m-%d %H:%M} UTC.",
                hint=f"Ask the operator for `silotune site invite {self.name}`, then run `enroll --replace`.",
            )


def load(directory: Path) -> SiteIdentity:
    """Unauthenticated when this agent has not been enrolled."""
    try:
        facts = json.loads((directory / FACTS).read_text())
        parts = {name: (directory / name).read_bytes() for name in (KEY, CERTIFICATE, CA)}
    except FileNotFoundError:
        raise Unauthenticated(
            "This agent is not enrolled yet.",
            hint="Ask the operator for a token (`silotune site invite NAME`), then run `silotune-agent enroll`.",
        ) from None
    return SiteIdentity(
        name=facts["name"],
        coordinator=facts["coordinator"],
        key=parts[KEY],
        certificate=parts[CERTIFICATE],
        ca=parts[CA],
    )


def complete_renewal(directory: Path) -> None:
    """Finishes a renewal that a crash cut between its two renames: the new certificate lies with the old key.

    Only for the process that holds the home's lock; another one would come between the daemon's own two renames.
    """
    waiting = directory / (KEY + _NEW)
    if not waiting.exists() or not (directory / CERTIFICATE).exists():
        return
    certified = x509.load_pem_x509_certificate((directory / CERTIFICATE).read_bytes()).public_key()
    try:
        matches = _private_key(waiting.read_bytes()).public_key() == certified
    except ValueError:
        return  # Half a key, cut while it was written: nothing was ever asked for it.
    if matches:
        waiting.rename(directory / KEY)
        sync_directory(directory)


def is_enrolled(directory: Path) -> bool:
    return (directory / FACTS).exists()


def enroll(
    directory: Path, *, token: JoinToken, coordinator: str, replace: bool = False, network: Network | None = None
) -> SiteIdentity:
    """Makes a key, has it certified, writes the identity. `network` says which way; site.toml lies beside `directory`.

    Whoever `network.ca_bundle` makes believed is told the token's secret, so it must be what was given with this token.

    AlreadyExists: enrolled before and not `replace`. Unauthenticated: the token is used up, expired or unknown.
    Unavailable: the enrollment address cannot be reached, or what answers there is not the token's coordinator.
    """
    if is_enrolled(directory) and not replace:
        have = load(directory)
        raise AlreadyExists(
            f"This agent is already enrolled as {have.name} at {have.coordinator}.",
            hint="Nothing needs to be done. With --replace it is enrolled afresh with the new token.",
        )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca = x509.load_der_x509_certificate(token.ca_der).public_bytes(serialization.Encoding.PEM)
    route = route_of(network or Network(), ca=ca, directory=directory.parent)
    # The key of an attempt whose answer was lost is used again: the coordinator answers a repeat with the same key.
    key_file = directory / (KEY + _NEW)
    key = key_file.read_bytes() if key_file.exists() else _write_key(key_file)
    request = agent_pb2.EnrollRequest(token=token.secret, csr=make_csr(key, name=token.name))
    answer = _certified_at_one_of(addresses_of(token.enrollment_address), request, route=route)
    identity = SiteIdentity(name=token.name, coordinator=coordinator, key=key, certificate=answer.certificate, ca=ca)
    _check_certificate(identity)
    (directory / CA).write_bytes(ca)
    _swap_in(directory, key=key, certificate=answer.certificate)
    write_json(directory / FACTS, {"name": token.name, "coordinator": coordinator})
    return identity


def _certified_at_one_of(
    addresses: tuple[str, ...], request: agent_pb2.EnrollRequest, *, route: Route
) -> agent_pb2.EnrollResponse:
    """The answer of the first address that gives one; the last one's error when none does."""
    credentials = grpc.ssl_channel_credentials(root_certificates=route.trusted)
    failure: SilotuneError = InvalidInput("The join token names no address.")
    for address in addresses:
        with grpc.secure_channel(address, credentials, options=route.options(address)) as channel:
            try:
                return agent_pb2_grpc.EnrollmentServiceStub(channel).Enroll(request, timeout=ENROLL_TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                failure = _explained(from_rpc_error(error), address=address, route=route)
        if not isinstance(failure, Unavailable):
            break
    raise failure


def _explained(error: SilotuneError, *, address: str, route: Route) -> SilotuneError:
    """gRPC's "unavailable" in words that say what to do; any other error as it is."""
    if not isinstance(error, Unavailable):
        return error
    found = probe(address, route=route)
    if found.reachable:
        return error
    hint = (
        "Enrollment has an address of its own, which the token carries; a firewall must let it through too. It "
        "believes the token's CA alone, and those of --ca-bundle."
    )
    return Unavailable(f"Enrollment failed: {found.sentence}.", hint=hint)


def make_csr(key_pem: bytes, *, name: str) -> bytes:
    """A signing request in PEM; the coordinator ignores all of it but the public key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(_private_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_key_for_renewal(directory: Path) -> bytes:
    """A fresh private key in PEM, on disk before anything is asked of the coordinator."""
    return _write_key(directory / (KEY + _NEW))


def install_renewal(directory: Path, *, key: bytes, certificate: bytes) -> SiteIdentity:
    """Puts the renewed certificate and its key in place of the old ones; the identity that holds from now on."""
    old = load(directory)
    new = SiteIdentity(**{**asdict(old), "key": key, "certificate": certificate})
    _check_certificate(new)
    _swap_in(directory, key=key, certificate=certificate)
    return new


def _write_key(path: Path) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.unlink(missing_ok=True)
    _write_private(path, key)
    return key


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap_in(directory: Path, *, key: bytes, certificate: bytes) -> None:
    _write_private(directory / (KEY + _NEW), key)
    _write_private(directory / (CERTIFICATE + _NEW), certificate)
    sync_directory(directory)
    (directory / (CERTIFICATE + _NEW)).rename(directory / CERTIFICATE)
    (directory / (KEY + _NEW)).rename(directory / KEY)
    sync_directory(directory)


def _check_certificate(identity: SiteIdentity) -> None:
    leaf = identity.leaf
    # Whoever answers may be trusted by ca_bundle alone; only the federation's own CA says who this site is.
    try:
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidInput(
            "The certificate that was answered is not signed by this federation's CA.",
            hint="Something between this site and the coordinator answers in its place; tell the operator.",
        ) from error
    if leaf.public_key() != _private_key(identity.key).public_key():
        raise InvalidInput("The coordinator's certificate is over another key than the one that was sent.")
    certified = _certified(leaf)
    if certified.name != identity.name:
        raise InvalidInput(f"The certificate names {certified.name}; the token was for {identity.name}.")


def _certified(leaf: x509.Certificate) -> Identity:
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return parse_uri(uris[0] if uris else "")


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput("The agent's private key is not an elliptic-curve key.")
    return key


def utc_now() -> datetime:
    return datetime.now(UTC)
