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
    between,
    choose,
    claim,
    combine_label,
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
    everywhere = np.array([255], dtype=np.uint8)
    search = (radius / 3600.0, order_for_radius(radius), everywhere, 0)
    pairs = pairs_on_faces(cells, ra, dec, np.cos(np.radians(dec)), *search, n * n)
    assert pairs is not None
    i, j, near, crosses = pairs
    if len(i):
        columns = (cells, ra, dec, np.cos(np.radians(dec)))
        assert pairs_on_faces(*columns, *search, len(i)) is not None
        assert pairs_on_faces(*columns, *search, len(i) - 1) is None
    found = list(zip(i.tolist(), j.tolist(), strict=True))
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
def test_claim(seed, n):
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
    assert claim(i, j, rank).tolist() == wanted.tolist()


@RUNS
@given(seeds, st.integers(0, 30))
def test_between(seed, n):
    rng = np.random.default_rng(seed)
    i, j = random_links(rng, n)
    kind = rng.integers(0, 3, n)
    row, target = between(i, j, kind == 0, kind == 1)
    both = {*zip(i.tolist(), j.tolist(), strict=True), *zip(j.tolist(), i.tolist(), strict=True)}
    wanted = sorted((p, q) for p, q in both if kind[p] == 0 and kind[q] == 1)
    assert sorted(zip(row.tolist(), target.tolist(), strict=True)) == wanted


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
    used_first, used_row, best, bits, total = choose(first, row, quality, snr)
    assert len(used_row) == used_first[-1]
    for star in range(len(first) - 1):
        rows = row[first[star] : first[star + 1]].tolist()
        used = [one for one in rows if quality[one] == 0] or rows
        assert used_row[used_first[star] : used_first[star + 1]].tolist() == used
        assert best[star] == max(used, key=lambda at: np.nan_to_num(snr[at], nan=-1.0))
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
    limits = (expected, limit, median_error)
    value, error, spread, wide = combine_label(first, row, values, errors, limits)
    assert value.dtype == error.dtype == dtype
    for star in range(len(first) - 1):
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
