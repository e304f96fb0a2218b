"""Rows that are the same star: which they are, and how far one must look for them.

The rule of grouping. Two rows are *linked* when they lie within ``radius_arcsec`` of each other, or
share a Gaia id of some release and lie within ``id_radius_arcsec``. Stars never reach over the
connected components of these links, and depend on nothing outside of them. Inside:

1. A row is known by its id in the newest release in which it has one. Rows known by equal ids of
   the same release that are linked, in one or more steps, are one star; rows known by different ids
   of one release never are.
2. Rows known by an older release may be the same star as rows known by a newer one. Their groups
   join over their links: first links whose star has the same id of the older release, then by
   separation, then by the ranks of the two rows. A group joins one star, and only a star that has
   no id of the older release yet, or the same one.
3. A row without any id joins the star of the nearest row with an id within the radius (ties:
   smallest rank).
4. Of the rows that remain, the one of smallest rank is a primary and claims what is within the
   radius, then the next unclaimed one, and so on. Then every claimed row goes to its nearest
   primary within the radius (ties: smallest rank). So a chain of neighbours does not merge
   different stars: all members lie within the radius of their primary.

The primary of a star with ids is its row of smallest rank among those with ids. Equal ranks are
decided by the place in the input, which is the order on the sky. All of it is exact, and
independent of the order of the rows and of how the sky is cut, as long as whole components are
given. Links are listed where they are few; of rows that crowd at a place, where all pairs would be
too many, a tree finds those that decide (`crowds`).

Folds for cross-validation keep a star together, too: every pair of one star is in one fold. A
reference star is known by a number of 64 bits that follows from its id and a seed alone. Pairs are
joined when they share a reference star, or when their targets are observations of one star; what is
joined gets the fold of its smallest number. So a fold depends on the stars alone, not on their
order, on other stars or on how the sky is cut: what was joined in each of two parts of the sky is
joined again over their edge (`smallest_of_joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sos_dask.columns import BoolArray, FloatArray, IntArray, KeyArray
from sos_dask.errors import PartitionError
from sos_dask.problem import ColumnName
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Settings
from sos_dask.sky import neighbours
from sos_dask.sky.healpix import HealpixPixel, Ranges, in_ranges
from sos_dask.sky.neighbours import Sky, starts

if TYPE_CHECKING:
    from sos_dask.stars.crowds import Places


GAIA_IDS = {"dr3": "gaia_dr3_source_id", "dr2": "gaia_dr2_source_id"}
"""Columns of ids of Gaia, by its release."""
# Links are listed up to so many a row, and these more; beyond, rows crowd.
_MOST_A_ROW = 8
_MOST = 65536
_MAX_LAYERS = 256


class Radii(Settings):
    """Separations up to which rows can be one star: by position, and by Gaia id."""

    radius_arcsec: float = Field(
        1.5, gt=0, lt=3600, description="Largest separation of rows of one star."
    )
    id_radius_arcsec: float = Field(
        10.0, gt=0, lt=3600, description="Largest separation of rows of one Gaia id."
    )
    use_gaia_id: bool = Field(
        True,
        description="Gaia ids count, not only positions.",
        json_schema_extra={"no": "Only positions count, Gaia ids do not."},
    )

    @model_validator(mode="after")
    def _ids_reach_farther(self) -> Self:
        if self.use_gaia_id and self.id_radius_arcsec < self.radius_arcsec:
            raise ValueError(
                f"id_radius_arcsec = {self.id_radius_arcsec:g} is smaller than radius_arcsec = "
                f"{self.radius_arcsec:g}: rows with the same id may lie farther apart than others; "
                "make it larger, or match by position alone (--no-gaia-id)"
            )
        return self


class DedupeSettings(Radii):
    """How repeats of one star are found and combined."""

    method: Literal["inverse-variance", "best-snr", "median"] = Field(
        "inverse-variance", description="How the observations of a star are combined."
    )
    max_spread: float = Field(
        5.0,
        gt=0,
        le=1e9,
        description="Flag stars whose repeats differ by more than this many expected errors.",
    )
    labels: tuple[ColumnName, ...] = Field(
        (), description="Further columns that are combined as rv is, with their errors *_err."
    )


class Groups(NamedTuple):
    """Which star every row belongs to, shape (n,) each."""

    primary: IntArray
    """Row number of the star's primary row."""
    touches_frontier: BoolArray
    """The row's component contains a frontier row: rows not given may belong to it."""


def group(
    ra: FloatArray,
    dec: FloatArray,
    cells29: IntArray,
    rank: IntArray,
    ids: Mapping[str, IntArray],
    frontier: BoolArray | None,
    settings: Radii,
) -> Groups:
    """Group the rows that are one star, by the rule of this module.

    Arrays are of shape (n,): positions in degrees; their order-29 cells, ascending; ``rank``, the
    preference for the primary, the smallest first, best unique; Gaia ``ids`` by release (``"dr3"``,
    ``"dr2"``), of which the last in the order of names is the newest, not positive where there is
    none; and ``frontier``, rows so near to sky that was not read that they may have links into it.
    Raises `PartitionError` where the rows are not sorted on the sky.
    """
    if np.any(cells29[1:] < cells29[:-1]):
        raise PartitionError(f"rows to be grouped are not sorted by {HEALPIX_COLUMN}")
    releases = [ids[name] for name in sorted(ids, reverse=True)] if settings.use_gaia_id else []
    sky = Sky(ra, dec, cells29, rank)
    near = _Listed.of(sky, releases, settings) or _Crowd(sky, releases, settings)
    touched = np.zeros(len(ra), dtype=np.bool_)
    if frontier is not None and frontier.any():
        root = components(len(ra), *near.every())
        touched[root[frontier]] = True
        touched = touched[root]
    primary, known = np.arange(len(ra), dtype=np.int64), np.zeros(len(ra), dtype=np.bool_)
    if releases:
        primary, known = _group_known(rank, releases, near)
    left = ~known  # rules 3 and 4
    if known.any():
        row, target = near.nearest(left, known)
        primary[row] = primary[target]
        left[row] = False
    row, target = near.claim(left)
    primary[row] = target
    return Groups(primary, touched)


def group_around(
    pixel: HealpixPixel,
    read: Callable[[Ranges], tuple[pa.Table, BoolArray]],
    rank: Callable[[pa.Table], IntArray],
    reach_arcsec: float,
    settings: Radii,
    where: str,
) -> tuple[pa.Table, BoolArray, IntArray]:
    """Group the rows of a pixel with as much of the sky around as their longest chain needs.

    ``read`` gives the rows of ranges of cells, sorted by the cells in which they are compared, and
    which of them belong to the pixel; ``rank`` the ranks of such rows, as for `group`. The reach is
    the length of the longest link, and how far a row may stand from where it is compared.
    ``where``, such as the path of a catalog, is named in errors.

    Gives the rows, which of them (n,) belong to the pixel, and their primaries (n,) as in `Groups`;
    right for the stars of which a row belongs to the pixel. Raises `PartitionError` where a chain
    of rows is too long.
    """
    layers, whole = 2, [(pixel.first, pixel.stop)]
    while layers <= _MAX_LAYERS:
        around = neighbours.surroundings(pixel, reach_arcsec, layers)
        table, own = read(sorted([*whole, *chain.from_iterable(around)]))
        cells = table[HEALPIX_COLUMN].to_numpy()
        # What is linked to a row that is compared in the last layer but one was read.
        frontier = ~own
        frontier[frontier] = ~in_ranges(cells[frontier], sorted(chain(whole, *around[:-1])))
        ids = {r: id_values(table[c]) for r, c in GAIA_IDS.items() if c in table.schema.names}
        positions = table["ra"].to_numpy(), table["dec"].to_numpy()
        groups = group(*positions, cells, rank(table), ids, frontier, settings)
        if not groups.touches_frontier[own].any():
            return table, own, groups.primary
        layers *= 2
    raise PartitionError(
        f"pixel {pixel} of {where}: repeats form a chain over "
        f"{_MAX_LAYERS * reach_arcsec:.0f} arcsec",
        f"A radius of {settings.radius_arcsec} arcsec is too large for so dense a field.",
    )


def id_values(column: pa.ChunkedArray) -> IntArray:
    """Read ids as plain integers, 0 where there is none."""
    return np.asarray(pc.fill_null(column, 0).to_numpy(), dtype=np.int64)


def rank_of(keys: pa.Array | pa.ChunkedArray) -> IntArray:
    """Number keys in their order: integers are taken themselves, of text the place when sorted."""
    ranks = keys if pa.types.is_integer(keys.type) else pc.rank(keys, tiebreaker="dense")
    return np.asarray(ranks.to_numpy(), dtype=np.int64)


def components(n: int, i: IntArray, j: IntArray) -> IntArray:
    """Find the first of all rows that are joined with each of ``n`` rows by links from i to j."""
    from sos_dask.sky import loops

    return loops.components(n, i, j)


_Links = tuple[IntArray, IntArray]  # pairs of rows, i < j


def _joined(parts: Iterable[_Links]) -> _Links:
    i, j = (np.concatenate(side) for side in zip(*parts, strict=True))
    return i, j


@dataclass(frozen=True)
class _Listed:
    """Links that are few: within the radius, and all."""

    sky: Sky
    releases: list[IntArray]
    settings: Radii
    links: _Links
    all_links: _Links

    @classmethod
    def of(cls, sky: Sky, releases: list[IntArray], settings: Radii) -> _Listed | None:
        """The links of rows, unless they are too many."""
        most = _MOST_A_ROW * len(sky.ra) + _MOST
        pairs = neighbours.pairs_within(sky.ra, sky.dec, sky.cells, settings.radius_arcsec, most)
        if pairs is None:
            return None
        links = [pairs]
        for release in releases:
            far = _far_links(sky, release, pairs, settings, most)
            if far is None:
                return None
            links.append(far)
        return cls(sky, releases, settings, pairs, _joined(links) if releases else pairs)

    def every(self) -> _Links:
        """Links with the components of all."""
        return self.all_links

    def equal(self, tier: NDArray[np.int8], name: IntArray) -> _Links:
        """Links with the components of those among rows known by equal ids of a release."""
        i, j = self.all_links
        same = (tier[i] == tier[j]) & (name[i] == name[j]) & (tier[i] < len(self.releases))
        return i[same], j[same]

    def linked(self, newer: BoolArray, older: BoolArray) -> tuple[IntArray, IntArray]:
        """Rows of two kinds that may be linked with one of the other kind."""
        hosts, guests = _between(self.all_links, newer, older)
        return np.unique(hosts), np.unique(guests)

    def nearest(self, rows: BoolArray, targets: BoolArray) -> tuple[IntArray, IntArray]:
        """Rows of one kind with one of another kind within the radius, and the nearest of these."""
        return _nearest(*_between(self.links, rows, targets), self.sky)

    def claim(self, rows: BoolArray) -> tuple[IntArray, IntArray]:
        """Claimed ones of some rows, and the nearest of those that none claims (rule 4)."""
        i, j = self.links
        if not len(i):
            return i, j
        from sos_dask.sky.loops import claim

        if not rows.all():
            some = rows[i] & rows[j]
            i, j = i[some], j[some]
        claimed = claim(i, j, self.sky.rank)
        return _nearest(*_between((i, j), claimed, ~claimed), self.sky)


@dataclass(frozen=True)
class _Crowd:
    """The same where so many rows lie within a radius that their links are not listed."""

    sky: Sky
    releases: list[IntArray]
    settings: Radii

    def every(self) -> _Links:
        radii = self.settings.radius_arcsec, self.settings.id_radius_arcsec
        return _crowd_links(self.sky, self.releases, *radii)

    def equal(self, tier: NDArray[np.int8], name: IntArray) -> _Links:
        links = []
        for number, ids in enumerate(self.releases):
            places = _places(self.sky, tier == number, ids)
            links.append(places.links(self.settings.id_radius_arcsec))
        return _joined(links)

    def linked(self, newer: BoolArray, older: BoolArray) -> tuple[IntArray, IntArray]:
        return np.flatnonzero(newer), np.flatnonzero(older)

    def nearest(self, rows: BoolArray, targets: BoolArray) -> tuple[IntArray, IntArray]:
        return self._follow(_places(self.sky, rows), np.flatnonzero(targets))

    def claim(self, rows: BoolArray) -> tuple[IntArray, IntArray]:
        places = _places(self.sky, rows)
        return self._follow(places, places.leading(self.settings.radius_arcsec))

    def _follow(self, places: Places, others: IntArray) -> tuple[IntArray, IntArray]:
        near = places.nearest(places.of(self.sky, others), self.settings.radius_arcsec)
        target = np.full(len(self.sky.ra), -1)
        np.put(target, *_nearest(*near, self.sky))
        target = target[places.row[places.place]]
        return places.rows[target >= 0], target[target >= 0]


def _places(sky: Sky, chosen: BoolArray, key: IntArray | None = None) -> Places:
    from sos_dask.stars.crowds import Places

    rows = np.flatnonzero(chosen)
    return Places.of(sky, rows, None if key is None else key[rows])


def _crowd_links(sky: Sky, ids: list[IntArray], radius: float, id_radius: float) -> _Links:
    """Links with the components of all links, where those are too many."""
    near = _places(sky, np.ones(len(sky.ra), dtype=np.bool_)).links(radius)
    return _joined([near, *(_places(sky, one > 0, one).links(id_radius) for one in ids)])


def _between(links: _Links, one: BoolArray, other: BoolArray) -> _Links:
    """Rows of links from the rows of one kind to those of another kind."""
    if not len(links[0]):
        return links
    from sos_dask.sky.loops import between

    return between(*links, one, other)


def _far_links(sky: Sky, ids: IntArray, near: _Links, settings: Radii, most: int) -> _Links | None:
    """Rows with equal ids that lie beyond the radius, but within that for ids.

    None: more pairs than ``most`` have equal ids.
    """
    rows = np.flatnonzero(ids > 0)
    encoded = pa.array(ids[rows]).dictionary_encode()
    code = np.zeros(len(ids), dtype=np.int64)
    code[rows] = encoded.indices.to_numpy()
    count = np.bincount(code[rows], minlength=len(encoded.dictionary))
    pairs = count * (count - 1) // 2
    # Where the pairs within the radius are all pairs of an id, nothing is left to find.
    same = (ids[near[0]] == ids[near[1]]) & (ids[near[0]] > 0)
    found = np.bincount(code[near[0][same]], minlength=len(count))
    if pairs[found < pairs].sum() > most:
        return None
    rows = rows[(found < pairs)[code[rows]]]
    rows = rows[np.argsort(code[rows], kind="stable")]
    # Each row with all that follow of its id.
    after = np.searchsorted(code[rows], code[rows], side="right") - np.arange(1, len(rows) + 1)
    i = np.repeat(rows, after)
    j = rows[neighbours.runs(np.arange(1, len(rows) + 1), after)]
    separation = sky.separation(i, j)
    beyond = (separation > settings.radius_arcsec) & (separation <= settings.id_radius_arcsec)
    return i[beyond], j[beyond]


def _group_known(
    rank: IntArray, releases: list[IntArray], near: _Listed | _Crowd
) -> tuple[IntArray, BoolArray]:
    """Group the rows with ids (rules 1 and 2): primary of every row, and which have an id."""
    tier = np.full(len(rank), len(releases), dtype=np.int8)
    name = np.zeros_like(rank)
    for number, ids in reversed(list(enumerate(releases))):
        has = ids > 0
        tier[has], name[has] = number, ids[has]
    star = components(len(rank), *near.equal(tier, name))
    for number in range(1, len(releases)):
        holders = np.flatnonzero((tier < number) & (releases[number] > 0))
        rows = (*near.linked(tier < number, tier == number), holders)
        _join_older(star, near.sky, releases[number], rows, near.settings)
    best, leader = rank.copy(), np.empty_like(star)
    np.minimum.at(best, star, rank)
    # Written backwards, so that of equal ranks the first row stays.
    first = np.flatnonzero(rank == best[star])[::-1]
    leader[star[first]] = first
    return leader[star], tier < len(releases)


def _join_older(
    star: IntArray,
    sky: Sky,
    ids: IntArray,
    rows: tuple[IntArray, IntArray, IntArray],
    settings: Radii,
) -> None:
    """Join groups known by an older release to stars known by a newer one (rule 2), in place.

    ``rows`` are those of stars and of groups that may be linked, and all of stars that have an id
    of the older release, too.
    """
    hosts, guests, holders = rows
    if not len(hosts) or not len(guests):
        return
    from sos_dask.stars.crowds import Places, join_in_order

    joins = np.arange(len(star), dtype=np.int64)
    # Stars that have the id of a group: the nearest row of one, of those without the id, too.
    names, code = np.unique(ids[guests], return_inverse=True)
    asked = Places.of(sky, guests, code)
    place = np.minimum(np.searchsorted(names, ids[holders]), len(names) - 1)
    same = names[place] == ids[holders]
    with_id, place = holders[same], place[same]
    found = [asked.nearest(Places.of(sky, with_id, place), settings.id_radius_arcsec)]
    of_star, name = np.divmod(np.unique(star[with_id] * len(names) + place), len(names))
    row = Places.of(sky, hosts, star[hosts]).row  # one a position
    low, high = (np.searchsorted(star[row], of_star, side=side) for side in ("left", "right"))
    for some in neighbours.blocks(high - low):
        count = (high - low)[some]
        others = Places.of(
            sky, row[neighbours.runs(low[some], count)], np.repeat(name[some], count)
        )
        found.append(asked.nearest(others, settings.radius_arcsec))
    older, newer = _joined(found)
    ranks = sky.rank[older], sky.rank[newer]
    order = np.lexsort((older, newer, *ranks, sky.separation(older, newer)))[::-1]
    joins[star[older[order]]] = star[newer[order]]  # the first is written last
    # Stars without any such id, and groups that are left.
    hosts = hosts[~np.isin(star[hosts], star[holders])]
    guests = guests[joins[star[guests]] == star[guests]]
    host_stars, host_star = np.unique(star[hosts], return_inverse=True)
    guest_stars, guest_star = np.unique(star[guests], return_inverse=True)
    _, code = np.unique(ids[guest_stars], return_inverse=True)
    sides = hosts, host_star, guests, guest_star
    host_of = join_in_order(sky, *sides, code, settings.radius_arcsec)
    joined = host_of >= 0
    joins[guest_stars[joined]] = host_stars[host_of[joined]]
    star[:] = joins[star]


def _nearest(row: IntArray, target: IntArray, sky: Sky) -> tuple[IntArray, IntArray]:
    """The nearest target of each row (ties: smallest rank, then first on the sky)."""
    choice = np.bincount(row)[row] > 1
    some, at = row[choice], target[choice]
    order = np.lexsort((at, sky.rank[at], sky.separation(some, at), some))
    some, at = some[order], at[order]
    first = starts(some)
    return np.append(row[~choice], some[first]), np.append(target[~choice], at[first])


def same_targets(
    ra: FloatArray,
    dec: FloatArray,
    cells29: IntArray,
    ids: list[IntArray],
    radius_arcsec: float,
    id_radius_arcsec: float,
) -> tuple[IntArray, IntArray]:
    """Find links between pairs whose targets may be one star.

    Positions (n,) of the targets are in degrees, their order-29 cells ascend, and the Gaia ids of
    each release are not positive where there is none. Targets within the radius are linked, and
    those that share an id within ``id_radius_arcsec``. Gives row numbers, i < j; where many targets
    crowd, enough of all links that the same are joined.
    """
    sky = Sky(ra, dec, cells29, np.zeros(len(ra), dtype=np.int64))
    if neighbours.is_crowded(cells29, radius_arcsec):
        return _crowd_links(sky, ids, radius_arcsec, id_radius_arcsec)
    links = [(np.empty(0, dtype=np.int64),) * 2]
    reach = max(radius_arcsec, id_radius_arcsec) if ids else radius_arcsec
    for i, j in neighbours.candidates(cells29, reach, cells29):
        i, j = i[i < j], j[i < j]
        separation = sky.separation(i, j)
        linked = separation <= radius_arcsec
        for release in ids:
            equal = (release[i] == release[j]) & (release[i] > 0)
            linked |= equal & (separation <= id_radius_arcsec)
        links.append((i[linked], j[linked]))
    return _joined(links)


def smallest_of_joined(
    smallest: KeyArray, number: KeyArray, links: tuple[IntArray, IntArray]
) -> KeyArray:
    """Find the smallest number of all pairs that are joined with each pair, in one or more steps.

    ``smallest`` (n,) is the smallest number of what was joined before; at first ``number``. Pairs
    with the same one are joined, and those with the same ``number`` (n,), of `key_numbers` of the
    reference stars. ``links`` are row numbers of further pairs that are joined (`same_targets`).
    """
    known, node = np.unique(smallest, return_inverse=True)  # nodes are numbered by their numbers
    order = np.argsort(number, kind="stable")
    same = np.flatnonzero(number[order[1:]] == number[order[:-1]])
    i = np.concatenate([links[0], order[same]])
    j = np.concatenate([links[1], order[same + 1]])
    return np.asarray(known[components(len(known), node[i], node[j])][node])


def fold_of(smallest: KeyArray, n_folds: int) -> NDArray[np.int8]:
    """Folds 0 to ``n_folds - 1`` of what is joined, by its smallest number."""
    return np.asarray(smallest % np.uint64(n_folds), dtype=np.int8)
