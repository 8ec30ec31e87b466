from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from client_agent.checks import Finding, all_findings
from client_agent.home import Home
from client_agent.models import Models
from tests.unit.client_agent.work_to_do import model_bytes

SITE = """
[data.answers]
path = "answers.csv"
validation = 0.5

[policy]
base_models = ["minilm"]
data_sets = ["answers"]
methods = ["full"]
"""


async def findings(home: Home) -> dict[str, Finding]:
    found = await asyncio.to_thread(lambda: list(all_findings(home)))
    return {finding.subject: finding for finding in found}


def prepare(home: Home, *, rows: str | None = None) -> Path:
    """A site in order, apart from what the test changes."""
    home.site_file.write_text(SITE)
    written = rows or "text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(40))
    (home.path / "answers.csv").write_text(written)
    directory = home.path / "minilm"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(model_bytes())
    (directory / "config.json").write_text("{}")
    Models(home.models_file).add("minilm", directory)
    return directory


async def test_a_table_of_instructions_is_counted(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(SITE + '[data.cards]\npath = "cards.csv"\ninstruction = "front"\noutput = "back"\n')
    rows = "".join(f"question {number},{'a note' * (number % 2)},answer\n" for number in range(40))
    (home.path / "cards.csv").write_text(f"front,input,back\n{rows}question,,\n")
    found = await findings(home)
    counted = [found[f"data cards, {split}"] for split in ("train", "validation")]
    assert all(finding.ok for finding in counted)
    assert sum(int(finding.sentence.split()[0]) for finding in counted) == 40
    assert "of them with an input; 1 rows without instruction or output left out" in counted[0].sentence


async def test_a_table_of_questions_is_counted_whole(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(SITE + '[data.medqa]\npath = "medqa.jsonl"\nquestion = "question"\n')
    row = '{"question": "Which?", "options": ["this", "that"], "answer": 1}\n'
    (home.path / "medqa.jsonl").write_text(row * 3)
    found = await findings(home)
    assert found["data medqa, train"].sentence == "3 questions with options"
    assert "data medqa, validation" not in found


async def test_a_site_in_order_has_no_fault(home: Home) -> None:
    prepare(home)
    found = await findings(home)
    assert [finding for finding in found.values() if not finding.ok] == []
    assert "this is st-olav (site), valid until" in found["certificate"].sentence
    assert "2 labels: " in found["data answers, train"].sentence
    assert "base models: minilm" in found["policy"].sentence


async def test_limits_and_hours_are_told(home: Home) -> None:
    prepare(home)
    plain = await findings(home)
    assert plain["bandwidth"].sentence == "now sending without limit, receiving without limit"
    assert plain["hours"].sentence == "the trainer may work now; its hours are not limited"
    every_hour = "[[network.windows]]\nhours = '00:00-24:00'\ndownload_mbit = 20\n[schedule]\nhours = ['00:00-24:00']\n"
    home.site_file.write_text(f"{SITE}\n[network]\nupload_mbit = 5\n{every_hour}")
    limited = await findings(home)
    rates = "now sending 5 Mbit/s, receiving 20 Mbit/s; other rates may hold at 00:00-24:00"
    assert limited["bandwidth"].sentence == rates
    assert limited["hours"].sentence == "the trainer may work now; its hours are 00:00-24:00"


async def test_hours_of_transfers_are_told_and_until_when_they_are_shut(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(f"{SITE}\n[network]\nhours = ['00:00-24:00']\n")
    told = (await findings(home))["bandwidth"].sentence
    assert told == "now sending without limit, receiving without limit; transfers run only at 00:00-24:00"


async def test_a_password_that_others_may_read_is_a_fault(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(f"{SITE}\n[network]\nproxy = 'http://st-olav:secret@localhost:1'\n")
    home.site_file.chmod(0o640)
    found = await findings(home)
    assert not found["site.toml"].ok
    assert "others may read it: `chmod 600 " in found["site.toml"].sentence
    home.site_file.chmod(0o600)
    assert "site.toml" not in await findings(home)


async def test_a_host_that_no_proxy_names_is_said_to_be_dialled_directly(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(home)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    said = "; dialled without the proxy: no_proxy names it"
    assert said not in (await findings(home))["network"].sentence
    home.site_file.write_text(f"{SITE}\n[network]\nproxy = 'http://localhost:1'\n")
    found = (await findings(home))["network"]
    assert found.ok and said in found.sentence


async def test_a_ca_bundle_that_is_missing_is_a_fault(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(f'{SITE}\n[network]\nca_bundle = "none.pem"\n')
    found = await findings(home)
    assert not found["network"].ok
    assert "none.pem" in found["network"].sentence


async def test_a_fault_in_the_data_names_the_row(home: Home) -> None:
    prepare(home, rows="text,label\nfever,a\ncough\n")
    found = await findings(home)
    assert not found["data answers, train"].ok
    assert "row 2" in found["data answers, train"].sentence


async def test_a_changed_base_model_is_a_fault(home: Home) -> None:
    directory = prepare(home)
    (directory / "config.json").write_text('{"hidden_size": 3}')
    found = await findings(home)
    assert "its files changed" in found["base model minilm"].sentence


async def test_a_name_in_the_policy_that_stands_for_nothing_is_a_fault(home: Home) -> None:
    prepare(home)
    home.site_file.write_text(SITE.replace('data_sets = ["answers"]', 'data_sets = ["anwsers"]'))
    found = await findings(home)
    assert found["policy"] == Finding("policy", False, "data_sets names 'anwsers', which this site does not have")


async def test_a_base_model_that_will_be_fetched_is_no_fault(home: Home) -> None:
    prepare(home)
    home.models_file.unlink()
    assert not (await findings(home))["policy"].ok
    home.site_file.write_text(SITE.replace("[policy]", "[policy]\nfetch_base_models = true"))
    found = await findings(home)
    assert found["policy"].ok
    assert "is fetched from the coordinator" in found["policy"].sentence
    assert found["base models"].ok


async def test_no_policy_is_a_fault_in_words(home: Home) -> None:
    home.site_file.write_text("")
    found = await findings(home)
    assert found["policy"] == Finding("policy", False, "no [policy] in site.toml: nothing will run here")


async def test_a_mistake_in_site_toml_is_told_and_the_rest_is_still_looked_at(home: Home) -> None:
    home.site_file.write_text("[polcy]\n")
    found = await findings(home)
    assert "polcy" in found["site.toml"].sentence
    assert found["network"].ok


async def test_an_agent_that_is_not_enrolled_is_a_fault(tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    home.create()
    found = await findings(home)
    assert "not enrolled" in found["identity"].sentence
    assert "does not exist" in found["site.toml"].sentence
