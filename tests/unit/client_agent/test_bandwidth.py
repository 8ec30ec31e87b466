"""The token bucket's arithmetic, by a clock that the test moves."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import ValidationError

from client_agent.bandwidth import SMALLEST_FRAME_BYTES, UNLIMITED, Pace, Rates, closed_at, rates_at
from client_agent.settings import LOWEST_MBIT, Network, NetworkWindow
from client_agent.transfers import STALL_SECONDS
from protos.frames import FRAME_BYTES

MBIT = 125_000  # bytes


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def pace(mbit: float) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(lambda: mbit, monotonic=clock), clock


def test_without_a_limit_nothing_waits() -> None:
    assert UNLIMITED.take(1 << 40) == 0.0
    assert UNLIMITED.frame_bytes() == FRAME_BYTES


def test_a_transfer_that_waits_as_told_keeps_to_the_rate() -> None:
    limited, clock = pace(8)
    for _ in range(100):
        clock.seconds += limited.take(MBIT)
    # 100 Mbit at 8 Mbit/s, but for the second that an idle bucket gives for nothing.
    assert clock.seconds - 1000 == pytest.approx(12.5 - 1, abs=0.2)


def test_the_networks_own_time_counts_so_that_a_limit_near_its_speed_is_reached() -> None:
    limited, clock = pace(8)
    for _ in range(100):
        clock.seconds += 0.1  # the frame itself took so long, of the 0.125 s that it may
        clock.seconds += limited.take(MBIT)
    assert clock.seconds - 1000 == pytest.approx(12.5, abs=1.2)


def test_an_idle_hour_is_not_saved_up() -> None:
    limited, clock = pace(8)
    limited.take(MBIT)
    clock.seconds += 3600
    waits = [limited.take(MBIT) for _ in range(80)]
    assert waits[0] == 0
    assert waits[-1] == pytest.approx(80 * 0.125 - 1)


def test_transfers_at_the_same_time_share_the_rate() -> None:
    limited, _ = pace(1)
    limited.take(MBIT)
    first, second = limited.take(MBIT), limited.take(MBIT)
    assert second == pytest.approx(first + 1)


def test_at_the_lowest_rate_no_frame_takes_so_long_that_either_side_gives_up() -> None:
    limited, clock = pace(LOWEST_MBIT)
    pauses = []
    for _ in range(5):
        pauses.append(limited.take(FRAME_BYTES))
        clock.seconds += pauses[-1]
    # The reader's pace holds up two frames at most: one under way, one in HTTP/2's window.
    assert 2 * max(pauses) < STALL_SECONDS
    assert limited.frame_bytes() == SMALLEST_FRAME_BYTES


def test_a_slow_upload_sends_a_second_at_once() -> None:
    assert pace(2)[0].frame_bytes() == 2 * MBIT // SMALLEST_FRAME_BYTES * SMALLEST_FRAME_BYTES
    assert pace(1000)[0].frame_bytes() == FRAME_BYTES


def test_windows_change_the_rates_and_what_they_do_not_name_stays() -> None:
    network = Network(
        upload_mbit=50,
        windows=(
            NetworkWindow(hours="Sat-Sun 00:00-24:00", upload_mbit=0),
            NetworkWindow(hours="08:00-18:00", upload_mbit=5, download_mbit=20),
        ),
    )
    friday, saturday = datetime(2024, 1, 5, 12), datetime(2024, 1, 6, 12)
    assert rates_at(network, friday) == Rates(5, 20)
    assert rates_at(network, friday.replace(hour=18)) == Rates(50, 0)
    assert rates_at(network, saturday) == Rates(0, 0)
    assert str(rates_at(network, friday)) == "sending 5 Mbit/s, receiving 20 Mbit/s"


def test_outside_the_hours_for_transfers_it_is_said_until_when() -> None:
    nights = Network(hours=("Mon-Fri 19:00-06:00", "Sat-Sun 00:00-24:00"))
    noon = datetime(2024, 1, 5, 12)
    hours = "(Mon-Fri 19:00-06:00, Sat-Sun 00:00-24:00)"
    assert closed_at(nights, noon) == f"It is outside this site's hours for transfers {hours} until Fri 19:00."
    assert closed_at(nights, noon.replace(hour=19)) == ""
    assert closed_at(Network(), noon) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"upload_mbit": 0.1},
        {"download_mbit": -1},
        {"proxy": "https://proxy:3128"},
        {"proxy": "proxy:3128"},
        {"proxy": "http://proxy"},
        {"keepalive_seconds": 1},
        {"windows": [{"hours": "all day"}]},
        {"hours": ["all day"]},
    ],
)
def test_a_network_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Network.model_validate(wrong)
