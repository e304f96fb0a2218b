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

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.errors import PartitionError
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Settings
from sos_dask.sky import neighbours
from sos_dask.sky.healpix import HealpixPixel, Ranges, in_ranges
from sos_dask.sky.neighbours import Sky

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


class Groups(NamedTuple):
    """Which star every row belongs to.

    Parameters
    ----------
    primary : ndarray of int64, shape (n,)
        Row number of the star's primary row.
    touches_frontier : ndarray of bool, shape (n,)
        The row's component contains a frontier row: rows not given may belong to it.
    """

    primary: IntArray
    touches_frontier: BoolArray


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

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells of the positions, ascending.
    rank : ndarray of int64, shape (n,)
        Preference for the primary, the smallest first; best unique.
    ids : mapping of str to ndarray of int64, shape (n,)
        Gaia ids by release (``"dr3"``, ``"dr2"``); the last in the order of names is the newest.
        Not positive where there is none.
    frontier : ndarray of bool, shape (n,), optional
        Rows so near to sky that was not read that they may have links into it.
    settings : Radii

    Returns
    -------
    Groups

    Raises
    ------
    PartitionError
        The rows are not sorted on the sky.
    """
    if np.any(cells29[1:] < cells29[:-1]):
        raise PartitionError(f"rows to be grouped are not sorted by {HEALPIX_COLUMN}")
    releases = [ids[name] for name in sorted(ids, reverse=True)] if settings.use_gaia_id else []
    sky = Sky(ra, dec, cells29, rank)
    near = _Listed.of(sky, releases, settings) or _Crowd(sky, releases, settings)
    touched = np.zeros(len(ra), dtype=np.bool_)
    if frontier is not None and frontier.any():
        root = _components(near.every(), len(ra))
        touched[root[frontier]] = True
        touched = touched[root]
    primary = np.arange(len(ra), dtype=np.int64)
    known = np.zeros(len(ra), dtype=np.bool_)
    if releases:
        known = _group_known(primary, rank, releases, near)
    near.group_others(primary, known)
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

    Parameters
    ----------
    pixel : HealpixPixel
    read : callable
        Gives the rows of ranges of cells, sorted by the cells in which they are compared, and which
        of them belong to the pixel.
    rank : callable
        Gives the ranks of such rows, as for `group`.
    reach_arcsec : float
        Length of the longest link, and how far a row may stand from where it is compared.
    settings : Radii
    where : str
        Named in the error, such as the path of a catalog.

    Returns
    -------
    table : pyarrow.Table
    own : ndarray of bool, shape (n,)
    primary : ndarray of int64, shape (n,)
        As in `Groups`; right for the stars of which a row belongs to the pixel.

    Raises
    ------
    PartitionError
        A chain of rows is too long.
    """
    layers = 2
    while layers <= _MAX_LAYERS:
        around = neighbours.surroundings(pixel, reach_arcsec, layers)
        whole = [(pixel.first, pixel.stop)]
        table, own = read(sorted([*whole, *chain.from_iterable(around)]))
        cells = table[HEALPIX_COLUMN].to_numpy()
        # What is linked to a row that is compared in the last layer but one was read.
        frontier = ~in_ranges(cells, sorted([*whole, *chain.from_iterable(around[:-1])]))
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


def rank_of(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """Number keys in their order: integers are taken themselves, of text the place when sorted."""
    if pa.types.is_integer(keys.type):
        return np.asarray(keys.to_numpy(), dtype=np.int64)
    order = pc.array_sort_indices(keys.combine_chunks()).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


_Links = tuple[IntArray, IntArray]  # pairs of rows, i < j


def _joined(parts: Iterable[_Links]) -> _Links:
    i, j = (np.concatenate(side) for side in zip(*parts, strict=True))
    return i, j


def _where(links: _Links, mask: BoolArray) -> _Links:
    return links[0][mask], links[1][mask]


def _components(links: _Links, n: int) -> IntArray:
    """The first row of the component of each of ``n`` rows."""
    root = np.arange(n, dtype=np.int64)
    if len(links[0]):
        from sos_dask.sky.loops import components

        components(*links, root)
    return root


def _between(links: _Links, one: BoolArray, other: BoolArray) -> _Links:
    """Rows of links from the rows of one kind to those of another kind."""
    i, j = links
    forward, backward = one[i] & other[j], one[j] & other[i]
    return np.append(i[forward], j[backward]), np.append(j[forward], i[backward])


@dataclass(frozen=True)
class _Listed:
    """Links that are few: within the radius, and all."""

    sky: Sky
    releases: list[IntArray]
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
            far = _far_links(sky, release, links[0], settings, most)
            if far is None:
                return None
            links.append(far)
        return cls(sky, releases, links[0], _joined(links) if releases else pairs)

    def every(self) -> _Links:
        """Links with the components of all."""
        return self.all_links

    def equal(self, tier: NDArray[np.int8], name: IntArray) -> _Links:
        """Links with the components of those among rows known by equal ids of a release."""
        i, j = self.all_links
        same = (tier[i] == tier[j]) & (name[i] == name[j]) & (tier[i] < len(self.releases))
        return i[same], j[same]

    def join_older(self, star: IntArray, tier: NDArray[np.int8], number: int) -> None:
        """Join groups known by a release to stars known by a newer one (rule 2), in place."""
        newer, older = _between(self.all_links, tier < number, tier == number)
        if len(newer):
            ids = self.releases[number]
            holders = np.flatnonzero((tier < number) & (ids > 0))
            separation = self.sky.separation(newer, older)
            _join_older(star, self.sky.rank, ids, newer, older, separation, holders)

    def group_others(self, primary: IntArray, known: BoolArray) -> None:
        """Group the rows without ids (rules 3 and 4), in place."""
        links = self.links
        if self.releases:
            row, target = _nearest(*_between(links, ~known, known), self.sky)
            primary[row] = primary[target]
            done = known.copy()
            done[row] = True
            links = _where(links, ~done[links[0]] & ~done[links[1]])
        _group_by_rank(primary, links, self.sky)


@dataclass(frozen=True)
class _Crowd:
    """The same where so many rows lie within a radius that their links are not listed."""

    sky: Sky
    releases: list[IntArray]
    settings: Radii

    def _places(self, rows: IntArray, key: IntArray | None = None) -> Places:
        from sos_dask.stars.crowds import Places

        return Places.of(self.sky, rows, key)

    def every(self) -> _Links:
        places = self._places(np.arange(len(self.sky.ra)))
        near = places.links(self.settings.radius_arcsec)
        return _joined([near, *(self._of_ids(ids, ids > 0) for ids in self.releases)])

    def equal(self, tier: NDArray[np.int8], name: IntArray) -> _Links:
        return _joined(self._of_ids(ids, tier == n) for n, ids in enumerate(self.releases))

    def _of_ids(self, ids: IntArray, chosen: BoolArray) -> _Links:
        rows = np.flatnonzero(chosen)
        return self._places(rows, ids[rows]).links(self.settings.id_radius_arcsec)

    def join_older(self, star: IntArray, tier: NDArray[np.int8], number: int) -> None:
        sky, ids = self.sky, self.releases[number]
        hosts, guests = np.flatnonzero(tier < number), np.flatnonzero(tier == number)
        if not len(hosts) or not len(guests):
            return
        joins = np.arange(len(star), dtype=np.int64)
        # Stars that have the id of a group: the nearest row of one, of those without the id, too.
        names, code = np.unique(ids[guests], return_inverse=True)
        asked = self._places(guests, code)
        holders = hosts[ids[hosts] > 0]
        place = np.minimum(np.searchsorted(names, ids[holders]), len(names) - 1)
        of_guests = names[place] == ids[holders]
        with_id, place = holders[of_guests], place[of_guests]
        found = [asked.candidates(self._places(with_id, place), self.settings.id_radius_arcsec)]
        # Rows without the id need a look where not all of a star have it: one a position.
        at = star[with_id] * len(names) + place
        held, count = np.unique(at, return_counts=True)
        held = held[count < np.bincount(star[hosts], minlength=len(star))[held // len(names)]]
        rows = self._places(hosts, star[hosts]).row
        low = np.searchsorted(star[rows], held // len(names))
        count = np.searchsorted(star[rows], held // len(names), side="right") - low
        for some in neighbours.blocks(count):
            row = rows[neighbours.runs(low[some], count[some])]
            others = self._places(row, np.repeat(held[some] % len(names), count[some]))
            found.append(asked.candidates(others, self.settings.radius_arcsec))
        older, newer = (np.concatenate(side) for side in zip(*found, strict=True))
        ranks = sky.rank[older], sky.rank[newer]
        order = np.lexsort((older, newer, *ranks, sky.separation(older, newer)))[::-1]
        joins[star[older[order]]] = star[newer[order]]  # the first is written last
        # Stars without any such id, and groups that are left.
        hosts = hosts[~np.isin(star[hosts], star[holders])]
        guests = guests[joins[star[guests]] == star[guests]]
        host_stars, host_star = np.unique(star[hosts], return_inverse=True)
        guest_stars, guest_star = np.unique(star[guests], return_inverse=True)
        _, code = np.unique(ids[guest_stars], return_inverse=True)
        from sos_dask.stars.crowds import join_in_order

        sides = hosts, host_star, guests, guest_star
        host_of = join_in_order(sky, *sides, code, self.settings.radius_arcsec)
        joined = host_of >= 0
        joins[guest_stars[joined]] = host_stars[host_of[joined]]
        star[:] = joins[star]

    def group_others(self, primary: IntArray, known: BoolArray) -> None:
        left, radius = ~known, self.settings.radius_arcsec
        if known.any():
            hosts = self._places(np.flatnonzero(known))
            row, target = self._follow(self._places(np.flatnonzero(left)), hosts)
            primary[row] = primary[target]
            left[row] = False
        places = self._places(np.flatnonzero(left))
        row, target = self._follow(places, self._places(places.leading(radius)))
        primary[row] = target

    def _follow(self, places: Places, hosts: Places) -> tuple[IntArray, IntArray]:
        """Rows and the nearest of others, where one lies within the radius."""
        target = np.full(len(self.sky.ra), -1)
        row, nearest = _nearest(*places.candidates(hosts, self.settings.radius_arcsec), self.sky)
        target[row] = nearest
        target = target[places.row[places.place]]
        return places.rows[target >= 0], target[target >= 0]


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
    primary: IntArray, rank: IntArray, releases: list[IntArray], near: _Listed | _Crowd
) -> BoolArray:
    """Group the rows with ids (rules 1 and 2); gives which they are."""
    n = len(primary)
    tier = np.full(n, len(releases), dtype=np.int8)
    name = np.zeros(n, dtype=np.int64)
    for number in range(len(releases) - 1, -1, -1):
        has = releases[number] > 0
        tier[has] = number
        name[has] = releases[number][has]
    known = tier < len(releases)
    star = _components(near.equal(tier, name), n)
    for number in range(1, len(releases)):
        near.join_older(star, tier, number)
    rows = np.flatnonzero(known)
    best = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(best, star[rows], rank[rows])
    # Written backwards, so that of equal ranks the first row stays.
    first = rows[rank[rows] == best[star[rows]]][::-1]
    leader = np.zeros(n, dtype=np.int64)
    leader[star[first]] = first
    primary[rows] = leader[star[rows]]
    return known


def _join_older(
    star: IntArray,
    rank: IntArray,
    ids: IntArray,
    newer: IntArray,
    older: IntArray,
    separation: FloatArray,
    holders: IntArray,
) -> None:
    """Join groups known by an older release to stars known by a newer one (rule 2), in place.

    ``holders`` are the rows of newer releases that have an id of the older one, too. Of the links
    in order of preference, those that come first for both their star and their group are taken at
    once: no link that goes before them can concern either.
    """
    values, code = np.unique(np.append(ids[older], ids[holders]), return_inverse=True)
    held = star[holders] * len(values) + code[len(older) :]
    code = code[: len(older)]
    shares = np.isin(star[newer] * len(values) + code, held)
    free = ~np.isin(star[newer], star[holders])
    order = np.lexsort((older, newer, rank[older], rank[newer], separation, ~shares))
    order = order[(shares | free)[order]]
    host, guest, code, free = star[newer[order]], star[older[order]], code[order], free[order]
    joins = np.arange(len(star), dtype=np.int64)
    owner = np.full(len(star), -1, dtype=np.int64)
    first_host, first_guest = np.empty_like(star), np.empty_like(star)
    while len(host):
        place = np.arange(len(host))
        first_host[host[::-1]] = place[::-1]
        first_guest[guest[::-1]] = place[::-1]
        take = (first_host[host] == place) & (first_guest[guest] == place)
        joins[guest[take]] = host[take]
        owner[host[take & free]] = code[take & free]
        left = (joins[guest] == guest) & (~free | (owner[host] < 0) | (owner[host] == code))
        host, guest, code, free = host[left], guest[left], code[left], free[left]
    star[:] = joins[star]


def _group_by_rank(primary: IntArray, links: _Links, sky: Sky) -> None:
    """Primaries in the order of rank and their nearest rows (rule 4), in place."""
    if not len(links[0]):
        return
    from sos_dask.sky.loops import claim, join_claimed

    claimed = np.zeros(len(primary), dtype=np.bool_)
    claim(*links, sky.rank, claimed)
    several, count = np.empty_like(links[0]), np.zeros(1, dtype=np.int64)
    join_claimed(*links, claimed, primary, several, count)
    i, j = (side[several[: count[0]]] for side in links)
    row, target = _nearest(*_between((i, j), claimed, ~claimed), sky)
    primary[row] = target


def _nearest(row: IntArray, target: IntArray, sky: Sky) -> tuple[IntArray, IntArray]:
    """The nearest target of each row (ties: smallest rank, then first on the sky)."""
    choice = np.bincount(row)[row] > 1 if len(row) else np.zeros(0, dtype=np.bool_)
    some, at = row[choice], target[choice]
    order = np.lexsort((at, sky.rank[at], sky.separation(some, at), some))
    some, at = some[order], at[order]
    first = np.append(True, some[1:] != some[:-1])[: len(some)]
    return np.append(row[~choice], some[first]), np.append(target[~choice], at[first])
