"""How the rows of one table are shared out among the sites of an experiment: each row to exactly one site.

Every choice follows from the seed, the site's number and the row's number, so that the same table gives the same sites
anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from protos.errors import InvalidInput
from protos.recipe_part import Part

Row = Mapping[str, Any]
# A site below this could not fill one batch; a draw that gives it less is drawn again.
FEWEST_ROWS = 8
DRAWS = 1000


class Partition(Part):
    """`kind` says what differs between sites.

    uniform     nothing: rows are dealt out in random order
    dirichlet   the shares of the values of column `by` (Hsu, Qi and Brown 2019, arXiv:1909.06335): the smaller `alpha`,
                the fewer values a site has
    quantity    the number of rows: shares drawn from a Dirichlet distribution
    shards      the values of column `by` that a site has: rows sorted by it are cut into `shards` pieces a site, which
                are dealt out (McMahan et al. 2017, arXiv:1602.05629)
    groups      natural groups: a site for each value of column `by`, or as many of the largest as there are sites
    """

    kind: Literal["uniform", "dirichlet", "quantity", "shards", "groups"] = "uniform"
    by: str = ""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    shards: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _column(self) -> Partition:
        if self.kind in ("dirichlet", "groups", "shards") and not self.by:
            raise ValueError(f"kind = {self.kind!r} needs `by`, the column that it goes by")
        return self


def split(rows: Sequence[Row], *, partition: Partition, sites: int, seed: int) -> dict[str, list[Row]]:
    """The rows of each site, in random order, by the site's name. InvalidInput when a site would have too few."""
    if len(rows) < sites * FEWEST_ROWS:
        raise InvalidInput(f"{len(rows)} rows are too few for {sites} sites.", hint=f"At least {FEWEST_ROWS} each.")
    draw = np.random.default_rng(seed)
    if partition.kind == "groups":
        groups = _groups(rows, by=partition.by)
        if len(groups) < sites:
            raise InvalidInput(f"There are {len(groups)} values of {partition.by!r}, and {sites} sites.")
        largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:sites]
        shares = {str(name): groups[name] for name in sorted(largest)}
    else:
        numbers = _drawn(rows, partition=partition, sites=sites, draw=draw)
        shares = {f"site-{number + 1:02}": numbers[number] for number in range(sites)}
    return {name: [rows[row] for row in draw.permutation(share)] for name, share in shares.items()}


def _drawn(rows: Sequence[Row], *, partition: Partition, sites: int, draw: np.random.Generator) -> list[list[int]]:
    """The numbers of the rows of each site."""
    if partition.kind == "shards":
        return _sharded(rows, partition=partition, sites=sites, draw=draw)
    pools = _groups(rows, by=partition.by) if partition.kind == "dirichlet" else {"": list(range(len(rows)))}
    for _ in range(DRAWS):
        numbers: list[list[int]] = [[] for _ in range(sites)]
        for name in sorted(pools):
            pool = draw.permutation(pools[name])
            even = partition.kind == "uniform"
            shares = np.full(sites, 1 / sites) if even else draw.dirichlet([partition.alpha] * sites)
            cuts = np.round(np.cumsum(shares)[:-1] * len(pool)).astype(int)
            for site, part in zip(numbers, np.split(pool, cuts), strict=True):
                site.extend(int(row) for row in part)
        if min(map(len, numbers)) >= FEWEST_ROWS:
            return numbers
    raise InvalidInput(
        f"No draw of {DRAWS} gave each of {sites} sites {FEWEST_ROWS} rows.", hint="Take a larger alpha or fewer sites."
    )


def _sharded(rows: Sequence[Row], *, partition: Partition, sites: int, draw: np.random.Generator) -> list[list[int]]:
    pools = _groups(rows, by=partition.by)
    by_value = [int(row) for name in sorted(pools) for row in draw.permutation(pools[name])]
    pieces = np.array_split(by_value, sites * partition.shards)
    dealt = draw.permutation(len(pieces)).reshape(sites, partition.shards)
    numbers = [[int(row) for piece in own for row in pieces[piece]] for own in dealt]
    if min(map(len, numbers)) < FEWEST_ROWS:
        raise InvalidInput(
            f"{len(rows)} rows are too few for {len(pieces)} shards.", hint="Take fewer shards or sites."
        )
    return numbers


def _groups(rows: Sequence[Row], *, by: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if by not in row:
            raise InvalidInput(f"The table has no column {by!r} to divide it by.")
        groups[str(row[by])].append(number)
    return dict(groups)
