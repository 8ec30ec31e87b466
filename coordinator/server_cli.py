"""`silotune-coordinator`: sets up one coordinator and runs it. What an operator asks of a running one is `silotune`."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import asdict
from pathlib import Path

import click

from coordinator import ca, observe, settings
from coordinator.settings import Listen, Public, Settings, Storage
from coordinator.terminal import Output, with_output
from protos.errors import AlreadyExists, InvalidInput
from protos.identity import Identity, Role, at_port, check_name

DEFAULT_PORT = 9443

data_option = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=settings.default_directory,
    show_default="~/.local/share/silotune-coordinator",
    help="The data directory: settings, keys, database, blobs.",
)
profile_option = click.option(
    "--profile",
    default="default",
    show_default=True,
    help="Where the operator's certificate goes: a name below ~/.config/silotune, or a directory.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="silotune", prog_name="silotune-coordinator")
def main() -> None:
    """Sets up and runs a silotune coordinator.

    \b
    silotune-coordinator init --host fl.example.org   once: keys, settings, an operator's profile
    silotune-coordinator serve                        runs until it is stopped; safe to kill at any time
    silotune site invite st-olav                      from then on: the operator's own command

    Exit codes: 0 done, 2 wrong usage, 3 wrong settings, 5 exists already or is in use, 7 no database, 8 disk,
    9 a defect.
    """


@main.command()
@data_option
@click.option(
    "--host",
    "hosts",
    multiple=True,
    help="A name or address that agents dial; repeat it for several. The first goes into join tokens.  "
    "[default: localhost, 127.0.0.1 and this machine's name]",
)
@click.option("--listen", "bind", default="0.0.0.0", show_default=True, help="The address that the ports bind to.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="Main port.")
@click.option("--enrollment-port", type=click.IntRange(0, 65535), help="First contact of a site.  [default: next port]")
@click.option("--http-port", type=click.IntRange(0, 65535), help="Metrics and health.  [default: --port + 37]")
@profile_option
@with_output
def init(
    *,
    output: Output,
    data: Path,
    hosts: tuple[str, ...],
    bind: str,
    port: int,
    enrollment_port: int | None,
    http_port: int | None,
    profile: str,
) -> None:
    """Makes a data directory: certificate authority, settings, and a profile for the operator.

    Nothing is overwritten: a second run on the same directory is refused.
    """
    file = data / settings.FILE_NAME
    if file.exists():
        raise AlreadyExists(
            f"{data} has a coordinator already.",
            hint=f"Run it with `silotune-coordinator serve --data {data}`, or give another --data.",
        )
    target = settings.profile_directory(profile)
    if (target / "key.pem").exists():
        raise AlreadyExists(
            f"{target} has an operator's profile already.", hint="Give another name or directory with --profile."
        )
    names = hosts or _own_hosts()
    enrollment_port = (port and port + 1) if enrollment_port is None else enrollment_port
    http_port = (port and port + 37) if http_port is None else http_port
    text = settings.new_file(
        listen=Listen(
            address=f"{bind}:{port}",
            enrollment_address=f"{bind}:{enrollment_port}",
            http_address=f"127.0.0.1:{http_port}",
        ),
        public=Public(enrollment_address=_address(names[0], enrollment_port)),
        hosts=names,
    )
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = ca.create(now=ca.utc_now())
    authority.save(data)
    write_profile(target, address=_address(names[0], port), authority=authority, name="operator", valid_days=365)
    # Last, because its presence means: set up.
    file.write_text(text)
    output.answer(
        {
            "data": str(data),
            "settings": str(file),
            "profile": str(target),
            "address": _address(names[0], port),
            "enrollment_address": _address(names[0], enrollment_port),
            "http_address": f"127.0.0.1:{http_port}",
        },
        text=_next_steps(data=data, profile=profile, target=target, host=names[0]),
    )


@main.command()
@data_option
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Overrides the settings.")
@click.option(
    "--insecure-loopback",
    is_flag=True,
    help="No TLS on the main port, for benchmarks: only on 127.0.0.1, and whoever connects is believed.",
)
@with_output
def serve(*, output: Output, data: Path, log_format: str | None, insecure_loopback: bool) -> None:
    """Runs the coordinator in the foreground until SIGTERM or Ctrl-C."""
    # gRPC's own log says in C++ what the commands say in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Only here, because the other commands must not wait for gRPC and a database to load.
    from coordinator.main import serve as run

    found = settings.load(data)
    observe.configure_logs(format=log_format or found.log.format, level=found.log.level)
    asyncio.run(run(data, found, insecure_loopback=insecure_loopback))


@main.command()
@data_option
@profile_option
@click.option("--name", default="operator", show_default=True, help="Who it is; it appears in the coordinator's log.")
@with_output
def operator(*, output: Output, data: Path, profile: str, name: str) -> None:
    """Writes a profile with a fresh operator's certificate, for another person or when the old one expires."""
    found, authority = settings.load(data), ca.load(data)
    target = settings.profile_directory(profile)
    address = at_port(found.public.enrollment_address, found.listen.address.rpartition(":")[2])
    valid_days = found.certificates.operator_days
    write_profile(target, address=address, authority=authority, name=check_name(name), valid_days=valid_days)
    output.answer(
        {"profile": str(target), "address": address, "valid_days": valid_days},
        text=f"{target} holds an operator's certificate that is good for {valid_days:g} days.",
    )


@main.command()
@data_option
@click.option("--to", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the backup goes.")
@with_output
def backup(*, output: Output, data: Path, to: Path) -> None:
    """Copies everything that the coordinator must not lose, while it serves.

    One moment of the database, every blob that it names, the settings and the keys: who has the backup can be the
    coordinator. Back up to another disk. A backup into the directory of an earlier one copies what is new and replaces
    the rest at the end. Blobs that the coordinator has lost are named; where a job cannot be used or go on without one
    of them, there is no backup.

    
    silotune-coordinator backup --to /backup/silotune
    silotune-coordinator restore --from /backup/silotune --data /srv/silotune
    """
    from coordinator.backup import backup as make

    manifest = make(data, settings.load(data), to=to, say=output.note)
    output.answer(
        {"backup": str(to), **asdict(manifest)},
        text=f"{to} holds the coordinator's database and {manifest.blobs} blobs, {manifest.blob_bytes / 1e6:.0f} MB."
        + (f" {len(manifest.missing)} blobs were lost before." if manifest.missing else ""),
    )


@main.command()
@click.option("--from", "source", required=True, type=click.Path(file_okay=False, path_type=Path), help="The backup.")
@data_option
@click.option("--database", default=Storage().database, show_default=True, help="As in coordinator.toml; empty so far.")
@click.option("--blobs", default=Storage().blobs, show_default=True, help="As in coordinator.toml; empty so far.")
@click.option("--s3-endpoint-url", help="With --blobs s3://bucket/prefix, as in coordinator.toml.")
@with_output
def restore(
    *, output: Output, source: Path, data: Path, database: str, blobs: str, s3_endpoint_url: str | None
) -> None:
    """Makes a new data directory of a backup, in any database and blob store.

    Nothing is overwritten: the data directory, the database and the blob store must be empty. Agents find the restored
    coordinator at the old addresses and go on; what was committed after the backup is done once more. This is also how
    a coordinator moves from SQLite to PostgreSQL, or from files to S3: stop it, back it up, restore it there.

    
    silotune-coordinator restore --from /backup/silotune --data /srv/silotune
    silotune-coordinator restore --from /backup/silotune --data /srv/silotune \
        --database postgresql://silotune@db.example.org/silotune --blobs s3://silotune/hospital
    """
    from coordinator.backup import restore as put_back

    storage = {"database": database, "blobs": blobs}
    if s3_endpoint_url is not None:
        storage["s3_endpoint_url"] = s3_endpoint_url
    manifest = put_back(source, data=data, storage=storage, say=output.note)
    output.answer(
        {"data": str(data), **asdict(manifest)},
        text=f"{data} is restored. Next: silotune-coordinator serve --data {data}",
    )


@main.group()
def config() -> None:
    """The settings in coordinator.toml."""


@config.command()
@data_option
@with_output
def show(*, output: Output, data: Path) -> None:
    """Prints the settings that hold, defaults included."""
    found = settings.load(data)
    output.answer(found.model_dump(mode="json"), text=_as_text(found))


def write_profile(
    directory: Path, *, address: str, authority: ca.CertificateAuthority, name: str, valid_days: float
) -> None:
    """profile.toml, ca.pem, certificate.pem and key.pem of an operator; replaces what is there."""
    key = ca.new_key()
    identity = Identity(Role.OPERATOR, name)
    certificate = authority.issue_client(key.public_key(), identity=identity, valid_days=valid_days, now=ca.utc_now())
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca.write_private(directory / "key.pem", ca.key_pem(key))
    (directory / "certificate.pem").write_bytes(certificate.pem)
    (directory / "ca.pem").write_bytes(authority.pem)
    (directory / "profile.toml").write_text(f'# The coordinator that this certificate is for.\naddress = "{address}"\n')


def _own_hosts() -> tuple[str, ...]:
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", socket.gethostname())))


def _address(host: str, port: int) -> str:
    if any(character.isspace() or character in '"/\\' for character in host) or not host:
        raise InvalidInput(f"{host!r} is not a host name or address.")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _next_steps(*, data: Path, profile: str, target: Path, host: str) -> str:
    named = "" if data == settings.default_directory() else f" --data {data}"
    as_operator = "" if profile == "default" else f" --profile {profile}"
    return f"""\
The coordinator's data directory is {data}
The operator's certificate is in    {target}

Next:
  silotune-coordinator serve{named}
  silotune site invite st-olav{as_operator}      # prints the token for the site's administrator
  silotune job submit recipe.toml{as_operator}

Agents dial {host}. Keep {data / ca.KEY_FILE} secret: who has it can be anybody."""


def _as_text(found: Settings) -> str:
    lines = []
    for section, value in found.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml(inner)}" for key, inner in value.items()] + [""]
        else:
            lines.insert(0, f"{section} = {_toml(value)}\n")
    return "\n".join(lines).rstrip()


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
