from __future__ import annotations

import asyncio
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client_agent import identity
from client_agent.identity import CERTIFICATE, KEY
from protos.errors import AlreadyExists, InvalidInput, Unauthenticated, Unavailable
from tests.unit.client_agent.coordinator_in_memory import Authority, Coordinator, changed_token


async def enroll(directory: Path, coordinator: Coordinator, **changes: str) -> identity.SiteIdentity:
    token = coordinator.authority.token("st-olav", address=coordinator.enrollment_address)
    token = changed_token(token, **changes)
    return await asyncio.to_thread(identity.enroll, directory, token=token, coordinator=coordinator.address)


async def test_enrollment_makes_a_private_key_here_and_gets_a_certificate(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    enrolled = await enroll(tmp_path, coordinator)
    assert identity.load(tmp_path) == enrolled
    assert (enrolled.name, enrolled.role, enrolled.coordinator) == ("st-olav", "site", coordinator.address)
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600


async def test_an_enrolled_agent_does_not_enroll_again_unless_told_to(tmp_path: Path, coordinator: Coordinator) -> None:
    first = await enroll(tmp_path, coordinator)
    with pytest.raises(AlreadyExists, match="already enrolled as st-olav"):
        await enroll(tmp_path, coordinator)
    coordinator.enrolled_keys.clear()
    token = coordinator.authority.token("st-olav", address=coordinator.enrollment_address)
    second = await asyncio.to_thread(
        identity.enroll, tmp_path, token=token, coordinator=coordinator.address, replace=True
    )
    assert second.key != first.key
    assert identity.load(tmp_path) == second


async def test_a_repeat_after_a_lost_answer_uses_the_same_key(tmp_path: Path, coordinator: Coordinator) -> None:
    coordinator.lose_enrollment_answers = 1
    with pytest.raises(Unavailable):
        await enroll(tmp_path, coordinator)
    assert not identity.is_enrolled(tmp_path)
    await enroll(tmp_path, coordinator)
    assert len(coordinator.enrolled_keys) == 1


async def test_a_coordinator_of_another_federation_is_not_trusted(tmp_path: Path, coordinator: Coordinator) -> None:
    other = Authority("Zscaler Root CA").token("st-olav", address=coordinator.enrollment_address)
    with pytest.raises(Unavailable, match="was issued by 'test federation', not by this federation; a proxy"):
        await enroll(tmp_path, coordinator, ca=other.ca)
    assert not coordinator.enrolled_keys


async def test_a_wrong_secret_is_unauthenticated(tmp_path: Path, coordinator: Coordinator) -> None:
    with pytest.raises(Unauthenticated, match="not known"):
        await enroll(tmp_path, coordinator, secret="guess")


async def test_a_certificate_for_another_name_is_refused(tmp_path: Path, coordinator: Coordinator) -> None:
    with pytest.raises(InvalidInput, match="names st-olav; the token was for ullevaal"):
        await enroll(tmp_path, coordinator, name="ullevaal")


async def test_a_certificate_that_the_federations_ca_did_not_sign_is_refused(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    coordinator.client_authority = Authority()
    with pytest.raises(InvalidInput, match="not signed by this federation's CA"):
        await enroll(tmp_path, coordinator)
    assert not identity.is_enrolled(tmp_path)


async def test_an_unreachable_enrollment_address_is_named(tmp_path: Path, coordinator: Coordinator) -> None:
    with pytest.raises(Unavailable, match=r"nothing listens at 127\.0\.0\.1:1"):
        await enroll(tmp_path, coordinator, enrollment_address="127.0.0.1:1")


def test_an_agent_that_was_never_enrolled_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="not enrolled yet") as error:
        identity.load(tmp_path)
    assert "silotune-agent enroll" in error.value.hint


async def test_renewal_is_due_after_two_thirds_of_the_life(tmp_path: Path, coordinator: Coordinator) -> None:
    enrolled = await enroll(tmp_path, coordinator)
    now = datetime.now(UTC)
    assert not enrolled.renewal_due(now=now + timedelta(days=19))
    assert enrolled.renewal_due(now=now + timedelta(days=21))


async def test_an_expired_certificate_is_said_in_words(tmp_path: Path, coordinator: Coordinator) -> None:
    enrolled = await enroll(tmp_path, coordinator)
    enrolled.check_valid(now=datetime.now(UTC))
    with pytest.raises(Unauthenticated, match="expired") as error:
        enrolled.check_valid(now=datetime.now(UTC) + timedelta(days=31))
    assert "site invite st-olav" in error.value.hint


async def test_a_renewal_cut_between_its_two_renames_is_completed_at_the_next_start(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    old = await enroll(tmp_path, coordinator)
    new_key = identity.new_key_for_renewal(tmp_path)
    certificate = coordinator.authority.sign(identity.make_csr(new_key, name="st-olav"), name="st-olav")
    (tmp_path / CERTIFICATE).write_bytes(certificate)
    identity.complete_renewal(tmp_path)
    renewed = identity.load(tmp_path)
    assert (renewed.key, renewed.certificate) == (new_key, certificate)
    assert renewed.key != old.key


async def test_a_key_whose_renewal_never_came_changes_nothing(tmp_path: Path, coordinator: Coordinator) -> None:
    old = await enroll(tmp_path, coordinator)
    identity.new_key_for_renewal(tmp_path)
    identity.complete_renewal(tmp_path)
    assert identity.load(tmp_path) == old
    (tmp_path / "key.pem.new").write_bytes(b"half a key")
    identity.complete_renewal(tmp_path)
    assert identity.load(tmp_path) == old


async def test_a_renewed_certificate_over_another_key_is_not_installed(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    old = await enroll(tmp_path, coordinator)
    key = identity.new_key_for_renewal(tmp_path)
    with pytest.raises(InvalidInput, match="another key"):
        identity.install_renewal(tmp_path, key=key, certificate=old.certificate)
    assert identity.load(tmp_path) == old
