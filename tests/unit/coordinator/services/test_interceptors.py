"""Who may call what: every method of every descriptor, so that a new one cannot be forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from aiohttp import ClientSession
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from coordinator import ca
from coordinator.main import SERVICES
from coordinator.services.interceptors import ACCESS, INSECURE_IDENTITY_KEY
from protos import errors
from protos.identity import Identity, Role
from protos.v1 import agent_pb2, operator_pb2
from tests.unit.coordinator.services.conftest import PATIENCE_SECONDS, tensor_file

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
METHODS = [method for service in (*SERVICES, HEALTH) for method in service.methods]
PATHS = [f"/{method.containing_service.full_name}/{method.name}" for method in METHODS]
ST_OLAV = Identity(Role.SITE, "st-olav")


async def status_of(peer: Any, method: Any) -> str:
    """The gRPC code of a call with an empty request, or of a stream's first answer."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        call = peer.channel.stream_unary(path)(iter([b""]), timeout=10)
    elif method.server_streaming:
        call = peer.channel.unary_stream(path)(b"", timeout=10)
    else:
        call = peer.channel.unary_unary(path)(b"", timeout=10)
    try:
        await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    code = "OK" if not method.server_streaming or not call.done() else (await call.code()).name
    call.cancel()
    return code


# gRPC's asyncio servicer does not implement it; without an entry it is refused to everybody.
UNUSED = "/grpc.health.v1.Health/List"


def test_every_method_has_an_entry_and_every_entry_a_method():
    assert set(PATHS) - {UNUSED} == {path for path in ACCESS if "reflection" not in path}


async def test_without_a_certificate_of_this_ca_no_method_answers(federation: Any):
    federation.enroll("st-olav")
    other = ca.create(now=ca.utc_now())
    strangers = [
        federation.peer(None),
        federation.peer(ST_OLAV, authority=other),
        federation.peer(Identity(Role.OPERATOR, "operator"), authority=other),
        federation.peer(ST_OLAV, valid_seconds=-60, issued_seconds_ago=3600),
    ]
    for stranger in strangers:
        codes = await asyncio.gather(*(status_of(stranger, method) for method in METHODS))
        assert set(codes) == {"UNAVAILABLE"}


async def test_a_role_reaches_its_own_methods_and_no_others(federation: Any):
    roles = {
        Role.SITE: federation.site("st-olav"),
        Role.HOUSE: federation.site("house", role=Role.HOUSE),
        Role.OPERATOR: federation.operator(),
    }
    for role, peer in roles.items():
        codes = await asyncio.gather(*(status_of(peer, method) for method in METHODS))
        for path, code in zip(PATHS, codes, strict=True):
            allowed = role in ACCESS.get(path, ())
            assert (code not in ("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL")) == allowed, (role, path, code)


@pytest.mark.parametrize("role", [Role.SITE, Role.HOUSE])
async def test_who_was_never_enrolled_or_has_another_role_reaches_nothing(federation: Any, role: Role):
    federation.enroll("st-olav", role=Role.SITE)
    federation.invite("invited", role=role)
    unknown = [federation.peer(Identity(role, "unknown")), federation.peer(Identity(role, "invited"))]
    if role is Role.HOUSE:
        unknown.append(federation.peer(Identity(Role.HOUSE, "st-olav")))
    unknown.append(federation.peer(Identity(Role.COORDINATOR, "coordinator")))
    for peer in unknown:
        codes = await asyncio.gather(*(status_of(peer, method) for method in METHODS))
        assert set(codes) == {"UNAUTHENTICATED"}


async def test_a_revoked_site_is_out_at_every_method_over_its_open_connection(federation: Any):
    site = federation.site("st-olav")
    assert (await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest())).sentence
    await federation.operator().operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    await asyncio.sleep(1.1)
    codes = await asyncio.gather(*(status_of(site, method) for method in METHODS))
    assert set(codes) == {"UNAUTHENTICATED"}


async def test_a_site_that_was_revoked_and_enrolls_again_is_let_in_at_once(federation: Any):
    site = federation.site("st-olav")
    await federation.operator().operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    with pytest.raises(errors.Unauthenticated, match="revoked"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest())
    again = federation.site("st-olav")
    assert (await again.agent("LeaseTask", agent_pb2.LeaseTaskRequest())).sentence


async def test_a_long_poll_ends_when_its_site_is_revoked(federation: Any):
    site = federation.site("st-olav")
    poll = asyncio.create_task(site.agent("LeaseTask", agent_pb2.LeaseTaskRequest(wait_seconds=20)))
    await asyncio.sleep(0.2)
    await federation.operator().operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    with pytest.raises(errors.Unauthenticated, match="revoked"):
        await poll


async def test_heartbeats_that_cross_a_revocation_do_not_revive_the_site(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=tensor_file(fill=0.5))
    beat = agent_pb2.HeartbeatRequest(task_id=task.id, generation=task.generation)

    async def beats() -> None:
        while True:
            await site.agent("Heartbeat", beat)

    going = [asyncio.create_task(beats()) for _ in range(3)]
    operator = federation.operator()
    await operator.operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    for one in going:
        with pytest.raises(errors.Unauthenticated, match="revoked"):
            await asyncio.wait_for(one, PATIENCE_SECONDS)
    assert [one.state for one in federation.store.sites.all()] == ["REVOKED"]
    job = operator_pb2.GetJobRequest(job=task.job_id)
    while (shown := await operator.operator("GetJob", job)).tasks[0].state != operator_pb2.TASK_STATE_EXPIRED:
        await asyncio.sleep(0.1)
    assert shown.tasks[0].reason == "the site's enrollment was revoked"


async def test_a_certificate_that_expires_on_an_open_connection_stops_working(federation: Any):
    federation.enroll("st-olav")
    valid_seconds = 3
    while True:
        site = federation.peer(Identity(Role.SITE, "st-olav"), valid_seconds=valid_seconds)
        try:
            assert (await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest())).sentence
            break
        except errors.SilotuneError:
            # On a slow machine the first call came too late.
            valid_seconds *= 3
            assert valid_seconds < PATIENCE_SECONDS
    await asyncio.sleep(valid_seconds + 0.1)
    with pytest.raises(errors.Unauthenticated, match="expired"):
        await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest())


async def test_an_undecodable_request_is_the_callers_fault(federation: Any):
    site = federation.site("st-olav")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.channel.unary_unary("/silotune.v1.AgentService/LeaseTask")(b"\xff\xff\xff", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_defect_of_ours_is_internal_and_its_trace_is_only_in_the_log(federation: Any):
    with federation.store.database.write() as connection:
        connection.exec_driver_sql("DROP TABLE sites")
    with capture_logs() as logs, pytest.raises(errors.Internal) as caught:
        await federation.operator().operator("ListSites", operator_pb2.ListSitesRequest())
    assert "sites" not in caught.value.message
    identifier = caught.value.message.split("id ")[1].rstrip(").")
    assert [entry["method"] for entry in logs if entry.get("correlation_id") == identifier] == [
        "/silotune.v1.OperatorService/ListSites"
    ]


async def test_calls_are_counted_by_method_and_code(federation: Any):
    site = federation.site("st-olav")
    await site.agent("LeaseTask", agent_pb2.LeaseTaskRequest())
    with pytest.raises(errors.Forbidden):
        await site.operator("ListJobs", operator_pb2.ListJobsRequest())
    async with ClientSession() as session, session.get(f"http://{federation.addresses.http}/metrics") as response:
        text = await response.text()
    assert 'silotune_rpc_seconds_count{code="OK",method="AgentService/LeaseTask"} 1.0' in text
    assert 'silotune_rpc_seconds_count{code="PERMISSION_DENIED",method="OperatorService/ListJobs"} 1.0' in text


async def test_reflection_is_off_unless_asked_for_and_then_for_the_operator_only(start: Any):
    async def listed(peer: Any) -> str:
        call = reflection_pb2_grpc.ServerReflectionStub(peer.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
        try:
            return " ".join(service.name for service in (await call.read()).list_services_response.service)
        except grpc.aio.AioRpcError as error:
            return error.code().name

    federation = await start()
    assert await listed(federation.operator()) == "UNIMPLEMENTED"
    await federation.shut_down()
    federation = await start(reflection=True)
    assert "silotune.v1.OperatorService" in await listed(federation.operator())
    assert await listed(federation.site("st-olav")) == "PERMISSION_DENIED"


async def test_health_is_told_by_service(federation: Any):
    check = health_pb2_grpc.HealthStub(federation.site("st-olav").channel).Check
    for name in ("", *(service.full_name for service in SERVICES)):
        answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_without_tls_the_identity_comes_from_metadata_and_must_still_be_enrolled(start: Any):
    federation = await start(insecure=True)
    federation.enroll("st-olav")
    async with grpc.aio.insecure_channel(federation.addresses.main) as channel:
        lease = channel.unary_unary("/silotune.v1.AgentService/LeaseTask")
        for uri, code in ((ST_OLAV.uri, "OK"), ("spiffe://silotune/site/other", "UNAUTHENTICATED")):
            call = lease(b"", timeout=10, metadata=((INSECURE_IDENTITY_KEY, uri),))
            assert (await call.code()).name == code
        assert (await lease(b"", timeout=10).code()).name == "UNAUTHENTICATED"
