"""Why the coordinator cannot be reached, in words, hop by hop: proxy, name, port, TLS, certificate.

gRPC says little more than "unavailable" for all of these. A TLS-inspecting proxy above all must be named: it presents a
certificate of its own, and the hospital's network team is the only one who can let the agent through.
"""

from __future__ import annotations

import base64
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from client_agent.route import Proxy, Route, host_of

TIMEOUT_SECONDS = 10.0
HEAD_END = b"\r\n\r\n"
LONGEST_HEAD_BYTES = 16 << 10


@dataclass(frozen=True)
class Probe:
    reachable: bool
    sentence: str


class _ProxyFailed(Exception):
    """The way ends at the proxy; the message says how."""


def probe(address: str, *, route: Route, own: tuple[Path, Path] | None = None) -> Probe:
    """Connects to `address` (host:port) and looks at the certificate that it presents; asks for nothing.

    With `own`, the files of the agent's certificate and key, it also finds out whether these are taken.
    """
    proxy = route.proxy_for(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=route.trusted.decode())
    if own is not None:
        context.load_cert_chain(*own)
    way = f" through the proxy {proxy}" if proxy else ""
    try:
        with (
            _connect(address, proxy) as plain,
            context.wrap_socket(plain, server_hostname=host_of(address)) as wrapped,
        ):
            issuer = x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"").issuer
            # TLS 1.3 refuses a client's certificate only after the handshake; HTTP/2 servers speak first.
            if own is not None and not wrapped.recv(1):
                return Probe(False, f"{address} is reachable{way}, but {_not_taken(issuer, route=route)}")
            by = "of this federation" if _is_ours(issuer, route) else f"of {_name(issuer)!r}, as ca_bundle allows"
            return Probe(True, f"{address} is reachable{way} ({wrapped.version()}, certificate {by})")
    except _ProxyFailed as error:
        return Probe(False, str(error))
    except ssl.SSLCertVerificationError as error:
        return Probe(False, _explain_certificate(error, address, proxy=proxy, route=route))
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            refused = _not_taken(_presented_issuer(address, proxy), route=route)
            return Probe(False, f"{address} is reachable{way}, but {refused} ({error.reason})")
        return Probe(False, f"{address} answers{way}, but not with TLS ({error.reason}); is it the coordinator's port?")
    except OSError as error:
        return Probe(False, _no_connection(error, address) + (f", asked{way}" if proxy else ""))


def _connect(address: str, proxy: Proxy | None) -> socket.socket:
    host, port = host_of(address), int(address.rpartition(":")[2])
    if proxy is None:
        return socket.create_connection((host, port), timeout=TIMEOUT_SECONDS)
    try:
        plain = socket.create_connection((proxy.host, proxy.port), timeout=TIMEOUT_SECONDS)
    except OSError as error:
        what = _no_connection(error, str(proxy), coordinator=False)
        raise _ProxyFailed(f"the proxy {proxy} cannot be used: {what}") from error
    try:
        _ask_for_tunnel(plain, address, proxy)
    except BaseException:
        plain.close()
        raise
    return plain


def _ask_for_tunnel(plain: socket.socket, address: str, proxy: Proxy) -> None:
    login = base64.b64encode(proxy.login.encode()).decode()
    with_login = f"Proxy-Authorization: Basic {login}\r\n" if proxy.login else ""
    head = b""
    try:
        plain.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{with_login}\r\n".encode())
        # Byte by byte: what follows the head belongs to TLS.
        while not head.endswith(HEAD_END) and len(head) < LONGEST_HEAD_BYTES and (byte := plain.recv(1)):
            head += byte
    except TimeoutError as error:
        raise _ProxyFailed(f"the proxy {proxy} gave no answer within {TIMEOUT_SECONDS:.0f} s") from error
    except OSError as error:
        raise _ProxyFailed(f"the proxy {proxy} closed the connection") from error
    status = head.split(b"\r\n")[0].decode("latin-1")
    protocol, _, answer = status.partition(" ")
    answer = "".join(character for character in answer[:80] if character.isprintable())
    code = answer[:3]
    if not protocol.startswith("HTTP/") or not code.isdigit():
        raise _ProxyFailed(f"what answers at {proxy} is not an HTTP proxy; check `proxy` in [network]")
    if code in ("401", "407"):
        what = "does not take the login in `proxy`" if proxy.login else "wants a login; write it into `proxy`"
        raise _ProxyFailed(f"the proxy {proxy} {what} (http://USER:PASSWORD@HOST:PORT): it answered {answer!r}")
    if code in ("502", "503", "504"):
        raise _ProxyFailed(
            f"the proxy {proxy} cannot reach {address}: it answered {answer!r}; the name may be unknown there, or "
            "nothing listens at that port"
        )
    if not code.startswith("2"):
        raise _ProxyFailed(
            f"the proxy {proxy} refuses the way to {address}: it answered {answer!r}; ask your network team to allow "
            f"CONNECT to {address}"
        )


def _no_connection(error: OSError, address: str, *, coordinator: bool = True) -> str:
    if isinstance(error, socket.gaierror):
        return f"the host name {host_of(address)} is not known here; check the name and this machine's DNS"
    if isinstance(error, TimeoutError):
        return f"{address} does not answer within {TIMEOUT_SECONDS:.0f} s; a firewall may drop the packets"
    if isinstance(error, ConnectionRefusedError):
        asked = "is the coordinator running, and is the port right?" if coordinator else "is the port right?"
        return f"nothing listens at {address}; {asked}"
    return f"{address} cannot be reached: {error.strerror or type(error).__name__}"


def _explain_certificate(
    error: ssl.SSLCertVerificationError, address: str, *, proxy: Proxy | None, route: Route
) -> str:
    host = host_of(address)
    issuer = _presented_issuer(address, proxy)
    if issuer is None:
        return f"the certificate of {host} is not valid: {error.verify_message}"
    if not _is_ours(issuer, route) and "mismatch" not in error.verify_message:
        behind = f" behind the proxy {proxy}" if proxy else ""
        return (
            f"the certificate of {host} was issued by {_name(issuer)!r}, not by this federation; a proxy that inspects "
            f"TLS{behind} does this: ask your network team to let {address} through untouched. If the operator says "
            f"that the coordinator's certificate is from {_name(issuer)!r}, name a file with that CA as `ca_bundle` in "
            "[network]"
        )
    if "mismatch" in error.verify_message:
        return f"the coordinator's certificate is not for the name {host}; the operator adds it with `init --host`"
    return f"the coordinator's certificate is not valid: {error.verify_message}"


def _not_taken(issuer: x509.Name | None, *, route: Route) -> str:
    if issuer is None or _is_ours(issuer, route):
        return "does not take this agent's certificate; it may have expired, or one of the two clocks is wrong"
    return (
        f"does not take this agent's certificate; the one it shows was issued by {_name(issuer)!r}, and if that is a "
        "proxy that inspects TLS, ask your network team to let this connection through untouched"
    )


def _presented_issuer(address: str, proxy: Proxy | None) -> x509.Name | None:
    """Who issued the certificate that is presented, trusted or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connect(address, proxy) as plain, context.wrap_socket(plain, server_hostname=host_of(address)) as wrapped:
            return x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"").issuer
    except (OSError, ValueError, _ProxyFailed):
        return None


def _is_ours(issuer: x509.Name, route: Route) -> bool:
    return issuer == x509.load_pem_x509_certificate(route.ca).subject


def _name(subject: x509.Name) -> str:
    for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        found = subject.get_attributes_for_oid(kind)
        if found:
            return str(found[0].value)
    return subject.rfc4514_string()
