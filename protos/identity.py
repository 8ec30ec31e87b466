"""Names, roles and tokens: who may be what in a federation.

The identity of a caller is the URI in its client certificate, `spiffe://silotune/<role>/<name>`; no request has a
field for it. A join token carries everything an agent needs to trust its coordinator before it has a certificate.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict, dataclass
from enum import Enum

from protos.digests import digest_of
from protos.errors import InvalidInput, Unauthenticated

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# A job's id is a part of paths at its sites.
JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
_URI = re.compile(r"spiffe://silotune/(site|house|operator|coordinator)/([a-z0-9-]{1,63})")
_TOKEN_PREFIX = "silo1."
# Metadata with which a caller names itself, by its URI, to a coordinator that serves without TLS on loopback.
INSECURE_IDENTITY_KEY = "silotune-insecure-identity"


class Role(Enum):
    SITE = "site"
    HOUSE = "house"  # the operator's own agent beside the coordinator
    OPERATOR = "operator"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Identity:
    role: Role
    name: str

    @property
    def uri(self) -> str:
        return f"spiffe://silotune/{self.role.value}/{self.name}"


def check_name(name: str) -> str:
    """`name` if it may name a site: 1 to 63 of a-z, 0-9 and hyphen, no hyphen at an end. InvalidInput otherwise."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} is not a site name.",
            hint="Use 1 to 63 lower-case letters, digits and hyphens, for example st-olav.",
        )
    return name


def check_job_id(job_id: str) -> str:
    """`job_id` if it may name a job: 1 to 80 of a-z, 0-9 and hyphen, no hyphen at its start. InvalidInput otherwise."""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidInput(f"{job_id[:80]!r} is not the id of a job.")
    return job_id


def parse_uri(uri: str) -> Identity:
    """Unauthenticated when the URI is not one of ours."""
    match = _URI.fullmatch(uri)
    if not match:
        raise Unauthenticated(f"The certificate's URI {uri[:120]!r} is not a silotune identity.")
    return Identity(Role(match[1]), match[2])


def addresses_of(text: str) -> tuple[str, ...]:
    """The addresses in a list such as "a:9443,b:9443": replicas of one coordinator, in the order of preference."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def at_port(text: str, port: str) -> str:
    """The same hosts with another port."""
    return ",".join(f"{address.rpartition(':')[0]}:{port}" for address in addresses_of(text))


@dataclass(frozen=True)
class JoinToken:
    """What `silotune site invite` prints: one use, one name, an expiry that the coordinator keeps."""

    name: str
    secret: str
    # Where enrollment is answered, with commas between several; the main address is this host with another port.
    enrollment_address: str
    # The CA certificate, DER in base64.
    ca: str

    def encode(self) -> str:
        text = json.dumps(asdict(self), separators=(",", ":")).encode()
        return _TOKEN_PREFIX + base64.urlsafe_b64encode(text).decode().rstrip("=")

    @staticmethod
    def decode(token: str) -> JoinToken:
        """InvalidInput when the text is not a whole token."""
        body = token.strip().removeprefix(_TOKEN_PREFIX)
        try:
            fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            found = JoinToken(**fields)
            if not all(isinstance(value, str) for value in asdict(found).values()):
                raise ValueError("a field is not text")
            check_name(found.name)
            return found
        except (ValueError, TypeError, InvalidInput) as error:
            raise InvalidInput(
                "This is not a join token, or a part of it is missing.",
                hint="Copy the whole line that `silotune site invite` printed; it begins with silo1.",
            ) from error

    @property
    def ca_der(self) -> bytes:
        return base64.b64decode(self.ca)

    @property
    def secret_hash(self) -> str:
        return digest_of(self.secret.encode())
