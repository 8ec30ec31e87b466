"""Every error that may cross the wire or reach a person, in one tree.

    SilotuneError
    ├── InvalidInput            INVALID_ARGUMENT      what was sent or written is wrong; repeating does not help
    │   ├── RecipeInvalid
    │   ├── UpdateRejected
    │   └── SiteConfigInvalid   (raised at a site only)
    ├── NotFound                NOT_FOUND             it does not exist, or the caller may not know that it does
    ├── AlreadyExists           ALREADY_EXISTS        another one has this name, or another result is recorded
    ├── Conflict                FAILED_PRECONDITION   the state does not allow it
    │   └── LeaseFenced                               a newer grant of the task replaced the caller's
    ├── Unauthenticated         UNAUTHENTICATED       no valid certificate or token
    ├── Forbidden               PERMISSION_DENIED     a valid identity that may not do this
    ├── WrongOffset             ABORTED               continue at `committed_size`            (retryable)
    ├── CorruptData             DATA_LOSS             a checksum or digest does not match     (retryable)
    ├── OutOfSpace              RESOURCE_EXHAUSTED    disk or quota; goes on when there is room (retryable)
    ├── Unavailable             UNAVAILABLE           the other side cannot be reached now    (retryable)
    └── Internal                INTERNAL              a defect of ours; the log has the trace

The class is the reason: it travels as `google.rpc.ErrorInfo.reason`, so the receiver raises the same class again.
"""

from __future__ import annotations

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "silotune"
DETAILS_KEY = "grpc-status-details-bin"


class SilotuneError(Exception):
    """`message` says in one sentence what is wrong and where; `hint` what to do about it."""

    code = "INTERNAL"
    retryable = False

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = {name: str(value) for name, value in facts.items()}

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InvalidInput(SilotuneError):
    code = "INVALID_ARGUMENT"


class RecipeInvalid(InvalidInput):
    pass


class UpdateRejected(InvalidInput):
    pass


class SiteConfigInvalid(InvalidInput):
    pass


class NotFound(SilotuneError):
    code = "NOT_FOUND"


class AlreadyExists(SilotuneError):
    code = "ALREADY_EXISTS"


class Conflict(SilotuneError):
    code = "FAILED_PRECONDITION"


class LeaseFenced(Conflict):
    pass


class Unauthenticated(SilotuneError):
    code = "UNAUTHENTICATED"


class Forbidden(SilotuneError):
    code = "PERMISSION_DENIED"


class WrongOffset(SilotuneError):
    code = "ABORTED"
    retryable = True

    @property
    def committed_size(self) -> int:
        return int(self.facts["committed_size"])


class CorruptData(SilotuneError):
    code = "DATA_LOSS"
    retryable = True


class OutOfSpace(SilotuneError):
    code = "RESOURCE_EXHAUSTED"
    retryable = True


class Unavailable(SilotuneError):
    code = "UNAVAILABLE"
    retryable = True


class Internal(SilotuneError):
    code = "INTERNAL"


def all_errors() -> list[type[SilotuneError]]:
    """Every class of the tree, parents before children."""
    found: list[type[SilotuneError]] = []
    queue: list[type[SilotuneError]] = [SilotuneError]
    while queue:
        cls = queue.pop(0)
        found.append(cls)
        queue.extend(cls.__subclasses__())
    return found


# The exit code of every command that ends with an error, by gRPC code name. 0: done; 1: the work failed; 2: usage.
EXIT_CODES: dict[str, int] = {
    "INVALID_ARGUMENT": 3,
    "NOT_FOUND": 4,
    "ALREADY_EXISTS": 5,
    "FAILED_PRECONDITION": 5,
    "UNAUTHENTICATED": 6,
    "PERMISSION_DENIED": 6,
    "ABORTED": 7,
    "UNAVAILABLE": 7,
    "DATA_LOSS": 8,
    "RESOURCE_EXHAUSTED": 8,
    "INTERNAL": 9,
}

# What a transport failure without our details means to the caller, by gRPC code name.
BY_CODE: dict[str, type[SilotuneError]] = {
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": Unavailable,
    "CANCELLED": Unavailable,
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": Conflict,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Forbidden,
    "ABORTED": Unavailable,
    "DATA_LOSS": CorruptData,
    "RESOURCE_EXHAUSTED": OutOfSpace,
}


def to_details(error: SilotuneError, *, code_number: int) -> bytes:
    """The serialised google.rpc.Status that goes into the trailing metadata under DETAILS_KEY."""
    info = error_details_pb2.ErrorInfo(
        reason=type(error).__name__, domain=DOMAIN, metadata={**error.facts, "hint": error.hint}
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    return status_pb2.Status(code=code_number, message=error.message, details=[packed]).SerializeToString()


def from_details(code_name: str, message: str, details: bytes | None) -> SilotuneError:
    """The error that the other side raised, or the class that the bare gRPC code stands for."""
    by_code = BY_CODE.get(code_name, Internal)
    try:
        status = status_pb2.Status.FromString(details or b"")
        for packed in status.details:
            info = error_details_pb2.ErrorInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                by_name = {cls.__name__: cls for cls in all_errors()}
                error = by_name.get(info.reason, by_code)(status.message, hint=info.metadata.get("hint", ""))
                error.facts = {name: value for name, value in info.metadata.items() if name != "hint"}
                return error
    except DecodeError:
        # A proxy's own trailers, or damaged ones: the bare code still says what kind of failure it is.
        return by_code(message or code_name)
    return by_code(message or code_name)
