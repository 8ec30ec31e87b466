"""The operator's side of the coordinator: a profile on disk, and calls over mutual TLS.

Calls are synchronous, because a command does one thing after another. Every one has a deadline: a stopped server
answers nothing, and keepalive notices only a dead connection. A profile may name several addresses, of replicas: one
that is unavailable is left for the next.
"""

from __future__ import annotations

import itertools
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from cryptography import x509
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from coordinator.settings import profile_directory
from protos import frames
from protos.channel import CLIENT_OPTIONS
from protos.errors import DETAILS_KEY, SilotuneError, Unauthenticated, Unavailable, from_details
from protos.frames import Frame
from protos.identity import INSECURE_IDENTITY_KEY, Identity, Role, addresses_of
from protos.v1 import manifest_pb2, operator_pb2_grpc, transfer_pb2, transfer_pb2_grpc

CALL_TIMEOUT_SECONDS = 15.0
# One stream of a download; a longer one is continued by the next.
READ_TIMEOUT_SECONDS = 600.0
# One stream of an upload, likewise: half of it for sending, and the coordinator flushes what it has.
WRITE_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Profile:
    """Who the operator is, and where the coordinator: what `silotune-coordinator init` wrote."""

    directory: Path
    # Of each replica, with commas between.
    address: str
    # PEM: the federation's CA, and those that the profile's ca_bundle adds for the coordinator's certificate.
    ca: bytes
    certificate: bytes
    key: bytes
    # For a coordinator that serves with --insecure-loopback, in benchmarks: no TLS, and only to this machine.
    insecure_loopback: bool = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return addresses_of(self.address)

    @property
    def expires(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


def load_profile(name_or_directory: str) -> Profile:
    """Unauthenticated when there is no such profile, or a part of it is missing."""
    directory = profile_directory(name_or_directory)
    try:
        fields = tomllib.loads((directory / "profile.toml").read_text())
        addresses = addresses_of(fields["address"])
        if not addresses:
            raise KeyError("address")
        on_this_machine = all(address.startswith("127.0.0.1:") for address in addresses)
        bundle = (directory / fields["ca_bundle"]).read_bytes() if fields.get("ca_bundle") else b""
        return Profile(
            directory=directory,
            address=fields["address"],
            insecure_loopback=fields.get("insecure_loopback", False) and on_this_machine,
            ca=(directory / "ca.pem").read_bytes() + b"\n" + bundle,
            certificate=(directory / "certificate.pem").read_bytes(),
            key=(directory / "key.pem").read_bytes(),
        )
    except FileNotFoundError as error:
        raise Unauthenticated(
            f"There is no operator profile in {directory}: {Path(error.filename).name} is missing.",
            hint="`silotune-coordinator init` writes one; copy its folder here, or name another with --profile.",
        ) from None
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise Unauthenticated(f"{directory / 'profile.toml'} does not name the coordinator's address.") from error


class OperatorClient:
    """One connection to the coordinator. SilotuneError as the coordinator raised it; Unavailable without an answer."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._addresses = itertools.cycle(profile.addresses)
        self._connect()

    def __enter__(self) -> OperatorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self, method: str, request: Message, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> Any:
        """The answer of one method of OperatorService, in characters that a terminal may be given.

        Each address is asked once before it is given up. An action whose answer was lost may so be asked for twice, as
        by a person who types the command again: it succeeds and changes nothing more.
        """
        for _ in self.profile.addresses[1:]:
            try:
                return self._ask(method, request, timeout_seconds=timeout_seconds)
            except Unavailable:
                self._try_next_address()
        return self._ask(method, request, timeout_seconds=timeout_seconds)

    def _ask(self, method: str, request: Message, *, timeout_seconds: float) -> Any:
        try:
            answer = getattr(self._stub, method)(request, timeout=timeout_seconds, metadata=self._metadata)
            return _made_printable(answer)
        except grpc.RpcError as error:
            raise self._explain(error, timeout_seconds=timeout_seconds) from error

    def read(self, digest: str, *, offset: int) -> Iterator[Frame]:
        """The frames of a blob from `offset` on, each checked; CorruptData where one is not what was sent.

        Unavailable, and the next attempt goes to the next address.
        """
        with self._open_channel() as channel:
            read: Any = channel.unary_stream(
                "/silotune.v1.TransferService/Read",
                request_serializer=transfer_pb2.ReadRequest.SerializeToString,
                response_deserializer=None,
            )
            request = transfer_pb2.ReadRequest(digest=digest, offset=offset)
            call = read(request, timeout=READ_TIMEOUT_SECONDS, metadata=self._metadata)
            try:
                for message in call:
                    yield frames.decode(message)
            except grpc.RpcError as error:
                explained = self._explain(error, timeout_seconds=READ_TIMEOUT_SECONDS)
                if isinstance(explained, Unavailable):
                    self._try_next_address()
                raise explained from error
            finally:
                call.cancel()

    def write(self, path: Path, digest: str, *, on_bytes: Callable[[int], None]) -> None:
        """Uploads the file that has this digest, from where an earlier attempt stopped; `on_bytes` gets what is there.

        Unavailable when the connection is lost; the next attempt goes on.
        """
        blob = manifest_pb2.BlobRef(digest=digest, size=path.stat().st_size)
        with self._open_channel() as channel, path.open("rb") as file:
            stub = transfer_pb2_grpc.TransferServiceStub(channel)
            write: Any = channel.stream_unary(
                "/silotune.v1.TransferService/Write",
                request_serializer=None,
                response_deserializer=transfer_pb2.WriteResponse.FromString,
            )
            try:
                status = stub.QueryWriteStatus(
                    transfer_pb2.QueryWriteStatusRequest(blob=blob),
                    timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata,
                )  # fmt: skip
                offset = status.committed_size
                while not status.sealed:
                    messages = _frames(file, blob, offset=offset, on_bytes=on_bytes)
                    status = write(messages, timeout=WRITE_TIMEOUT_SECONDS, metadata=self._metadata)
                    offset = status.committed_size
            except grpc.RpcError as error:
                raise self._explain(error, timeout_seconds=WRITE_TIMEOUT_SECONDS) from error

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        me = Identity(Role.OPERATOR, "operator")
        return ((INSECURE_IDENTITY_KEY, me.uri),) if self.profile.insecure_loopback else ()

    def _connect(self) -> None:
        self._address = next(self._addresses)
        self._channel = self._open_channel()
        self._stub = operator_pb2_grpc.OperatorServiceStub(self._channel)

    def _try_next_address(self) -> None:
        if len(self.profile.addresses) > 1:
            self._channel.close()
            self._connect()

    def _open_channel(self) -> grpc.Channel:
        if self.profile.insecure_loopback:
            return grpc.insecure_channel(self._address, options=CLIENT_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=self.profile.ca,
            private_key=self.profile.key,
            certificate_chain=self.profile.certificate,
        )
        return grpc.secure_channel(self._address, credentials, options=CLIENT_OPTIONS)

    def _explain(self, error: Any, *, timeout_seconds: float) -> SilotuneError:
        code, details = error.code().name, error.details() or ""
        packed = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), None)
        found = from_details(code, details, packed)
        found.message, found.hint = printable(found.message), printable(found.hint)
        if packed is not None or not isinstance(found, Unavailable):
            return found
        # gRPC says "Socket closed" when the server refuses the client's certificate, so look at it here.
        if self.profile.expires < datetime.now(UTC):
            return Unauthenticated(
                f"The operator certificate in {self.profile.directory} expired on {self.profile.expires:%Y-%m-%d}.",
                hint="`silotune-coordinator operator` on the coordinator's machine writes a fresh profile.",
            )
        reason, hint = _what_to_check(code, details, timeout_seconds=timeout_seconds)
        return Unavailable(f"The coordinator at {self._address} cannot be reached: {reason}.", hint=hint)


def _frames(
    file: BinaryIO, blob: manifest_pb2.BlobRef, *, offset: int, on_bytes: Callable[[int], None]
) -> Iterator[bytes]:
    """The messages of one upload: as much as can be sent in a call's time, the rest is for the next."""
    yield frames.encode_target(transfer_pb2.UploadTarget(blob=blob))
    until = time.monotonic() + WRITE_TIMEOUT_SECONDS / 2
    file.seek(offset)
    while time.monotonic() < until and (data := file.read(frames.FRAME_BYTES)):
        yield frames.encode(data, offset=offset)
        offset += len(data)
        on_bytes(offset)


def _what_to_check(code: str, details: str, *, timeout_seconds: float) -> tuple[str, str]:
    if code == "DEADLINE_EXCEEDED":
        return (
            f"no answer within {timeout_seconds:.0f} s",
            "Check that a firewall lets this machine through, and that the coordinator is not overloaded.",
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            "its certificate is not from the CA in this profile",
            "Check the address in profile.toml; after a new `silotune-coordinator init` copy the new profile. If its "
            "certificate is of another CA, name a file with that CA as ca_bundle in profile.toml.",
        )
    if "HTTP proxy returned" in details:
        code = details.rpartition(" ")[2]
        return f"the proxy of https_proxy refuses with {code}", "Ask your network team, or except the host by no_proxy."
    if "Peer name" in details or "Hostname Verification" in details:
        return (
            "its certificate is for another host name",
            "Use a name or address that was given to `silotune-coordinator init --host`.",
        )
    if "andshake failed" in details:
        return "what answers there does not speak this TLS", "Check the address in profile.toml: is it the main port?"
    if "refused" in details:
        return "nothing listens there", "Check that `silotune-coordinator serve` runs, and the address in profile.toml."
    return details.split("\n")[0][:200].rstrip(".") or code, "Check the address in profile.toml and the network."


def printable(text: str) -> str:
    """`text` without the characters that a terminal obeys instead of showing them: escapes, line ends, overrides."""
    return text if text.isprintable() else "".join(character for character in text if character.isprintable())


def _made_printable(message: Message) -> Message:
    """The same message, every text in it made printable: sites wrote some of them, and the answer is shown to people.

    A recipe stays as it is to the letter: its hash is bound to that.
    """
    for field, value in message.ListFields():
        if field.message_type is not None:
            if not field.message_type.GetOptions().map_entry:
                for inner in value if field.is_repeated else [value]:
                    _made_printable(inner)
        elif field.type == FieldDescriptor.TYPE_STRING and field.name != "spec_json":
            if field.is_repeated:
                value[:] = [printable(text) for text in value]
            else:
                setattr(message, field.name, printable(value))
    return message


def facts(message: Message) -> dict[str, Any]:
    """A message as plain values for JSON: numbers stay numbers, enums lose their prefix, what is not set is None."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(value)
        elif field.is_repeated:
            found[field.name] = [_fact(item, field) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        else:
            found[field.name] = _fact(value, field)
    return found


def _fact(value: Any, field: Any) -> Any:
    if isinstance(value, Message):
        return facts(value)
    return word(field.enum_type, value) if field.enum_type is not None else value


def word(enum: Any, value: int) -> str:
    """An enum's value as people say it: JOB_STATE_RUNNING is RUNNING, an unset one is empty."""
    name: str = enum.values_by_number[value].name
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return "" if value == 0 else name.removeprefix(prefix)
