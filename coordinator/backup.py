"""Backup beside a serving coordinator, and restore: one moment of the database, and every blob that it names.

    DIR/manifest.json             written last: its presence means that the rest is complete
    DIR/database-<digest>.db      every row, as SQLite, whatever engine they come from
    DIR/blobs/<first two>/<digest>
    DIR/settings/                 coordinator.toml and the keys beside it: keep a backup as secret as the original

The rows are read in one transaction, so what is restored was once the state. A blob that was collected as garbage
between the rows and its turn makes the rows too old: they are read again. One that newer rows still name is lost: the
backup goes on without it and says so, unless a job could not be used or go on without it. Blobs are copied, never
linked: what shares a disk's blocks with the original is lost with it. Rows and blobs are portable, so a restore into
another engine or another blob store is how one moves there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Connection, and_, func, insert, or_, select, update

from coordinator import ca, settings
from coordinator.settings import Settings, blob_directory, bucket_and_prefix, database_url
from coordinator.storage import schema
from coordinator.storage.blobs import BlobStore
from coordinator.storage.database import Database
from coordinator.storage.file_blobs import FileBlobStore, digest_of_file, sync_directory
from coordinator.storage.garbage import all_named, in_progress
from coordinator.storage.opening import open_blobs
from protos.errors import AlreadyExists, CorruptData, InvalidInput, NotFound, Unavailable

MANIFEST, BLOBS, SETTINGS = "manifest.json", "blobs", "settings"
FORMAT = 1
ROWS_AT_ONCE = 500
# Rows and blobs of a busy coordinator come together at the first or second look.
LOOKS = 10

Say = Callable[[str], None]


@dataclass(frozen=True)
class Manifest:
    format: int
    made_unix_seconds: float
    database: str
    database_digest: str
    blobs: int
    blob_bytes: int
    # Blobs that some row names and that the coordinator had lost before.
    missing: tuple[str, ...] = ()


def backup(directory: Path, found: Settings, *, to: Path, say: Say = lambda _: None) -> Manifest:
    """Puts the coordinator of `directory` as it is now into `to`, a new directory or an earlier backup of the same.

    Of an earlier backup the blobs are used again, and the rest is replaced at the very end. AlreadyExists: `to` holds
    something else. CorruptData: a blob is lost that cannot be done without.
    """
    _check_target(to, directory)
    (to / BLOBS).mkdir(parents=True, exist_ok=True, mode=0o700)
    with (
        tempfile.TemporaryDirectory(dir=to, prefix="being-made-") as scratch,
        _beside(found, directory, Path(scratch)) as blobs,
    ):
        rows = Path(scratch, "database.db")
        missing: dict[str, str] = {}
        for _ in range(LOOKS):
            with closing(Database.open(database_url(found, directory), migrate=False)) as source:
                _copy_database(source, rows)
            with closing(Database.open(f"sqlite:///{rows}")) as copied, copied.read() as connection:
                wanted = all_named(connection)
            say(f"{len(wanted)} blobs belong to it")
            before, missing = missing, _copy_blobs(sorted(wanted), blobs, to / BLOBS)
            # Newer rows name it again: it was not collected, it is lost.
            if missing.keys() <= before.keys():
                break
        else:
            raise Unavailable("Blobs were deleted faster than they could be copied.", hint="Make the backup again.")
        if missing:
            with closing(Database.open(f"sqlite:///{rows}")) as copied, copied.read() as connection:
                _tell_missing(connection, missing, say=say)
            wanted -= missing.keys()
        digest, _ = digest_of_file(rows)
        name = f"database-{digest[:12]}.db"
        _sync(rows)
        os.replace(rows, to / name)
    _copy_settings(directory, found, to / SETTINGS)
    sizes = [(to / BLOBS / blob[:2] / blob).stat().st_size for blob in wanted]
    manifest = Manifest(FORMAT, time.time(), name, digest, len(sizes), sum(sizes), tuple(sorted(missing)))
    _write(to / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    for path in [*to.glob("database-*"), *(to / BLOBS).glob("*/*")]:
        if path.name != name and path.name not in wanted:
            path.unlink()
    return manifest


def restore(source: Path, *, data: Path, storage: Mapping[str, str], say: Say = lambda _: None) -> Manifest:
    """Makes a data directory of a backup. `storage`: keys of coordinator.toml's section [storage] that change; the
    database and the blob store that it names then must be empty.

    AlreadyExists: one is not empty. CorruptData: the backup is damaged. Nothing can be served before all is there.
    """
    manifest = read_manifest(source)
    if data.exists() and any(data.iterdir()):
        raise AlreadyExists(f"{data} is not empty.", hint="Restore into a new directory.")
    if digest_of_file(source / manifest.database)[0] != manifest.database_digest:
        raise CorruptData(f"{source / manifest.database} is damaged.", hint="Restore an earlier backup.")
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=data, prefix="being-restored-") as name:
        scratch = Path(name)
        text = (source / SETTINGS / settings.FILE_NAME).read_text()
        for key, value in storage.items():
            text = with_storage_key(text, key, value)
        (scratch / settings.FILE_NAME).write_text(text)
        found = settings.load(scratch)
        rows = scratch / "rows.db"
        shutil.copyfile(source / manifest.database, rows)
        with (
            open_blobs(found, data) as blobs,
            closing(Database.open(f"sqlite:///{rows}")) as old,
            closing(Database.open(database_url(found, data))) as new,
        ):
            _check_empty(new, blobs, found)
            with old.read() as connection:
                wanted = all_named(connection) - set(manifest.missing)
            say(f"{len(wanted)} blobs belong to it")
            for digest in sorted(wanted):
                _adopt(source / BLOBS / digest[:2] / digest, digest, blobs, directory=blob_directory(found, data))
            with old.read() as reading, new.write() as writing:
                new.copying(writing)
                _copy_rows(reading, writing)
                # Nobody drives the jobs yet, and it is another blob store than before.
                writing.execute(update(schema.jobs).values(driver=""))
                writing.execute(schema.federation.delete().where(schema.federation.c.name == "blobs"))
        for path in (source / SETTINGS).iterdir():
            if path.name != settings.FILE_NAME:
                shutil.copy(path, data / path.name)
        # Last, because its presence means: set up.
        _write(data / settings.FILE_NAME, text)
    return manifest


def read_manifest(source: Path) -> Manifest:
    try:
        fields = json.loads((source / MANIFEST).read_text())
    except FileNotFoundError:
        raise NotFound(
            f"{source} has no complete backup.", hint="Its manifest is written last; make it again."
        ) from None
    except ValueError as error:
        raise CorruptData(f"{source / MANIFEST} cannot be read: {error}.") from error
    if fields.get("format") != FORMAT:
        raise InvalidInput(
            f"{source} has format {fields.get('format')}; this silotune reads format {FORMAT}.",
            hint="Restore it with the silotune that made it, or a newer one.",
        )
    return Manifest(**fields | {"missing": tuple(fields.get("missing", ()))})


def with_storage_key(text: str, key: str, value: str) -> str:
    """The text of a coordinator.toml with one key of [storage] changed, and everything else as it was written."""
    line = f"{key} = {json.dumps(value)}"
    head, section, rest = text.partition("[storage]\n")
    if not section:
        return f"{text}\n[storage]\n{line}\n"
    own, mark, others = rest.partition("\n[")
    pattern = rf"(?m)^{key}\s*=.*$"
    own = re.sub(pattern, lambda _: line, own) if re.search(pattern, own) else f"{line}\n{own}"
    return head + section + own + mark + others


def _check_target(to: Path, directory: Path) -> None:
    if not to.exists() or not any(to.iterdir()):
        return
    authority = to / SETTINGS / ca.CERTIFICATE_FILE
    if not (to / MANIFEST).exists():
        raise AlreadyExists(f"{to} is not empty, and no complete backup.", hint="Name a new directory with --to.")
    if authority.read_bytes() != (directory / ca.CERTIFICATE_FILE).read_bytes():
        raise AlreadyExists(f"{to} is the backup of another coordinator.", hint="Name a new directory with --to.")


def _copy_database(source: Database, path: Path) -> None:
    for leftover in path.parent.glob(f"{path.name}*"):
        leftover.unlink()
    # The reading ends first: a slow disk's commit is not a part of it.
    with closing(Database.open(f"sqlite:///{path}")) as target, target.write() as writing, source.read() as reading:
        source.copying(reading)
        _copy_rows(reading, writing)


def _copy_rows(reading: Connection, writing: Connection) -> None:
    for table in schema.metadata.sorted_tables:
        rows = reading.execute(select(table).execution_options(yield_per=ROWS_AT_ONCE)).mappings()
        for some in rows.partitions(ROWS_AT_ONCE):
            writing.execute(insert(table), [dict(row) for row in some])
    if writing.dialect.name == "postgresql":
        # The ids of events were given, so the sequence has not moved.
        last = writing.execute(select(func.max(schema.events.c.id))).scalar()
        writing.execute(select(func.setval(func.pg_get_serial_sequence("events", "id"), last or 1, last is not None)))


def _copy_blobs(digests: list[str], blobs: BlobStore, target: Path) -> dict[str, str]:
    """Those that cannot be had, with what is wrong with them."""
    missing = {}
    for digest in digests:
        path = target / digest[:2] / digest
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        try:
            with blobs.local(digest) as held, _arriving(path) as fresh:
                shutil.copyfile(held, fresh)
                _sync(fresh)
                if digest_of_file(fresh)[0] != digest:
                    raise CorruptData("damaged")
        except (NotFound, FileNotFoundError):
            missing[digest] = "not where the coordinator keeps its blobs"
        except CorruptData:
            missing[digest] = "damaged where the coordinator keeps it"
    return missing


def _tell_missing(connection: Connection, missing: Mapping[str, str], *, say: Say) -> None:
    """CorruptData when a job could not be used or go on without one of them."""
    vital = in_progress(connection) | _heads(connection)
    for digest, trouble in sorted(missing.items(), key=lambda item: item[0] not in vital):
        sentence = f"The blob {digest[:16]} is {trouble}: {', '.join(_names(connection, digest))}."
        if digest in vital:
            raise CorruptData(
                sentence,
                hint=f"Back up into an earlier backup that has it, or put it back: it is {digest[:2]}/{digest}. "
                "If it is an update, the coordinator itself asks for it again when it needs it.",
            )
        say(f"{sentence} The backup goes on without it.")


def _heads(connection: Connection) -> set[str]:
    """What jobs end with or go on from."""
    jobs, versions = schema.jobs, schema.versions
    heads = select(versions.c.digest, versions.c.optimizer_digest, versions.c.residual_digest).join(
        jobs, jobs.c.id == versions.c.job_id
    )
    # An encoded version is the difference from version 0.
    encoded = select(versions.c.job_id).where(versions.c.encoded_digest > "")
    wanted = or_(
        versions.c.version == jobs.c.head_version,
        versions.c.version == jobs.c.best_version,
        and_(versions.c.version == 0, versions.c.job_id.in_(encoded)),
    )
    return {digest for row in connection.execute(heads.where(wanted)) for digest in row if digest}


def _names(connection: Connection, digest: str) -> list[str]:
    """What the rows that name a blob call it."""
    versions, updates, files, uploads = schema.versions, schema.updates, schema.files, schema.uploads
    mine = or_(
        or_(versions.c.digest == digest, versions.c.encoded_digest == digest) & ~versions.c.deleted,
        versions.c.optimizer_digest == digest,
        versions.c.residual_digest == digest,
    )
    found = [f"version {row.version} of job {row.job_id}" for row in connection.execute(select(versions).where(mine))]
    for row in connection.execute(select(updates).where(updates.c.digest == digest)):
        found.append(f"the update of {row.site} in round {row.round} of job {row.job_id}")
    for row in connection.execute(select(files).where(files.c.digest == digest)):
        found.append(f"{row.name} of job {row.job_id}")
    for row in connection.execute(select(uploads).where(uploads.c.digest == digest, ~uploads.c.recorded)):
        found.append(f"an upload of {row.owner}")
    for row in connection.execute(select(schema.base_models)):
        found += [f"{name} of base model {row.name}" for name, file_digest, _ in row.files if file_digest == digest]
    return found or ["what a round in progress has made"]


def _adopt(path: Path, digest: str, blobs: BlobStore, *, directory: Path) -> None:
    fresh = directory / "being-restored"
    shutil.copyfile(path, fresh)
    if blobs.adopt(fresh)[0] != digest:
        raise CorruptData(f"{path} is damaged.", hint="Restore an earlier backup.")


def _check_empty(database: Database, blobs: BlobStore, found: Settings) -> None:
    with database.read() as connection:
        for table in schema.metadata.sorted_tables:
            if connection.execute(select(table).limit(1)).first() is not None:
                raise AlreadyExists("The database to restore into is not empty.", hint="Name another with --database.")
    if next(iter(blobs.stored()), None) is not None:
        raise AlreadyExists(f"The blob store {found.storage.blobs} is not empty.", hint="Name another with --blobs.")


@contextmanager
def _beside(found: Settings, directory: Path, scratch: Path) -> Iterator[BlobStore]:
    """The blob store, to read from while a coordinator serves from it: not its lock, and not its cache."""
    if bucket_and_prefix(found) is None:
        yield FileBlobStore(blob_directory(found, directory), reserve_bytes=0)
    else:
        with open_blobs(found, scratch) as blobs:
            yield blobs


def _copy_settings(directory: Path, found: Settings, target: Path) -> None:
    target.mkdir(exist_ok=True, mode=0o700)
    own = found.certificates
    for name in (ca.KEY_FILE, ca.CERTIFICATE_FILE, own.server_key, own.server_certificate, settings.FILE_NAME):
        if name and (directory / name).is_file() and Path(name).name == name:
            shutil.copy(directory / name, target / name)


@contextmanager
def _arriving(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path` when the block ends well."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
        os.replace(fresh, path)
        sync_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    with _arriving(path) as fresh:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT, 0o600)
        with open(handle, "w") as file:
            file.write(text)
        _sync(fresh)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
