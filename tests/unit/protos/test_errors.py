"""Every error crosses the wire as itself, and every gRPC code becomes an error that a person understands."""

from __future__ import annotations

import grpc
import pytest

from protos import errors
from protos.errors import SilotuneError

CODES = {code.name: code.value[0] for code in grpc.StatusCode}


def facts_of(cls: type[SilotuneError]) -> dict[str, object]:
    return {"committed_size": 17} if issubclass(cls, errors.WrongOffset) else {"site": "st-olav"}


@pytest.mark.parametrize("cls", errors.all_errors())
def test_every_error_has_a_code_that_grpc_knows(cls: type[SilotuneError]) -> None:
    assert cls.code in CODES


@pytest.mark.parametrize("cls", errors.all_errors())
def test_every_error_comes_back_as_itself(cls: type[SilotuneError]) -> None:
    error = cls("The blob é is damaged.", hint="Send it again.", **facts_of(cls))
    details = errors.to_details(error, code_number=CODES[cls.code])
    received = errors.from_details(cls.code, "ignored", details)
    assert type(received) is cls
    assert (received.message, received.hint, received.facts) == (error.message, error.hint, error.facts)
    assert str(received) == "The blob é is damaged. Send it again."


def test_the_committed_size_survives_the_wire() -> None:
    error = errors.WrongOffset("Continue at byte 17.", committed_size=17)
    received = errors.from_details("ABORTED", "", errors.to_details(error, code_number=CODES["ABORTED"]))
    assert isinstance(received, errors.WrongOffset) and received.committed_size == 17


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawing = errors.__doc__ or ""
    for cls in errors.all_errors():
        assert cls.__name__ in drawing
        if cls.code != SilotuneError.code:
            assert cls.code in drawing


@pytest.mark.parametrize("code", sorted(set(CODES) - {"OK"}))
def test_every_code_without_our_details_still_means_something(code: str) -> None:
    error = errors.from_details(code, "connection refused", None)
    assert isinstance(error, SilotuneError)
    assert error.message == "connection refused"


def test_the_table_of_codes_names_only_codes_of_grpc() -> None:
    assert set(errors.BY_CODE) <= set(CODES)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_a_coordinator_that_cannot_be_reached_is_asked_again(code: str) -> None:
    assert errors.from_details(code, "", None).retryable


def test_a_newer_coordinators_error_is_taken_by_its_code() -> None:
    newer = type("ErrorOfNextYear", (errors.Conflict,), {})
    details = errors.to_details(newer("Not now."), code_number=CODES["FAILED_PRECONDITION"])
    newer_name = newer.__name__.encode()
    details = details.replace(newer_name, b"X" * len(newer_name))
    received = errors.from_details("FAILED_PRECONDITION", "", details)
    assert type(received) is errors.Conflict and received.message == "Not now."


@pytest.mark.parametrize("details", [b"\xff\xff\xff", b"\x0a", b"junk"])
def test_details_that_cannot_be_read_are_as_good_as_none(details: bytes) -> None:
    assert type(errors.from_details("NOT_FOUND", "no such job", details)) is errors.NotFound


def test_a_fact_may_have_any_name() -> None:
    """A proxy or a newer coordinator may add metadata; none of it may break the receiver."""
    error = errors.NotFound("No such job.")
    error.facts = {"message": "x", "self": "y"}
    received = errors.from_details("NOT_FOUND", "", errors.to_details(error, code_number=CODES["NOT_FOUND"]))
    assert received.message == "No such job." and received.facts == error.facts
