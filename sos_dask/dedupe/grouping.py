"""Which rows are the same star.

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
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask import nearby, sphere
from sos_dask.dedupe.settings import DedupeSettings
from sos_dask.errors import PartitionError
from sos_dask.healpix import FloatArray, IntArray
from sos_dask.schema import HEALPIX_COLUMN

BoolArray = NDArray[np.bool_]

# Rows with one id beyond which their pairs are searched on the sky: a placeholder taken for an id
# must not make all pairs of a million rows.
_MANY_ROWS = 64


@dataclass(frozen=True)
class Groups:
    """Which star every row belongs to.

    Parameters
    ----------
    primary : ndarray of int64, shape (n,)
        Row number of the star's primary row.
    touches_frontier : ndarray of bool, shape (n,)
        The row's component holds a frontier row: rows not given may belong to it.
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
    settings: DedupeSettings,
) -> Groups:
    """Find the rows that are one star, by the rule of this module.

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
    settings : DedupeSettings

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
    sky = _Sky(ra, dec, cells29)
    links = _Links(*nearby.pairs_within(ra, dec, cells29, settings.radius_arcsec))
    far = [_far_links(sky, release, links, settings) for release in releases]
    every = _Links.joined([links, *far])
    touched = np.zeros(len(ra), dtype=np.bool_)
    if frontier is not None:
        touched = _spread_over(frontier, every)
    primary = np.arange(len(ra), dtype=np.int64)
    if releases:
        known = _group_known(primary, rank, releases, every, sky)
        links = _join_nearest_known(primary, rank, known, links, sky)
    _group_by_rank(primary, rank, links, sky)
    return Groups(primary, touched)


@dataclass(frozen=True)
class _Sky:
    """Positions of rows; separations are calculated only where they decide."""

    ra: FloatArray
    dec: FloatArray
    cells: IntArray

    def separation(self, i: IntArray, j: IntArray) -> FloatArray:
        return sphere.separation_arcsec(self.ra[i], self.dec[i], self.ra[j], self.dec[j])


@dataclass(frozen=True)
class _Links:
    """Pairs of rows, i < j."""

    i: IntArray
    j: IntArray

    @classmethod
    def joined(cls, parts: list[_Links]) -> _Links:
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([np.empty(0, dtype=np.int64), *(part.i for part in parts)]),
            np.concatenate([np.empty(0, dtype=np.int64), *(part.j for part in parts)]),
        )

    def where(self, mask: BoolArray) -> _Links:
        return _Links(self.i[mask], self.j[mask])

    def between(self, one: BoolArray, other: BoolArray) -> tuple[IntArray, IntArray]:
        """Rows of links from the rows of one kind to those of another kind."""
        forward, backward = one[self.i] & other[self.j], one[self.j] & other[self.i]
        return (
            np.concatenate([self.i[forward], self.j[backward]]),
            np.concatenate([self.j[forward], self.i[backward]]),
        )


def _far_links(sky: _Sky, ids: IntArray, near: _Links, settings: DedupeSettings) -> _Links:
    """Rows with equal ids that lie beyond the radius, but within that for ids."""
    rows = np.flatnonzero(ids > 0)
    encoded = pa.array(ids[rows]).dictionary_encode()
    code = np.zeros(len(ids), dtype=np.int64)
    code[rows] = encoded.indices.to_numpy()
    count = np.bincount(code[rows], minlength=len(encoded.dictionary))
    # Where the pairs within the radius are all pairs of an id, nothing is left to find.
    same = (ids[near.i] == ids[near.j]) & (ids[near.i] > 0)
    found = np.bincount(code[near.i[same]], minlength=len(count))
    rows = rows[(found < count * (count - 1) // 2)[code[rows]]]
    many = count[code[rows]] > _MANY_ROWS
    parts = []
    crowd = rows[many]
    cells = sky.cells[crowd]
    for p, q in nearby.candidates(cells, settings.id_radius_arcsec, cells, later_only=True):
        equal = ids[crowd[p]] == ids[crowd[q]]
        parts.append((crowd[p[equal]], crowd[q[equal]]))
    rows = rows[~many]
    rows = rows[np.argsort(code[rows], kind="stable")]
    last = np.append(code[rows[1:]] != code[rows[:-1]], True)[: len(rows)]
    stop = np.flatnonzero(last) + 1
    after = np.repeat(stop, np.diff(stop, prepend=0)) - np.arange(1, len(rows) + 1)
    first = np.repeat(np.arange(len(rows)), after)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(after) - after, after)
    parts.append((rows[first], rows[second]))
    i = np.concatenate([one for one, _ in parts])
    j = np.concatenate([other for _, other in parts])
    separation = sky.separation(i, j)
    beyond = (separation > settings.radius_arcsec) & (separation <= settings.id_radius_arcsec)
    return _Links(i, j).where(beyond)


def _spread_over(marked: BoolArray, links: _Links) -> BoolArray:
    """Mark every row of the components that hold a marked row."""
    marked = marked.copy()
    i, j = links.i, links.j
    while True:
        mixed = marked[i] != marked[j]
        if not mixed.any():
            return marked
        marked[i[mixed]] = True
        marked[j[mixed]] = True
        dark = ~marked[i] | ~marked[j]
        i, j = i[dark], j[dark]


def _group_known(
    primary: IntArray, rank: IntArray, releases: list[IntArray], links: _Links, sky: _Sky
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
    same = (tier[links.i] == tier[links.j]) & (name[links.i] == name[links.j]) & known[links.i]
    star = np.arange(n, dtype=np.int64)
    if same.any():
        from sos_dask.compiled import components

        components(links.i[same], links.j[same], star)
    for number in range(1, len(releases)):
        newer, older = links.between(tier < number, tier == number)
        if len(newer):
            holders = np.flatnonzero((tier < number) & (releases[number] > 0))
            separation = sky.separation(newer, older)
            _join_older(star, rank, releases[number], newer, older, separation, holders)
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
    values, code = np.unique(
        np.concatenate([ids[older], ids[holders]]), return_inverse=True, sorted=True
    )
    code = code.astype(np.int64)
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


def _join_nearest_known(
    primary: IntArray, rank: IntArray, known: BoolArray, links: _Links, sky: _Sky
) -> _Links:
    """Join rows without ids to stars with ids (rule 3); gives the links among the others."""
    row, target = _nearest(*links.between(~known, known), rank, sky)
    primary[row] = primary[target]
    done = known.copy()
    done[row] = True
    return links.where(~done[links.i] & ~done[links.j])


def _group_by_rank(primary: IntArray, rank: IntArray, links: _Links, sky: _Sky) -> None:
    """Primaries in the order of rank and their nearest rows (rule 4), in place."""
    if not len(links.i):
        return
    from sos_dask.compiled import claim, join_claimed

    claimed = np.zeros(len(primary), dtype=np.bool_)
    claim(links.i, links.j, rank, claimed)
    several, count = np.empty_like(links.i), np.zeros(1, dtype=np.int64)
    join_claimed(links.i, links.j, claimed, primary, several, count)
    several = several[: count[0]]
    links = _Links(links.i[several], links.j[several])
    row, target = _nearest(*links.between(claimed, ~claimed), rank, sky)
    primary[row] = target


def _nearest(
    row: IntArray, target: IntArray, rank: IntArray, sky: _Sky
) -> tuple[IntArray, IntArray]:
    """The nearest target of each row (ties: smallest rank, then first on the sky)."""
    choice = np.bincount(row)[row] > 1 if len(row) else np.zeros(0, dtype=np.bool_)
    some, at = row[choice], target[choice]
    order = np.lexsort((at, rank[at], sky.separation(some, at), some))
    some, at = some[order], at[order]
    first = np.append(True, some[1:] != some[:-1])[: len(some)]
    return np.concatenate([row[~choice], some[first]]), np.concatenate([target[~choice], at[first]])
