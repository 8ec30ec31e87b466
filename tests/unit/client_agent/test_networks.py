"""Hospital networks: an HTTP proxy, another CA, TLS inspection, a NAT that forgets; real servers on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from client_agent import identity, settings
from client_agent.checks import Finding, all_findings
from client_agent.home import Home
from client_agent.main import compose
from client_agent.observe import StatusFile
from client_agent.session import Session, Waiting
from client_agent.settings import Network
from protos.errors import Unauthenticated, Unavailable
from protos.v1 import agent_pb2
from tests.servers.proxy import ConnectProxy, ForgetfulNat, inspecting_tls
from tests.unit.client_agent.coordinator_in_memory import UNRESOLVABLE, Authority, Coordinator, changed_token
from tests.unit.client_agent.test_loop import finish_of, running, stages_seen
from tests.unit.client_agent.work_to_do import model_bytes, task

MAIN, ENROLLMENT = f"{UNRESOLVABLE}:9443", f"{UNRESOLVABLE}:9444"
SITE = '[policy]\ntasks = ["*"]\n[http]\naddress = "127.0.0.1:0"\n'


@pytest.fixture
async def proxy(coordinator: Coordinator) -> AsyncIterator[ConnectProxy]:
    """The only way to the coordinator's names, which no DNS has."""
    async with ConnectProxy().serving() as running:
        running.names = {MAIN: coordinator.address, ENROLLMENT: coordinator.enrollment_address}
        yield running


@pytest.fixture
def outside(tmp_path: Path) -> Home:
    """The home of an agent that is not enrolled yet."""
    home = Home(tmp_path / "outside")
    home.create()
    home.site_file.write_text(SITE)
    return home


async def enroll(home: Home, coordinator: Coordinator, *, at: str = ENROLLMENT, **network: str) -> None:
    token = coordinator.authority.token("st-olav", address=at)
    lines = "".join(f'{name} = "{value}"\n' for name, value in network.items())
    home.site_file.write_text(f"{SITE}[network]\n{lines}")
    await asyncio.to_thread(
        identity.enroll, home.identity, token=token, coordinator=MAIN, network=Network.model_validate(network)
    )


async def lease(session: Session) -> agent_pb2.LeaseTaskResponse:
    return await session.lease(agent_pb2.AgentInfo(), holding=[], wait_seconds=0)


async def finding(home: Home, subject: str = "network") -> Finding:
    found = await asyncio.to_thread(lambda: list(all_findings(home)))
    return next(one for one in found if one.subject == subject)


async def waited_for(session: Session, waiting: Waiting, coordinator: Coordinator) -> str:
    """What the agent says while it tries for ever."""
    trying = asyncio.create_task(session.patiently(lambda: lease(session)))
    await coordinator.until(lambda: waiting.sentence)
    trying.cancel()
    await session.close()
    return waiting.sentence


# --- an HTTP proxy


async def test_enrollment_calls_and_check_go_through_the_proxy(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    await enroll(outside, coordinator, proxy=proxy.url)
    assert proxy.asked == [ENROLLMENT]
    session = Session(outside, waiting=Waiting(), network=Network(proxy=proxy.url))
    assert (await lease(session)).sentence == "No job needs this site now."
    assert proxy.asked == [ENROLLMENT, MAIN]
    await session.close()
    found = await finding(outside)
    assert found.ok
    assert f"{MAIN} is reachable through the proxy {proxy.address} (TLSv1.3" in found.sentence
    assert proxy.tunnels == 3


async def test_a_proxy_may_want_a_login_which_is_told_to_nobody_else(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    proxy.login = "st-olav:secret"
    await enroll(outside, coordinator, proxy=proxy.url)
    session = Session(outside, waiting=Waiting(), network=Network(proxy=proxy.url))
    await lease(session)
    await session.close()
    found = await finding(outside)
    assert found.ok
    assert "secret" not in found.sentence
    assert proxy.tunnels == 3


async def test_a_proxy_that_refuses_is_named_with_its_answer(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    await enroll(outside, coordinator, proxy=proxy.url)
    proxy.refusal = "403 Forbidden"
    refuses = f"the proxy {proxy.address} refuses the way to {MAIN}: it answered '403 Forbidden'"
    assert refuses in (await finding(outside)).sentence
    waiting = Waiting()
    session = Session(outside, waiting=waiting, network=Network(proxy=proxy.url))
    assert refuses in await waited_for(session, waiting, coordinator)


@pytest.mark.parametrize(
    ("login", "url", "sentence"),
    [
        ("st-olav:secret", "http://127.0.0.1:{port}", "wants a login; write it into `proxy`"),
        ("st-olav:secret", "http://guess:wrong@127.0.0.1:{port}", "does not take the login in `proxy`"),
        ("", "http://127.0.0.1:1", "the proxy 127.0.0.1:1 cannot be used: nothing listens at 127.0.0.1:1"),
        ("", "http://proxy.invalid:3128", "the host name proxy.invalid is not known here"),
    ],
)
async def test_each_way_to_fail_at_the_proxy_has_words_of_its_own(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy, login: str, url: str, sentence: str
) -> None:
    proxy.login = login
    with pytest.raises(Unavailable) as error:
        await enroll(outside, coordinator, proxy=url.format(port=proxy.port))
    assert sentence in error.value.message
    assert "guess" not in error.value.message
    assert not coordinator.enrolled_keys


async def test_a_name_that_the_proxy_does_not_know_and_a_proxy_that_is_none_are_told(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    with pytest.raises(Unavailable, match=r"cannot reach elsewhere.invalid:9444: it answered '502 Bad Gateway'"):
        await enroll(outside, coordinator, at="elsewhere.invalid:9444", proxy=proxy.url)
    with pytest.raises(Unavailable, match="is not an HTTP proxy"):
        await enroll(outside, coordinator, proxy=f"http://{coordinator.enrollment_address}")


# --- another CA, and TLS inspection


@pytest.fixture
async def behind_ingress() -> AsyncIterator[Coordinator]:
    """A coordinator whose own certificate is of the hospital's CA."""
    coordinator = Coordinator()
    coordinator.server_authority = Authority("Hospital Root CA")
    async with coordinator.serving():
        yield coordinator


async def test_a_certificate_of_another_ca_is_believed_by_the_bundle_alone(
    outside: Home, behind_ingress: Coordinator
) -> None:
    here = behind_ingress.enrollment_address
    with pytest.raises(Unavailable) as error:
        await enroll(outside, behind_ingress, at=here)
    assert "was issued by 'Hospital Root CA', not by this federation" in error.value.message
    assert "name a file with that CA as `ca_bundle`" in error.value.message
    (outside.path / "hospital.pem").write_bytes(behind_ingress.server_authority.pem)
    await enroll(outside, behind_ingress, at=here, ca_bundle="hospital.pem")
    facts = (outside.identity / identity.FACTS).read_text()
    (outside.identity / identity.FACTS).write_text(facts.replace(MAIN, behind_ingress.address))
    session = Session(outside, waiting=Waiting(), network=Network(ca_bundle="hospital.pem"))
    assert (await lease(session)).sentence
    await session.close()
    found = await finding(outside)
    assert found.ok
    assert "certificate of 'Hospital Root CA', as ca_bundle allows" in found.sentence


async def test_tls_inspection_behind_the_proxy_is_named_by_enroll_check_and_run(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    inspector = Authority("Zscaler Root CA")
    proxy.inspecting = inspector.server_context()
    named = "was issued by 'Zscaler Root CA', not by this federation; a proxy that inspects TLS behind the proxy"
    with pytest.raises(Unavailable, match=named):
        await enroll(outside, coordinator, proxy=proxy.url)
    proxy.inspecting = None
    await enroll(outside, coordinator, proxy=proxy.url)
    proxy.inspecting = inspector.server_context()
    assert named in (await finding(outside)).sentence
    waiting = Waiting()
    session = Session(outside, waiting=waiting, network=Network(proxy=proxy.url))
    assert named in await waited_for(session, waiting, coordinator)


async def test_tls_inspection_without_a_proxy_is_named_by_enroll_check_and_run(
    home: Home, coordinator: Coordinator, tmp_path: Path
) -> None:
    context = Authority("Zscaler Root CA").server_context()
    named = "was issued by 'Zscaler Root CA', not by this federation; a proxy that inspects TLS does this"
    async with inspecting_tls(context, before=coordinator.address) as address:
        token = changed_token(coordinator.authority.token("st-olav", address=address))
        with pytest.raises(Unavailable, match=named):
            await asyncio.to_thread(identity.enroll, tmp_path / "new", token=token, coordinator=address)
        facts = home.identity / identity.FACTS
        facts.write_text(facts.read_text().replace(coordinator.address, address))
        assert named in (await finding(home)).sentence
        waiting = Waiting()
        assert named in await waited_for(Session(home, waiting=waiting), waiting, coordinator)


async def test_an_inspector_whose_ca_was_put_into_the_bundle_is_still_named(
    home: Home, coordinator: Coordinator
) -> None:
    """It cannot show the agent's certificate to the coordinator, so trusting it does not help."""
    inspector = Authority("Zscaler Root CA")
    (home.path / "hospital.pem").write_bytes(inspector.pem)
    home.site_file.write_text(f'{SITE}[network]\nca_bundle = "hospital.pem"\n')
    async with inspecting_tls(inspector.server_context(), before=coordinator.address) as address:
        facts = home.identity / identity.FACTS
        facts.write_text(facts.read_text().replace(coordinator.address, address))
        found = await finding(home)
        assert not found.ok
        assert (
            "does not take this agent's certificate; the one it shows was issued by 'Zscaler Root CA'" in found.sentence
        )


# --- a NAT that forgets


async def test_an_idle_line_that_a_nat_forgot_is_noticed_and_replaced(home: Home, coordinator: Coordinator) -> None:
    async with ForgetfulNat(coordinator.address).serving() as nat:
        facts = home.identity / identity.FACTS
        facts.write_text(facts.read_text().replace(coordinator.address, nat.address))
        session = Session(home, waiting=Waiting(), network=Network(keepalive_seconds=5))
        await lease(session)
        nat.forget()
        # No call is on the line: keepalive alone finds out, and the agent's side gives the flow up. 5 s and the 10 s of
        # the answer, with as much again and more for a slow machine; gRPC by itself would take a minute for the answer.
        await coordinator.until(lambda: nat.given_up, seconds=5 + 10 + 40)
        assert nat.flows == 1
        assert (await session.patiently(lambda: lease(session))).sentence == "No job needs this site now."
        assert nat.flows == 2
        await session.close()


# --- hours for transfers


async def test_outside_its_hours_a_site_says_so_and_transfers_nothing_until_they_begin(
    home: Home, coordinator: Coordinator
) -> None:
    sentence = "It is outside this site's hours for transfers (19:00-06:00) until Fri 19:00."
    agent = compose(home, settings.load(home.site_file), gpu="", rows={})
    for pace in (agent.session.sending, agent.session.receiving):
        pace.closed = lambda: sentence
    coordinator.add_task(task(), model=model_bytes())
    async with running(home, agent):
        await coordinator.until(lambda: agent_pb2.STAGE_PAUSED in stages_seen(coordinator))
        await coordinator.until(lambda: StatusFile(home.status_file).read()["waits_for"].startswith(sentence))
        assert not coordinator.reads
        sentence = ""
        assert (await finish_of(coordinator)).HasField("succeeded")


async def test_an_unknown_token_is_no_reason_to_try_elsewhere(
    outside: Home, coordinator: Coordinator, proxy: ConnectProxy
) -> None:
    token = coordinator.authority.token("st-olav", address=f"{ENROLLMENT},{ENROLLMENT}")
    network = Network(proxy=proxy.url)
    with pytest.raises(Unauthenticated):
        await asyncio.to_thread(
            identity.enroll,
            outside.identity,
            token=changed_token(token, secret="guess"),
            coordinator=MAIN,
            network=network,
        )
    assert proxy.asked == [ENROLLMENT]
