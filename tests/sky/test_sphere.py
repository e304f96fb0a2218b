"""Separations and motions on the sphere, against astropy and the definitions."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sos_dask.sky.healpix import ARCSEC_PER_RADIAN, propagate, separation_arcsec, unit_vectors
from tests.geometry import SETTINGS, around, declinations, on_sphere, right_ascensions, seeds


@SETTINGS
@given(seeds, st.floats(1e-4, 6e5))
def test_separation_against_astropy(seed, radius_arcsec):
    from astropy.coordinates import angular_separation

    rng = np.random.default_rng(seed)
    ra1, dec1 = on_sphere(rng, 50)
    ra2, dec2 = around(rng, ra1, dec1, radius_arcsec)
    expected = np.degrees(angular_separation(*np.radians([ra1, dec1, ra2, dec2]))) * 3600
    found = separation_arcsec(ra1, dec1, ra2, dec2)
    # The positions themselves are rounded to about 1e-10 arcsec. Near 180 degrees haversines lose
    # half the digits, which no catalog match reaches.
    tolerance = 1e-9 if radius_arcsec < 5e5 else 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=tolerance)


@SETTINGS
@given(right_ascensions, declinations)
@example(0.0, 90.0)
def test_separation_of_a_point_from_itself_and_its_opposite(ra, dec):
    one = (np.array([ra]), np.array([dec]))
    assert separation_arcsec(*one, *one)[0] == 0
    assert separation_arcsec(*one, one[0] + 180, -one[1])[0] == pytest.approx(648000, abs=0.02)


@pytest.mark.parametrize("dec", [-90.0, -89.9999, -60.0, 0.0, 60.0, 89.9999])
def test_one_arcsecond_is_one_arcsecond(dec):
    step = 1 / 3600
    north = separation_arcsec(np.zeros(1), np.array([dec]), np.zeros(1), np.array([dec + step]))
    assert north[0] == pytest.approx(1, rel=1e-6)
    across = separation_arcsec(
        np.array([359.9999]), np.array([dec]), np.array([0.0001]), np.array([dec])
    )
    assert across[0] == pytest.approx(0.72 * np.cos(np.radians(dec)), rel=1e-6, abs=1e-9)


@SETTINGS
@given(
    right_ascensions,
    declinations,
    st.floats(-12000, 12000),
    st.floats(-12000, 12000),
    st.floats(-50, 50),
)
@example(0.0, 90.0, 3000.0, -4000.0, 16.0)
@example(269.45207, 4.69339, -801.55, 10362.39, -16.0)  # Barnard's star
@example(359.9999999, 0.0, 3000.0, 0.0, 16.0)
@example(0.0, 0.0, -1e-10, 0.0, 1.0)  # rounds to 360 degrees
@example(0.0, 90.0, 0.0, 1.0, 1.0)
def test_propagation_against_astropy(ra, dec, pmra, pmdec, years):
    """Along a great circle, in the direction and by the angle of the proper motion."""
    from astropy import units as u
    from astropy.coordinates import offset_by

    found_ra, found_dec = propagate(
        np.array([ra]), np.array([dec]), np.array([pmra]), np.array([pmdec]), years
    )
    angle_mas = np.hypot(pmra, pmdec) * abs(years)
    towards = np.arctan2(pmra * years, pmdec * years)
    lon, lat = offset_by(ra * u.deg, dec * u.deg, towards * u.rad, (angle_mas * u.mas).to(u.rad))
    assert 0 <= found_ra[0] < 360 and -90 <= found_dec[0] <= 90
    expected = (np.array([lon.to_value(u.deg)]), np.array([lat.to_value(u.deg)]))
    # The arcsine of astropy loses digits at the poles: its error is the rounding over cos(dec).
    to_pole = np.radians(90.0 - abs(found_dec[0]))
    lost = min(3e-16 / to_pole, 3e-8) if to_pole > 0 else 3e-8
    assert separation_arcsec(found_ra, found_dec, *expected)[0] < 2e-6 + lost * ARCSEC_PER_RADIAN
    moved = separation_arcsec(np.array([ra]), np.array([dec]), found_ra, found_dec)[0]
    assert moved == pytest.approx(angle_mas / 1000, rel=1e-6, abs=2e-6)


def test_propagation_against_space_motion():
    """Without radial motion a star keeps to its great circle, slowing as it recedes sideways."""
    from astropy import units as u
    from astropy.coordinates import SkyCoord
    from astropy.time import Time

    rng = np.random.default_rng(2)
    ra, dec = on_sphere(rng, 200)
    pmra, pmdec = rng.normal(0, 200, (2, 200))
    coords = SkyCoord(
        ra * u.deg,
        dec * u.deg,
        pm_ra_cosdec=pmra * u.mas / u.yr,
        pm_dec=pmdec * u.mas / u.yr,
        distance=np.full(200, 100.0) * u.pc,
        radial_velocity=np.zeros(200) * u.km / u.s,
        obstime=Time(2016.0, format="jyear"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ERFA on years it calls dubious
        moved = coords.apply_space_motion(new_obstime=Time(2000.0, format="jyear"))
    found = propagate(ra, dec, pmra, pmdec, -16.0)
    difference = separation_arcsec(*found, moved.ra.to_value(u.deg), moved.dec.to_value(u.deg))
    assert difference.max() < 1e-4


def test_stars_without_motion_stay_exactly():
    ra, dec = on_sphere(np.random.default_rng(3), 100)
    zero = np.zeros(100)
    for years in (16.0, np.full(100, 16.0)):
        found_ra, found_dec = propagate(ra, dec, zero, zero, years)
        assert np.array_equal(found_ra, ra) and np.array_equal(found_dec, dec)
    moving = np.full(100, 5.0)
    assert np.array_equal(propagate(ra, dec, moving, moving, 0.0)[0], ra)


@SETTINGS
@given(seeds)
def test_motion_there_and_back(seed):
    rng = np.random.default_rng(seed)
    ra, dec = on_sphere(rng, 20)
    dec = np.clip(dec, -80, 80)
    pm = rng.normal(0, 500, (2, 20))
    there_ra, there_dec = propagate(ra, dec, pm[0], pm[1], 20.0)
    back = propagate(there_ra, there_dec, pm[0], pm[1], -20.0)
    # The direction of north turns on the way by about angle * tan(dec).
    turned = (np.hypot(*pm) / 1000 * 20) ** 2 / 206265 * np.tan(np.radians(81)) * 2
    assert (separation_arcsec(ra, dec, *back) <= turned + 1e-6).all()


def test_unit_vectors():
    ra, dec = np.array([0.0, 90.0, 123.0, 0.0]), np.array([0.0, 0.0, 90.0, -90.0])
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]]
    np.testing.assert_allclose(unit_vectors(ra, dec), expected, atol=1e-15)
