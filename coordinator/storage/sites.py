"""The registry of sites: who was invited, who is enrolled, who is out. Times are the coordinator's wall clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, case, insert, select, update

from coordinator.storage import schema
from coordinator.storage.database import Database
from protos.errors import AlreadyExists, NotFound, Unauthenticated
from protos.identity import Identity, Role, check_name

# An agent polls at least every 30 s; a site that was not heard of for longer than two polls counts as away.
CONNECTED_SECONDS = 60.0


@dataclass(frozen=True)
class SiteRow:
    name: str
    role: Role
    state: str  # INVITED -> ENROLLED -> REVOKED
    enrolled_unix_seconds: float
    last_seen_unix_seconds: float
    certificate_expires_unix_seconds: float
    agent: Mapping[str, Any]

    def connected(self, *, now_unix_seconds: float) -> bool:
        return self.state == "ENROLLED" and now_unix_seconds - self.last_seen_unix_seconds <= CONNECTED_SECONDS


class Sites:
    def __init__(self, database: Database) -> None:
        self._database = database

    def invite(
        self, name: str, *, role: Role, secret_hash: str, expires_unix_seconds: float, now_unix_seconds: float
    ) -> None:
        """AlreadyExists when a site of this name is enrolled; a second invitation replaces an unused one."""
        check_name(name)
        with self._database.write() as connection:
            row = connection.execute(select(schema.sites).where(schema.sites.c.name == name)).first()
            if row is not None and row.state == "ENROLLED":
                raise AlreadyExists(
                    f"A site named {name} is enrolled.", hint=f"Revoke it first (`silotune site revoke {name}`)."
                )
            connection.execute(schema.invitations.delete().where(schema.invitations.c.name == name))
            connection.execute(
                insert(schema.invitations).values(
                    secret_hash=secret_hash, name=name, role=role.value, expires_unix_seconds=expires_unix_seconds
                )
            )
            values = {"role": role.value, "state": "INVITED", "certificate_serial": ""}
            if row is None:
                connection.execute(insert(schema.sites).values(name=name, agent={}, **values))
            else:
                connection.execute(update(schema.sites).where(schema.sites.c.name == name).values(**values))

    def invited(self, secret_hash: str, *, key_hash: str, now_unix_seconds: float) -> Identity:
        """Whose invitation this is. Unauthenticated when it is unknown, expired, or used for another key."""
        with self._database.read() as connection:
            row = connection.execute(
                select(schema.invitations).where(schema.invitations.c.secret_hash == secret_hash)
            ).first()
        if row is None:
            raise _bad_token("is not known here")
        if now_unix_seconds > row.expires_unix_seconds:
            raise _bad_token("has expired")
        if row.used_by_key not in ("", key_hash):
            raise _bad_token("was used already")
        return Identity(Role(row.role), row.name)

    def redeem(
        self, secret_hash: str, *, key_hash: str, serial: str, expires_unix_seconds: float, now_unix_seconds: float
    ) -> Identity:
        """Uses the invitation up. Of two keys that race exactly one wins; the same key may repeat a lost answer."""
        identity = self.invited(secret_hash, key_hash=key_hash, now_unix_seconds=now_unix_seconds)
        invitations, sites = schema.invitations, schema.sites
        with self._database.write() as connection:
            mine = invitations.c.secret_hash == secret_hash
            first = connection.execute(
                update(invitations).where(mine, invitations.c.used_by_key == "").values(used_by_key=key_hash)
            )
            won = connection.execute(select(invitations).where(mine, invitations.c.used_by_key == key_hash)).all()
            values = {"certificate_serial": serial, "certificate_expires_unix_seconds": expires_unix_seconds}
            # A repeat at a replica whose clock is behind must not give a certificate from before its enrollment.
            values["enrolled_unix_seconds"] = (
                now_unix_seconds
                if first.rowcount
                else case(
                    (sites.c.enrolled_unix_seconds > now_unix_seconds, now_unix_seconds),
                    else_=sites.c.enrolled_unix_seconds,
                )
            )
            # A site that was revoked meanwhile must not come back by repeating its enrollment.
            known = connection.execute(
                update(sites)
                .where(sites.c.name == identity.name, sites.c.state.in_(("INVITED", "ENROLLED")))
                .values(state="ENROLLED", **values)
            )
            if not won or known.rowcount != 1:
                raise _bad_token("was used already")
        return identity

    def record_certificate(self, name: str, *, serial: str, expires_unix_seconds: float) -> None:
        self._change(name, certificate_serial=serial, certificate_expires_unix_seconds=expires_unix_seconds)

    def revoke(self, name: str) -> None:
        self._change(name, state="REVOKED")

    def see(self, name: str, *, agent: Mapping[str, Any] | None, now_unix_seconds: float) -> None:
        """Notes that the site's agent called, and what it says of itself when `agent` is given."""
        values: dict[str, Any] = {"last_seen_unix_seconds": now_unix_seconds, "calls": schema.sites.c.calls + 1}
        if agent is not None:
            values["agent"] = dict(agent)
        self._change(name, **values)

    def calls(self) -> dict[str, tuple[int, float]]:
        """(calls noted so far, when the last was) by the name of each enrolled site."""
        sites = schema.sites
        with self._database.read() as connection:
            rows = connection.execute(
                select(sites.c.name, sites.c.calls, sites.c.last_seen_unix_seconds).where(sites.c.state == "ENROLLED")
            )
            return {row.name: (row.calls, row.last_seen_unix_seconds) for row in rows}

    def get(self, name: str) -> SiteRow | None:
        with self._database.read() as connection:
            row = connection.execute(select(schema.sites).where(schema.sites.c.name == name)).first()
        return None if row is None else _site(row)

    def named(self, names: Collection[str]) -> dict[str, SiteRow]:
        """Those of these that are in the registry."""
        with self._database.read() as connection:
            rows = connection.execute(select(schema.sites).where(schema.sites.c.name.in_(tuple(names))))
            return {row.name: _site(row) for row in rows}

    def all(self) -> list[SiteRow]:
        with self._database.read() as connection:
            rows = connection.execute(select(schema.sites).order_by(schema.sites.c.name)).all()
        return [_site(row) for row in rows]

    def _change(self, name: str, **values: Any) -> None:
        with self._database.write() as connection:
            done = connection.execute(update(schema.sites).where(schema.sites.c.name == name).values(**values))
            if done.rowcount != 1:
                raise NotFound(f"There is no site named {name!r}.", hint="`silotune site list` shows them all.")


def _bad_token(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"This join token {why}.", hint="Ask the operator for a new one: `silotune site invite NAME`."
    )


def _site(row: Row[Any]) -> SiteRow:
    return SiteRow(
        name=row.name,
        role=Role(row.role),
        state=row.state,
        enrolled_unix_seconds=row.enrolled_unix_seconds,
        last_seen_unix_seconds=row.last_seen_unix_seconds,
        certificate_expires_unix_seconds=row.certificate_expires_unix_seconds,
        agent=row.agent,
    )
