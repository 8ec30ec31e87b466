"""The way from this site to its coordinator: through which proxy, and whose certificates are believed.

The agent decides itself whether a proxy is used and tells gRPC so, because `silotune-agent check` must look along the
very way that the calls take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509

from client_agent.settings import Network, environment_proxy, spares_proxy
from protos.channel import KEEPALIVE_SECONDS, client_options
from protos.errors import SiteConfigInvalid


@dataclass(frozen=True)
class Proxy:
    url: str

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def login(self) -> str:
        """user:password, empty without; it is shown nowhere."""
        userinfo, at, _ = urlsplit(self.url).netloc.rpartition("@")
        return unquote(userinfo) if at else ""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Proxy({self})"


@dataclass(frozen=True)
class Route:
    # PEM: the federation's own CA, and those that site.toml adds for the coordinator's certificate.
    ca: bytes
    bundle: bytes = b""
    # What site.toml says; the environment is asked when it says nothing. no_proxy holds for both: gRPC insists on it.
    proxy: Proxy | None = None
    keepalive_seconds: float = KEEPALIVE_SECONDS

    @property
    def trusted(self) -> bytes:
        return self.ca + b"\n" + self.bundle

    def proxy_for(self, address: str) -> Proxy | None:
        """None where `address` is dialled directly."""
        return None if spares_proxy(host_of(address)) else self._named

    def spared(self, address: str) -> bool:
        """Whether no_proxy of the environment alone keeps `address` from the proxy that is named."""
        return self._named is not None and spares_proxy(host_of(address))

    @property
    def _named(self) -> Proxy | None:
        url = environment_proxy()
        return self.proxy or (Proxy(url) if url else None)

    def options(self, address: str) -> list[tuple[str, int | str]]:
        """gRPC's channel options for dialling `address` this way."""
        proxy = self.proxy_for(address)
        way: tuple[str, int | str] = ("grpc.http_proxy", proxy.url) if proxy else ("grpc.enable_http_proxy", 0)
        return [*client_options(keepalive_seconds=self.keepalive_seconds), way]


def route_of(network: Network, *, ca: bytes, directory: Path) -> Route:
    """The route that site.toml describes; `directory` is where site.toml lies.

    SiteConfigInvalid when the CA bundle cannot be read or holds no certificate.
    """
    bundle = b""
    if network.ca_bundle:
        path = directory / network.ca_bundle
        try:
            bundle = path.read_bytes()
            x509.load_pem_x509_certificates(bundle)
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else "it holds no certificates in PEM"
            raise SiteConfigInvalid(f"The CA bundle {path} of [network] cannot be used: {what}.") from error
    proxy = Proxy(network.proxy) if network.proxy else None
    return Route(ca, bundle, proxy, network.keepalive_seconds)


def host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
