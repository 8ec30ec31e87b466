"""The coordinator's composition root: it makes every part, hands each what it needs, starts and stops them.

    settings -> lock on the data directory -> store, blobs, authority -> controller
             -> enrollment listener (server TLS), main listener (mutual TLS), HTTP

On SIGTERM readiness goes first, then long polls are answered, then streams get a few seconds to end. What is cut off
resumes after the next start, because everything is a row or a blob.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import secrets
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc
import structlog
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from coordinator import ca, observe
from coordinator.controller import Controller
from coordinator.lock import locked
from coordinator.services.agents import AgentService
from coordinator.services.doorbell import Doorbell
from coordinator.services.enrollment import EnrollmentService
from coordinator.services.interceptors import Gate, Outcome, RateLimit
from coordinator.services.operator import OperatorService
from coordinator.services.transfers import TransferService
from coordinator.services.wire import handlers
from coordinator.settings import Settings, blob_directory, database_url
from coordinator.storage.blobs import BlobStore
from coordinator.storage.opening import open_storage
from coordinator.storage.store import Store
from protos.channel import SERVER_OPTIONS
from protos.digests import digest_of
from protos.errors import Conflict, InvalidInput, Unavailable
from protos.v1 import agent_pb2, operator_pb2, transfer_pb2

DRAIN_SECONDS = 8.0
# At the start; later it is waited for without end.
DATABASE_WAIT_SECONDS, DATABASE_LOOK_SECONDS = 60.0, 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Of glibc's malloc.h.
M_ARENA_MAX = -8
HEALTH_EVERY_SECONDS = 2.0
# A controller whose last turn is older is stuck.
CONTROLLER_STALE_SECONDS = 30.0
SERVER_KEY_FILE, SERVER_CERTIFICATE_FILE = "server-key.pem", "server.pem"
SERVICES = (
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
    transfer_pb2.DESCRIPTOR.services_by_name["TransferService"],
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"],
)
ENROLLMENT = agent_pb2.DESCRIPTOR.services_by_name["EnrollmentService"]

_log = structlog.get_logger("coordinator")


@dataclass(frozen=True)
class Addresses:
    """Where the listeners really are; a port 0 in the settings has become a number."""

    main: str
    enrollment: str
    http: str


async def serve(
    directory: Path,
    settings: Settings,
    *,
    insecure_loopback: bool = False,
    started: Callable[[Addresses], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs a coordinator until `stop` is set or SIGTERM or SIGINT comes.

    Conflict: another coordinator has the data directory, or a port is taken. InvalidInput: `insecure_loopback` with an
    address that is not loopback.
    """
    stop = stop or asyncio.Event()
    if insecure_loopback and not settings.listen.address.startswith("127.0.0.1:"):
        raise InvalidInput(
            f"--insecure-loopback serves on 127.0.0.1 only, and listen.address is {settings.listen.address}."
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _use_one_arena()
    with locked(directory), ThreadPoolExecutor(thread_name_prefix="disk") as disk, contextlib.ExitStack() as opened:
        storage = await _until_opened(settings, directory, opened=opened, stop=stop)
        if storage is None:
            return
        store, blobs = storage
        coordinator = Coordinator(directory, settings, store=store, blobs=blobs, disk=disk)
        await coordinator.run(insecure=insecure_loopback, started=started, stop=stop)


async def _until_opened(
    settings: Settings, directory: Path, *, opened: contextlib.ExitStack, stop: asyncio.Event
) -> tuple[Store, BlobStore] | None:
    """Waits for a database server that is about to start too; Unavailable when it does not answer in a minute.

    None when `stop` comes first.
    """
    until, said = time.monotonic() + DATABASE_WAIT_SECONDS, ""
    while not stop.is_set():
        try:
            return opened.enter_context(open_storage(settings, directory))
        except Unavailable as error:
            # What is wrong with a file does not pass by itself.
            if database_url(settings, directory).startswith("sqlite") or time.monotonic() > until:
                raise
            if error.message != said:
                _log.warning("waits for the database", reason=error.message)
            said = error.message
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), DATABASE_LOOK_SECONDS)
    return None


class Coordinator:
    """One process's parts, put together."""

    def __init__(
        self, directory: Path, settings: Settings, *, store: Store, blobs: BlobStore, disk: ThreadPoolExecutor
    ) -> None:
        self._settings = settings
        self._store = store
        self._authority = ca.load(directory)
        self._key, self._certificate = server_certificate(directory, settings, authority=self._authority)
        self._doorbell = Doorbell()
        self._metrics = observe.Metrics(version=coordinator_version())
        self._metrics.registry.register(
            observe.StoreCollector(
                store,
                spare_bytes=blobs.spare_bytes,
                certificates={
                    "ca": self._authority.certificate.not_valid_after_utc.timestamp(),
                    "coordinator": ca.expiry_of(self._certificate).timestamp(),
                },
            )
        )
        self._controller = Controller(
            store=store,
            blobs=blobs,
            scratch=blob_directory(settings, directory) / "scratch",
            on_work=self._doorbell.ring,
            replica=replica_name(directory),
            keep_versions=settings.storage.keep_versions,
        )
        self._readiness = observe.Readiness(
            (observe.store_check(store), observe.disk_check(blobs.spare_bytes), blobs.check, self._controller_check)
        )
        self._health = HealthServicer()
        days = settings.certificates.client_days
        self._enrollment = EnrollmentService(store, authority=self._authority, client_days=days)
        self._answered_by = {
            "AgentService": AgentService(
                store,
                blobs=blobs,
                authority=self._authority,
                doorbell=self._doorbell,
                wake_controller=self._controller.wake,
                metrics=self._metrics,
                version=coordinator_version(),
                lease_seconds=settings.tasks.lease_seconds,
                client_days=days,
            ),
            "TransferService": TransferService(
                store,
                blobs=blobs,
                disk=disk,
                metrics=self._metrics,
                max_transfers=settings.transfers.max_transfers,
                max_blob_bytes=settings.storage.max_blob_bytes,
                frame_cache_bytes=settings.transfers.frame_cache_bytes,
            ),
            "OperatorService": OperatorService(
                store,
                blobs=blobs,
                authority=self._authority,
                enrollment_address=settings.public.enrollment_address,
                wake_controller=self._controller.wake,
            ),
        }

    async def run(self, *, insecure: bool, started: Callable[[Addresses], None], stop: asyncio.Event) -> None:
        listen = self._settings.listen
        main, enrollment = self._main_server(insecure=insecure), self._enrollment_server()
        if insecure:
            _log.warning("TLS IS OFF: whoever reaches this port is whoever he says; for benchmarks on loopback only")
            main_port = _bind(main, listen.address, None)
        else:
            main_port = _bind(main, listen.address, self._credentials(ask_for_certificate=True))
        enrollment_port = _bind(enrollment, listen.enrollment_address, self._credentials(ask_for_certificate=False))
        web_runner, http_port = await self._start_http()
        await main.start()
        await enrollment.start()
        controller = asyncio.create_task(self._controller.run())
        controller.add_done_callback(lambda _: stop.set())
        health = asyncio.create_task(self._report_health())
        addresses = Addresses(
            main=_with_port(listen.address, main_port),
            enrollment=_with_port(listen.enrollment_address, enrollment_port),
            http=_with_port(listen.http_address, http_port),
        )
        _log.info("serving", address=addresses.main, enrollment=addresses.enrollment, http=addresses.http)
        started(addresses)
        try:
            await stop.wait()
            _log.info("shutting down")
        finally:
            self._readiness.draining = True
            await self._health.enter_graceful_shutdown()
            self._doorbell.close()
            self._controller.stop()
            await asyncio.gather(main.stop(DRAIN_SECONDS), enrollment.stop(1.0))
            health.cancel()
            await web_runner.cleanup()
            await controller
        _log.info("stopped")

    def _main_server(self, *, insecure: bool) -> grpc.aio.Server:
        gate = Gate(sites=self._store.sites.named, insecure=insecure)
        server = grpc.aio.server(interceptors=[Outcome(metrics=self._metrics), gate], options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers(
            tuple(handlers(service, answered_by=self._answered_by[service.name]) for service in SERVICES)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            names = [service.full_name for service in SERVICES]
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        return server

    def _enrollment_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[Outcome(metrics=self._metrics), RateLimit()], options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((handlers(ENROLLMENT, answered_by=self._enrollment),))
        return server

    def _credentials(self, *, ask_for_certificate: bool) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self._key, self._certificate)],
            root_certificates=self._authority.pem if ask_for_certificate else None,
            require_client_auth=ask_for_certificate,
        )

    async def _start_http(self) -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(observe.http_app(metrics=self._metrics, readiness=self._readiness), access_log=None)
        await runner.setup()
        host, _, port = self._settings.listen.http_address.rpartition(":")
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            await runner.cleanup()
            raise _taken(self._settings.listen.http_address) from error
        return runner, runner.addresses[0][1]

    async def _report_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        while True:
            try:
                reasons = await self._readiness.find_out()
            except Exception as error:
                # A check that fails itself is no sign of health, and must not be the last one.
                _log.exception("the readiness could not be found out")
                reasons = [f"a check failed: {type(error).__name__}"]
            for name in ("", *(service.full_name for service in SERVICES)):
                await self._health.set(name, status.NOT_SERVING if reasons else status.SERVING)
            await asyncio.sleep(HEALTH_EVERY_SECONDS)

    def _controller_check(self) -> str:
        silent_seconds = time.monotonic() - self._controller.last_turn
        stuck = silent_seconds > CONTROLLER_STALE_SECONDS
        return f"the controller has been stuck for {silent_seconds:.0f} s" if stuck else ""


def _use_one_arena() -> None:
    """Keeps glibc from giving each thread a heap of its own, which keeps what it once held: a third of the memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


def server_certificate(
    directory: Path, settings: Settings, *, authority: ca.CertificateAuthority
) -> tuple[bytes, bytes]:
    """The coordinator's own key and certificate as PEM: the operator's, or one of this federation's.

    The latter is made anew when there is none, two thirds of its life are over, or the settings name other hosts.
    """
    own, now, days = settings.certificates, ca.utc_now(), settings.certificates.server_days
    if own.server_certificate:
        return ca.operators_own(directory / own.server_certificate, directory / own.server_key, now=now)
    key_path, path = directory / SERVER_KEY_FILE, directory / SERVER_CERTIFICATE_FILE
    old = path.read_bytes() if path.exists() else None
    if (
        old is None
        or ca.expiry_of(old) < now + timedelta(days=days / 3)
        or ca.hosts_of(old) != set(settings.certificates.hosts)
    ):
        key = ca.new_key()
        issued = authority.issue_server(key, hosts=settings.certificates.hosts, valid_days=days, now=now)
        # Without a certificate the pair is made anew, so a kill between the two writes leaves none that do not match.
        path.unlink(missing_ok=True)
        ca.write_private(key_path, ca.key_pem(key))
        path.write_bytes(issued.pem)
    return key_path.read_bytes(), path.read_bytes()


def replica_name(directory: Path) -> str:
    """Names the coordinator that holds this very directory on this very machine; its lock says that there is only one.

    A copy of the directory, or of the whole machine, is another replica. After a reboot it is a new one too: it then
    waits until the silence of the old one is certain, like every other.
    """
    lock = (directory / "lock").stat()
    boot = BOOT_ID.read_text() if BOOT_ID.exists() else secrets.token_hex(8)
    which = digest_of(f"{boot}:{lock.st_dev}:{lock.st_ino}".encode())[:12]
    return f"{socket.gethostname()[:40]}-{which}"


def coordinator_version() -> str:
    try:
        return version("silotune")
    except PackageNotFoundError:
        return "0+unpackaged"


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _taken(address) from error


def _taken(address: str) -> Conflict:
    return Conflict(
        f"Cannot listen on {address}: another program has this port, or the address is not this machine's.",
        hint="Choose another in coordinator.toml, section [listen].",
    )


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
