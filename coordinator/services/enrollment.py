"""EnrollmentService: a one-time token and a signing request in, a certificate out.

It answers on a listener of its own, because gRPC for Python asks for client certificates for a whole port or not at
all, and whoever enrolls has none yet.
"""

from __future__ import annotations

import asyncio

import structlog

from coordinator.ca import CertificateAuthority, public_key_hash, request_key, utc_now
from coordinator.services.wire import Caller
from coordinator.storage.store import Store
from protos.digests import digest_of
from protos.v1 import agent_pb2 as pb

_log = structlog.get_logger("enrollment")


class EnrollmentService:
    def __init__(self, store: Store, *, authority: CertificateAuthority, client_days: float) -> None:
        self._store = store
        self._authority = authority
        self._client_days = client_days

    async def enroll(self, request: pb.EnrollRequest, _caller: Caller | None) -> pb.EnrollResponse:
        """`request.token` is the secret of a join token; the certificate is for the invited name."""
        return await asyncio.to_thread(self._enroll, request)

    def _enroll(self, request: pb.EnrollRequest) -> pb.EnrollResponse:
        secret_hash = digest_of(request.token.encode())
        key = request_key(request.csr)
        key_hash = public_key_hash(key)
        # One moment in whole seconds, as certificates know them: this one must not seem older than its enrollment.
        now = utc_now().replace(microsecond=0)
        unix = now.timestamp()
        invited = self._store.sites.invited(secret_hash, key_hash=key_hash, now_unix_seconds=unix)
        certificate = self._authority.issue_client(key, identity=invited, valid_days=self._client_days, now=now)
        identity = self._store.sites.redeem(
            secret_hash,
            key_hash=key_hash,
            serial=certificate.serial,
            expires_unix_seconds=certificate.expires_unix_seconds,
            now_unix_seconds=unix,
        )
        _log.info("a site enrolled", site=identity.name, role=identity.role.value, serial=certificate.serial)
        return pb.EnrollResponse(name=identity.name, certificate=certificate.pem)
