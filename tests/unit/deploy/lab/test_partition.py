from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from deploy.lab.partition import FEWEST_ROWS, Partition, split
from protos.errors import InvalidInput

ROWS: list[dict[str, Any]] = [
    {"id": number, "kind": "abcde"[number % 5], "client": ("small", "large", "large")[number % 3]}
    for number in range(900)
]
KINDS = {
    "uniform": Partition(),
    "quantity": Partition(kind="quantity", alpha=0.5),
    "dirichlet": Partition(kind="dirichlet", by="kind", alpha=0.3),
}


def ids(shares: dict[str, Any]) -> dict[str, list[int]]:
    return {name: [row["id"] for row in rows] for name, rows in shares.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_goes_to_exactly_one_site(kind: str) -> None:
    shares = ids(split(ROWS, partition=KINDS[kind], sites=7, seed=1))
    assert list(shares) == [f"site-{number:02}" for number in range(1, 8)]
    assert sorted(row for rows in shares.values() for row in rows) == list(range(900))
    assert min(map(len, shares.values())) >= FEWEST_ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_sites_and_another_one_gives_others(kind: str) -> None:
    first, again, other = (ids(split(ROWS, partition=KINDS[kind], sites=7, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_uniform_sites_are_alike_in_size_and_in_kinds() -> None:
    shares = split(ROWS, partition=Partition(), sites=6, seed=3)
    assert {len(rows) for rows in shares.values()} == {150}
    assert all(min(Counter(row["kind"] for row in rows).values()) >= 10 for rows in shares.values())


def test_the_smaller_alpha_the_fewer_kinds_has_a_site() -> None:
    def largest_share(alpha: float) -> float:
        partition = Partition(kind="dirichlet", by="kind", alpha=alpha)
        shares = split(ROWS, partition=partition, sites=5, seed=4).values()
        return sum(Counter(row["kind"] for row in rows).most_common(1)[0][1] / len(rows) for rows in shares) / 5

    assert largest_share(0.1) > largest_share(1) > largest_share(100)


def test_quantity_changes_sizes_and_not_kinds() -> None:
    shares = split(ROWS, partition=Partition(kind="quantity", alpha=0.5), sites=5, seed=5)
    sizes = sorted(map(len, shares.values()))
    assert sizes[-1] > 2 * sizes[0]
    largest = max(shares.values(), key=len)
    assert max(Counter(row["kind"] for row in largest).values()) < 0.4 * len(largest)


def test_natural_groups_keep_their_names_and_the_largest_are_taken() -> None:
    shares = split(ROWS, partition=Partition(kind="groups", by="client"), sites=1, seed=0)
    assert list(shares) == ["large"] and len(shares["large"]) == 600
    both = split(ROWS, partition=Partition(kind="groups", by="client"), sites=2, seed=0)
    assert all({row["client"] for row in rows} == {name} for name, rows in both.items())


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too few"):
        split(ROWS[:20], partition=Partition(), sites=5, seed=0)
    with pytest.raises(InvalidInput, match="no column 'nothing'"):
        split(ROWS, partition=Partition(kind="dirichlet", by="nothing"), sites=5, seed=0)
    with pytest.raises(InvalidInput, match="2 values of 'client', and 3 sites"):
        split(ROWS, partition=Partition(kind="groups", by="client"), sites=3, seed=0)
