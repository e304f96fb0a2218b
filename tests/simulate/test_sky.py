"""The mock sky: plates, regions, difficult stars."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from sos_dask.errors import ConfigError
from sos_dask.simulate import SkySettings
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
    SPECIAL_STARS,
    from_galactic,
    make_plates,
    references_avoid,
    to_galactic,
)
from sos_dask.simulate.surveys import (
    SURVEYS,
)
from sos_dask.sky import healpix
from tests.simulate.mock import moved


def test_footprints(sky):
    dec = {s: sky.seen[s]["dec"][~sky.truth[s]["is_special"]] for s in SURVEYS}
    assert dec[LAMOST].min() > -10.1
    assert dec[GALAH].max() < 10.1
    assert np.nanmin(dec[APOGEE]) < -40
    assert np.nanmax(dec[APOGEE]) > 40
    assert -10 < np.median(dec[LAMOST][dec[LAMOST] < 10]) < 10


def test_overlap_by_id_and_by_place_is_that_of_the_truth(sky):
    lamost, star_l = sky.seen[LAMOST], sky.truth[LAMOST]["star"]
    gaia_l = lamost["gaia_dr3_source_id"]
    first = np.unique(star_l, return_index=True)[1]
    tree = cKDTree(healpix.unit_vectors(lamost["ra"][first], lamost["dec"][first]))
    # Everything at the epoch of LAMOST, J2000.
    columns = (sky.gaia[name].to_pylist() for name in ("source_id", "pmra", "pmdec"))
    motion = {key: pm for key, *pm in zip(*columns, strict=True)}
    for survey, least in ((APOGEE, 0.15), (GALAH, 0.05)):
        seen, truth = sky.seen[survey], sky.truth[survey]
        star, true_ids = truth["star"], truth["gaia_source_id"]
        pm = np.array([motion.get(key, (0.0, 0.0)) for key in true_ids], dtype=float)
        good = np.isfinite(pm).all(axis=1) & (true_ids > 0) & np.isfinite(seen["ra"])
        years = 2000.0 - SURVEYS[survey].epoch
        pmra, pmdec = pm[good].T
        place = healpix.propagate(seen["ra"][good], seen["dec"][good], pmra, pmdec, years)
        shared = np.isin(star[good], star_l)
        assert shared.mean() > least
        distance, nearest = tree.query(healpix.unit_vectors(*place))
        found = distance * healpix.ARCSEC_PER_RADIAN < 1.5
        assert np.all(found[shared])
        assert (star_l[first][nearest][shared] == star[good][shared]).mean() > 0.999
        assert found[~shared].mean() < 0.005
        gaia = seen["gaia_dr3_source_id"]
        by_id = {key: number for key, number in zip(gaia_l, star_l, strict=True) if key > 0}
        here = np.isin(gaia, list(by_id))
        assert here.any()
        assert all(by_id[key] == number for key, number in zip(gaia[here], star[here], strict=True))


def test_references_avoid_regions_that_lamost_covers(sky):
    avoided = references_avoid(*sky.true_labels(LAMOST).T)
    assert 0.01 < avoided.mean() < 0.04
    for survey in (APOGEE, GALAH):
        assert not references_avoid(*sky.true_labels(survey).T).any()
        t, g, m = sky.true_labels(survey).T
        for sparse in (g < 1, t > 7000, m < -2, m > 0.2):
            assert 0 < sparse.mean() < 0.06


def test_default_overlap_serves_training():
    sky = SkySettings()
    plan = make_plates(sky)
    # Stars of LAMOST plates that a reference observes too; some are observed by both.
    shares = {s: int(plan.counts[s][0][plan.kind == LAMOST].sum()) for s in (APOGEE, GALAH)}
    n_stars = plan.counts[LAMOST][0].sum()
    assert 0.10 < shares[APOGEE] / n_stars < 0.15
    assert 0.05 < shares[GALAH] / n_stars < 0.08


def test_special_stars_are_in_every_survey(sky):
    table = SPECIAL_STARS
    still = np.hypot(table[:, 2], table[:, 3]) == 0
    fast = np.hypot(table[:, 2], table[:, 3]) > 1000
    assert fast.sum() == 6
    for survey in SURVEYS:
        truth, seen = sky.truth[survey], sky.seen[survey]
        index = np.full(len(table), -1)
        for row in np.flatnonzero(truth["is_special"])[::-1]:
            index[truth["star"][row]] = row
        assert np.all(index >= 0)
        assert not truth["is_outlier"][index].any()
        ra, dec = seen["ra"][index], seen["dec"][index]
        np.testing.assert_array_equal(ra[still], table[still, 0])
        np.testing.assert_array_equal(dec[still], table[still, 1])
        there = moved(table, SURVEYS[survey].epoch - 2016.0)
        assert healpix.separation_arcsec(ra, dec, *there).max() < 1e-3
        assert np.all(seen["gaia_dr3_source_id"][index] > 0)
        assert np.all(np.isfinite(sky.labels(survey)[index]))
    assert not sky.rows[APOGEE]["ASPCAPFLAG"][sky.truth[APOGEE]["is_special"]].any()
    assert not sky.rows[GALAH]["flag_sp"][sky.truth[GALAH]["is_special"]].any()


def test_special_stars_are_where_they_claim():
    table = SPECIAL_STARS
    ra, dec, pmra, pmdec = table.T
    assert np.all(90.0 - np.abs(dec[:7]) < 0.01)
    assert np.all(np.minimum(ra[7:13], 360.0 - ra[7:13]) < 1e-4)
    for border_ra, border_dec in table[13:20, :2]:
        around = [(border_ra + a) % 360.0 for a in (-1e-6, 1e-6)]
        cells = {int(c) for x in around for y in (border_dec - 1e-6, border_dec + 1e-6)
                 for c in healpix.ang2pix(np.array([x]), np.array([y]), 1)}  # fmt: skip
        assert len(cells) > 1, (border_ra, border_dec)
    assert np.all(np.hypot(pmra, pmdec)[20:] > 1000)
    for epoch in (2000.0, 2008.0, 2016.0):
        x = healpix.unit_vectors(*moved(table, epoch - 2016.0))
        distance = cKDTree(x).query(x, k=2)[0][:, 1] * healpix.ARCSEC_PER_RADIAN
        if epoch != 2008.0:
            assert distance.min() > 5
    old_ra = moved(table, -16.0)[0]
    assert abs(old_ra[21] - ra[21]) > 300  # across RA 0
    assert abs(old_ra[24] - ra[24]) > 90  # past the pole


@given(st.floats(0, 359.9), st.floats(-89, 89))
def test_galactic_coordinates_round_trip(ra, dec):
    lon, lat = to_galactic(np.array([ra]), np.array([dec]))
    back = from_galactic(lon, lat)
    assert healpix.separation_arcsec(np.array([ra]), np.array([dec]), *back)[0] < 0.01


def test_galactic_coordinates_of_known_places():
    # The north Galactic pole and the Galactic centre in ICRS.
    lon, lat = to_galactic(np.array([192.85948, 266.40499]), np.array([27.12825, -28.93617]))
    assert lat[0] > 89.999
    assert abs(lat[1]) < 1e-3
    assert min(lon[1], 360 - lon[1]) < 1e-3


@settings(deadline=None, max_examples=40)
@given(
    n_lamost=st.integers(500, 60_000),
    n_apogee=st.none() | st.integers(200, 30_000),
    n_galah=st.none() | st.integers(200, 30_000),
    repeat_fraction=st.floats(0, 0.8),
    seed=st.integers(0, 2**40),
)
def test_plan_counts_every_row_once(**given):
    sky = SkySettings(**given)
    plan = make_plates(sky)
    for survey, n_rows in sky.rows().items():
        assert plan.n_rows[survey] == n_rows
        counts = plan.counts[survey]
        assert 0 <= n_rows - counts.sum() <= (4 if survey == LAMOST else 0)
        assert np.all(counts >= 0)
        assert np.all(counts[0] <= plan.n_stars)
        assert np.all(counts[1:] <= counts[0])
        starts = plan.first_rows(survey).ravel()
        np.testing.assert_array_equal(starts[1:], (starts + counts.ravel())[:-1])
        assert starts[0] == 0
    blocks = plan.blocks(1000)
    assert blocks[0].start == 0
    assert blocks[-1].stop == len(plan.kind)
    assert all(a.stop == b.start for a, b in pairwise(blocks))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_lamost": 10}, {"n_apogee": 5}, {"n_galah": -1}, {"seed": -1}, {"repeat_fraction": 0.9},
        {"outlier_fraction": float("nan")}, {"uncovered": -0.1},
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SkySettings(**wrong)
