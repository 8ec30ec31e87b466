"""What the registry of sites must do: one token, one key, one site; and whoever is out stays out."""

from __future__ import annotations

import threading

import pytest

from coordinator.storage.store import Store
from protos.errors import AlreadyExists, NotFound, Unauthenticated
from protos.identity import Role
from tests.contract.conftest import NOW, enroll


def test_of_two_keys_that_race_for_one_token_exactly_one_wins(store: Store) -> None:
    store.sites.invite("a", role=Role.SITE, secret_hash="h", expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    outcomes: list[str] = []

    def redeem(key: str) -> None:
        try:
            store.sites.redeem("h", key_hash=key, serial=key, expires_unix_seconds=NOW, now_unix_seconds=NOW)
            outcomes.append(key)
        except Unauthenticated:
            outcomes.append("refused")

    threads = [threading.Thread(target=redeem, args=(f"key-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome != "refused"]
    assert len(winners) == 1 and len(outcomes) == 8
    redeem(winners[0])
    assert outcomes[-1] == winners[0], "the same key may ask again when its answer was lost"


def test_expired_unknown_and_revoked_invitations_are_refused(store: Store) -> None:
    store.sites.invite("a", role=Role.SITE, secret_hash="h", expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    with pytest.raises(Unauthenticated, match="expired"):
        store.sites.invited("h", key_hash="k", now_unix_seconds=NOW + 61)
    with pytest.raises(Unauthenticated, match="not known"):
        store.sites.invited("x", key_hash="k", now_unix_seconds=NOW)
    enroll(store, "b")
    with pytest.raises(AlreadyExists):
        store.sites.invite("b", role=Role.SITE, secret_hash="i", expires_unix_seconds=NOW, now_unix_seconds=NOW)
    store.sites.revoke("b")
    with pytest.raises(Unauthenticated):
        store.sites.redeem("secret of b", key_hash="key", serial="2", expires_unix_seconds=NOW, now_unix_seconds=NOW)
    with pytest.raises(NotFound):
        store.sites.revoke("nobody")


def test_a_new_enrollment_ends_the_certificates_of_the_one_before(store: Store) -> None:
    enroll(store, "a")
    assert (before := store.sites.get("a")) is not None and before.enrolled_unix_seconds == NOW
    store.sites.revoke("a")
    store.sites.invite("a", role=Role.SITE, secret_hash="2", expires_unix_seconds=NOW + 60, now_unix_seconds=NOW)
    later = {"serial": "2", "expires_unix_seconds": NOW + 9e6, "now_unix_seconds": NOW + 50}
    store.sites.redeem("2", key_hash="key", **later)
    assert (after := store.sites.get("a")) is not None and after.enrolled_unix_seconds == NOW + 50
    store.sites.redeem("2", key_hash="key", **{**later, "now_unix_seconds": NOW + 55})
    assert (again := store.sites.get("a")) is not None and again.enrolled_unix_seconds == NOW + 50
    # Repeated at a replica whose clock is behind: the certificate that it gives must not be from before the enrollment.
    store.sites.redeem("2", key_hash="key", **{**later, "now_unix_seconds": NOW + 40})
    assert (behind := store.sites.get("a")) is not None and behind.enrolled_unix_seconds == NOW + 40
