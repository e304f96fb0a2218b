"""Every compiled loop against the same rule in plain Python."""

import math
import statistics
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.sky.healpix import ang2pix, separation_arcsec
from sos_dask.sky.loops import (
    choose,
    claim,
    combine_label,
    components,
    count_pulls,
    join_claimed,
    pairs_on_faces,
    repeated,
    sort_members,
)
from sos_dask.sky.neighbours import order_for_radius

RUNS = settings(deadline=None, derandomize=True, max_examples=100)
seeds = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([np.float32, np.float64])
PLACES = [(10.0, 45.0), (0.0, 0.0), (45.0, 89.9999), (300.0, -41.8), (90.0, -60.0)]
Rng = np.random.Generator


def random_links(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Different pairs of rows, i < j, in any order."""
    i, j = np.triu_indices(n, 1)
    some = rng.permutation(np.flatnonzero(rng.random(len(i)) < rng.choice([0.05, 0.3, 0.9])))
    return i[some], j[some]


def random_groups(rng: Rng, n: int) -> np.ndarray:
    """A number of each row's group; -1: none."""
    return rng.integers(-1, max(n // 2, 1), n)


def members_of(group: np.ndarray) -> dict[int, list[int]]:
    """Rows of the groups with several rows."""
    found = defaultdict(list)
    for row, one in enumerate(group.tolist()):
        if one >= 0:
            found[one].append(row)
    return {one: found[one] for one in sorted(found) if len(found[one]) > 1}


def sometimes_nan(rng: Rng, n: int, dtype: Any, low: float, high: float) -> np.ndarray:
    values = rng.uniform(low, high, n)
    return np.where(rng.random(n) < rng.choice([0.0, 0.3]), np.nan, values).astype(dtype)


@RUNS
@given(seeds, st.integers(0, 40), st.floats(0.01, 300.0))
def test_pairs_on_faces(seed, n, radius):
    rng = np.random.default_rng(seed)
    ra, dec = np.array(PLACES)[rng.integers(0, len(PLACES), 1)[0]]
    reach = radius / 3600.0 * rng.uniform(0.5, 3.0)
    dec = np.clip(dec + rng.uniform(-reach, reach, n), -90, 90)
    ra = (ra + rng.uniform(-reach, reach, n) / np.cos(np.radians(dec))) % 360
    cells = ang2pix(ra, dec)
    sky = np.argsort(cells, kind="stable")
    ra, dec, cells = ra[sky], dec[sky], cells[sky]
    room = n * n
    i, j = np.empty((2, room), dtype=np.int64)
    near, crosses = np.empty(room, dtype=np.int8), np.zeros(n, dtype=np.bool_)
    count, everywhere = np.zeros(1, dtype=np.int64), np.array([255], dtype=np.uint8)
    search = (radius / 3600.0, order_for_radius(radius), everywhere, 0)
    pairs_on_faces(
        cells, ra, dec, np.cos(np.radians(dec)), *search, room, i, j, near, crosses, count
    )
    found = list(zip(i[: count[0]].tolist(), j[: count[0]].tolist(), strict=True))
    sure = [pair for pair, state in zip(found, near.tolist(), strict=False) if state == 1]
    assert len(set(found)) == len(found)
    p, q = np.triu_indices(n, 1)
    within = separation_arcsec(ra[p], dec[p], ra[q], dec[q]) <= radius
    one_face = cells[p] >> 58 == cells[q] >> 58
    wanted = set(zip(p[within & one_face].tolist(), q[within & one_face].tolist(), strict=True))
    assert set(sure) <= wanted <= set(found)
    over_an_edge = within & ~one_face
    assert crosses[p[over_an_edge]].all() and crosses[q[over_an_edge]].all()


@RUNS
@given(seeds, st.integers(0, 30))
def test_claim_and_join(seed, n):
    rng = np.random.default_rng(seed)
    i, j = random_links(rng, n)
    rank = rng.permutation(n) // rng.integers(1, 4)
    beside = defaultdict(list)
    for p, q in zip(i.tolist(), j.tolist(), strict=True):
        beside[p].append(q)
        beside[q].append(p)
    wanted = np.zeros(n, dtype=np.bool_)
    for row in np.lexsort((np.arange(n), rank)).tolist():  # one after the other
        if not wanted[row]:
            wanted[beside[row]] = True
    claimed = np.zeros(n, dtype=np.bool_)
    claim(i, j, rank, claimed)
    assert claimed.tolist() == wanted.tolist()

    primary, links, count = np.arange(n), np.empty_like(i), np.zeros(1, dtype=np.int64)
    join_claimed(i, j, claimed, primary, links, count)
    primaries = {row: [q for q in beside[row] if not claimed[q]] for row in range(n)}
    for row in range(n):
        assert primary[row] in primaries[row] if claimed[row] else primary[row] == row
    with_choice = [
        link
        for link, (p, q) in enumerate(zip(i.tolist(), j.tolist(), strict=True))
        if claimed[p] != claimed[q] and len(primaries[p if claimed[p] else q]) > 1
    ]
    assert links[: count[0]].tolist() == with_choice


@RUNS
@given(seeds, st.integers(0, 30))
def test_components(seed, n):
    i, j = random_links(np.random.default_rng(seed), n)
    wanted = list(range(n))
    for p, q in zip(i.tolist(), j.tolist(), strict=True):
        low, high = sorted((wanted[p], wanted[q]))
        wanted = [low if one == high else one for one in wanted]
    root = np.arange(n)
    components(i, j, root)
    assert root.tolist() == wanted


@RUNS
@given(seeds, st.integers(0, 40) | st.just(300))
def test_members_and_their_order(seed, n):
    rng = np.random.default_rng(seed)
    group, key = random_groups(rng, n), rng.integers(-5, 5, n)
    group[: n // 2] = group[:1]  # a large one
    wanted = members_of(group)
    groups, first, row = repeated(group)
    assert groups.tolist() == list(wanted)
    rows = [row[low:high].tolist() for low, high in pairwise(first.tolist())]
    assert rows == list(wanted.values())
    sort_members(first, row, key)
    rows = [row[low:high].tolist() for low, high in pairwise(first.tolist())]
    assert rows == [sorted(one, key=lambda at: key[at]) for one in wanted.values()]


@RUNS
@given(seeds, st.integers(0, 40), DTYPES)
def test_choose(seed, n, dtype):
    rng = np.random.default_rng(seed)
    quality = rng.choice([0, 1, 2, 6], n)
    snr = sometimes_nan(rng, n, dtype, 1, 4).round()
    _, first, row = repeated(random_groups(rng, n))
    n_stars = len(first) - 1
    used_first, used_row = np.empty_like(first), np.empty_like(row)
    best, bits = np.empty((2, n_stars), dtype=np.int64)
    total = np.empty(n_stars, dtype=dtype)
    choose(first, row, quality, snr, used_first, used_row, best, bits, total)
    for star in range(n_stars):
        rows = row[first[star] : first[star + 1]].tolist()
        used = [one for one in rows if quality[one] == 0] or rows
        assert used_row[used_first[star] : used_first[star + 1]].tolist() == used
        assert row[best[star]] == max(used, key=lambda at: np.nan_to_num(snr[at], nan=-1.0))
        common = int(np.bitwise_and.reduce(quality[rows]))
        passed = used != rows or not quality[rows].any()
        assert bits[star] == (0 if passed else common or np.bitwise_or.reduce(quality[rows]))
        squares = [float(snr[one]) ** 2 for one in used if not np.isnan(snr[one])]
        assert total[star] == pytest.approx(
            math.sqrt(sum(squares)) if squares else math.nan, rel=1e-6, nan_ok=True
        )


@RUNS
@given(seeds, st.integers(0, 40), DTYPES, st.sampled_from([0.0, 1.2533]), st.booleans())
def test_combine_label(seed, n, dtype, median_error, is_expected):
    rng = np.random.default_rng(seed)
    values = sometimes_nan(rng, n, dtype, 4, 6)
    errors = rng.choice([-1, 0, 0.1, 0.5, np.nan], n).astype(dtype)
    expected, limit = 0.3 if is_expected else math.nan, 2.0
    _, first, row = repeated(random_groups(rng, n))
    n_stars = len(first) - 1
    value, error = np.empty((2, n_stars), dtype=dtype)
    spread, wide = np.empty(n_stars, dtype=np.float32), np.empty(n_stars, dtype=np.bool_)
    settings_ = (expected, limit, median_error)
    combine_label(first, row, values, errors, *settings_, value, error, spread, wide)
    for star in range(n_stars):
        rows = row[first[star] : first[star + 1]]
        has = [one for one in rows.tolist() if not np.isnan(values[one])]
        given_ = [float(values[one]) for one in has]
        stated = {one: float(errors[one]) for one in has if errors[one] > 0}
        rms = math.sqrt(statistics.fmean(e * e for e in stated.values())) if stated else math.nan
        want = want_error = math.nan
        if median_error and has:
            want = statistics.median(given_)
            want_error = (median_error if len(has) > 2 else 1.0) * rms / math.sqrt(len(has))
        elif stated:
            weights = {one: 1 / (e * e) for one, e in stated.items()}
            want = sum(w * float(values[one]) for one, w in weights.items())
            want /= sum(weights.values())
            want_error = 1 / math.sqrt(sum(weights.values()))
        elif has:
            want = statistics.fmean(given_)
        want_spread = statistics.stdev(given_) if len(has) > 1 else math.nan
        assert value[star] == pytest.approx(want, rel=1e-6, nan_ok=True)
        assert error[star] == pytest.approx(want_error, rel=1e-6, nan_ok=True)
        assert spread[star] == pytest.approx(want_spread, rel=1e-5, nan_ok=True)
        assert wide[star] == (want_spread > limit * (rms if stated else expected))


@RUNS
@given(seeds, st.integers(0, 60), DTYPES)
def test_count_pulls(seed, n, dtype):
    rng = np.random.default_rng(seed)
    quality = (rng.random(n) < 0.2).astype(np.int64)
    values = [sometimes_nan(rng, n, dtype, 3, 4) for _ in range(3)]
    for one in values:
        one[rng.random(n) < 0.3] = 3.25  # some rows have the labels of the one before
    errors = [rng.choice([0, 0.1, 0.7, np.nan], n).astype(dtype) for _ in range(3)]
    expected, snr = np.array([0.2, np.nan, 0.4]), sometimes_nan(rng, n, dtype, 0, 40)
    edges, lowest, bins = np.array([10.0, 20.0]), -3.0, 2.0
    _, first, row = repeated(random_groups(rng, n))
    counts = np.zeros((3, 2, 4, 12), dtype=np.int64)
    binning = (3.5, edges, lowest, bins)
    count_pulls(first, row, quality, tuple(values), tuple(errors), expected, snr, *binning, counts)
    wanted = np.zeros_like(counts)

    def known_error(label: int, at: int) -> float:
        return float(errors[label][at]) if errors[label][at] > 0 else float(expected[label])

    for low, high in pairwise(first.tolist()):
        good = [one for one in row[low:high].tolist() if quality[one] == 0]
        different = [
            one
            for place, one in enumerate(good)
            if not place or any(label[one] != label[good[place - 1]] for label in values)
        ]
        for label in range(3):
            chain = [
                one
                for one in different
                if np.isfinite(values[label][one]) and np.isfinite(known_error(label, one))
            ]
            for one, two in pairwise(chain):
                pull = abs(float(values[label][one]) - float(values[label][two]))
                pull /= math.hypot(known_error(label, one), known_error(label, two))
                at = (math.log2(pull) - lowest) * bins if pull else 0.0
                assert not pull or abs(at - round(at)) > 1e-9  # no bin hangs on a last digit
                worse = min(snr[one], snr[two]) if np.isfinite(snr[[one, two]]).all() else np.nan
                place = len(edges) + 1 if np.isnan(worse) else int((edges <= worse).sum())
                logg = [float(values[1][one]), float(values[1][two])]
                kind = 1 if sum(logg) < 7.0 else 0
                wanted[label, kind, place, min(max(math.floor(at), 0), 11)] += 1
    assert counts.tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_count_pulls_beside_the_limits_of_bins(dtype):
    lowest, bins, n_bins = -10.0, 12.0, 192
    limits = 2.0 ** (np.arange(-3, n_bins + 4) / bins + lowest)
    away = np.array([1e-12, 1e-10, 3e-9, 1e-6, 4e-3])
    pull = np.concatenate([limits[:, None] * (1 + away), limits[:, None] * (1 - away)]).ravel()
    pull = np.concatenate([pull, [0.0, 1e-200, 1e-30, 1e30]]).astype(dtype)
    n = len(pull)
    value = np.stack([np.zeros(n, dtype=dtype), pull], axis=1).ravel()
    error = np.full(2 * n, 0.5, dtype=dtype)
    first, row = np.arange(n + 1) * 2, np.arange(2 * n)
    counts = np.zeros((3, 2, 3, n_bins), dtype=np.int64)
    none = np.full(2 * n, np.nan, dtype=dtype)
    labels, errors = (value, none, none), (error, none, none)
    quality, expected, edges = np.zeros(2 * n, dtype=np.int64), np.full(3, np.nan), np.array([10.0])
    binning = (3.5, edges, lowest, bins)
    count_pulls(first, row, quality, labels, errors, expected, none, *binning, counts)
    wanted = np.zeros(n_bins, dtype=np.int64)
    for one in (pull.astype(np.float64) / math.sqrt(0.5)).tolist():
        at = math.floor((math.log2(one) - lowest) * bins) if one else 0
        wanted[min(max(at, 0), n_bins - 1)] += 1
    assert counts[0].sum(axis=(0, 1)).tolist() == wanted.tolist()
    assert counts.sum() == n
