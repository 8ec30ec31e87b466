"""Why the coordinator cannot be reached, in words, step by step: name, port, TLS, certificate.

gRPC says little more than "unavailable" for all of these. A TLS-inspecting proxy above all must be named: it presents a
certificate of its own, and the hospital's network team is the only one who can let the agent through.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Probe:
    reachable: bool
    sentence: str


def probe(address: str, *, ca_pem: bytes, own: tuple[Path, Path] | None = None) -> Probe:
    """Connects to `address` (host:port) and looks at the certificate that it presents; asks for nothing.

    With `own`, the files of the agent's certificate and key, it also finds out whether these are taken.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=ca_pem.decode())
    if own is not None:
        context.load_cert_chain(*own)
    try:
        with (
            socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            # TLS 1.3 refuses a client's certificate only after the handshake; HTTP/2 servers speak first.
            if own is not None and not wrapped.recv(1):
                return Probe(False, f"{address} is reachable, but does not take this agent's certificate")
            return Probe(True, f"{address} is reachable ({wrapped.version()}, certificate of this federation)")
    except socket.gaierror:
        return Probe(False, f"the host name {host} is not known here; check the name and this machine's DNS")
    except ssl.SSLCertVerificationError as error:
        return Probe(False, _explain_certificate(error, host=host, port=int(port), ca_pem=ca_pem))
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            return Probe(False, f"{address} is reachable, but does not take this agent's certificate ({error.reason})")
        return Probe(False, f"{address} answers, but not with TLS ({error.reason}); is it the coordinator's port?")
    except TimeoutError:
        return Probe(
            False, f"{address} does not answer within {TIMEOUT_SECONDS:.0f} s; a firewall may drop the packets"
        )
    except ConnectionRefusedError:
        return Probe(False, f"nothing listens at {address}; is the coordinator running, and is the port right?")
    except OSError as error:
        return Probe(False, f"{address} cannot be reached: {error.strerror or type(error).__name__}")


def _explain_certificate(error: ssl.SSLCertVerificationError, *, host: str, port: int, ca_pem: bytes) -> str:
    presented = _presented(host, port)
    if presented is None:
        return f"the certificate of {host} is not valid: {error.verify_message}"
    if presented.issuer != x509.load_pem_x509_certificate(ca_pem).subject:
        return (
            f"the certificate of {host} was issued by {_name(presented.issuer)!r}, not by this federation; a proxy "
            f"that inspects TLS does this: ask your network team to let {host}:{port} through untouched"
        )
    if "mismatch" in error.verify_message:
        return f"the coordinator's certificate is not for the name {host}; the operator adds it with `init --host`"
    return f"the coordinator's certificate is not valid: {error.verify_message}"


def _presented(host: str, port: int) -> x509.Certificate | None:
    """The certificate that is presented, trusted or not."""
    try:
        pem = ssl.get_server_certificate((host, port), timeout=TIMEOUT_SECONDS)
    except OSError:
        return None
    return x509.load_pem_x509_certificate(pem.encode())


def _name(subject: x509.Name) -> str:
    for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        found = subject.get_attributes_for_oid(kind)
        if found:
            return str(found[0].value)
    return subject.rfc4514_string()
