"""Combining of repeats against a plain-Python version of the stated rule."""

import math
import statistics
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError, PartitionError
from sos_dask.sky.healpix import ang2pix
from sos_dask.stars.combine import combine
from sos_dask.stars.group import DedupeSettings

THOROUGH = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=200
)
Rng = np.random.Generator
seeds = st.integers(0, 2**32 - 1)

METHODS = get_args(DedupeSettings.model_fields["method"].annotation)
LABELS = ("teff", "logg", "feh", "rv", "mg_fe")
FLOATS = (*LABELS, *(f"{label}_err" for label in LABELS), "snr", "phot_g_mean_mag")


def observations(rng: Rng, n: int, text_keys: bool = False) -> tuple[pa.Table, Any]:
    """Observations of stars of one to six rows, with nulls everywhere, and their primaries."""
    star = np.sort(rng.integers(0, max(n // 3, 1), n))
    ra, dec = 40 + star / 100 + rng.normal(0, 1e-5, n), rng.normal(0, 1e-5, n)
    same = rng.random(n) < 0.2
    ra, dec = np.where(same, 40.0, ra), np.where(same, 1.0, dec)  # equal cells: keys decide
    keys = rng.permutation(n) + 1
    columns: dict[str, Any] = {
        "_healpix_29": ang2pix(ra, dec),
        "obs_id": [f"obs{key}" for key in keys] if text_keys else keys,
        "ra": ra,
        "dec": dec,
    }
    base = {"teff": 5000.0, "logg": 3.0, "feh": -1.0, "rv": 30.0, "mg_fe": 0.2}
    for label, value in base.items():
        exact = rng.random(n) < 0.3
        values = value * np.where(exact, 1.0, rng.normal(1, 0.1, n))
        columns[label] = pa.array(values.astype("f4"), mask=rng.random(n) < 0.15)
        errors = np.abs(0.02 * value) * rng.choice([0.0, 1.0, 2.0], n, p=[0.1, 0.5, 0.4])
        columns[f"{label}_err"] = pa.array(errors.astype("f4"), mask=rng.random(n) < 0.3)
    snr = rng.integers(1, 6, n).astype("f4")
    columns["snr"] = pa.array(snr, mask=rng.random(n) < 0.2)
    columns["phot_g_mean_mag"] = pa.array(rng.random(n).astype("f4"), mask=rng.random(n) < 0.2)
    columns["position_epoch"] = pa.array(rng.random(n).astype("f4"), mask=rng.random(n) < 0.2)
    for name in ("pmra", "pmdec"):
        columns[name] = pa.array(rng.random(n), mask=rng.random(n) < 0.3)
    columns["gaia_dr3_source_id"] = pa.array(
        rng.integers(1, 9, n) + 2**61, mask=rng.random(n) < 0.4
    )
    columns["plan"] = pa.array([f"p{k}" for k in range(n)], mask=rng.random(n) < 0.3)
    columns["quality"] = rng.choice([0, 0, 1, 2, 3, 6], n)
    table = pa.table(columns).take(pa.array(rng.permutation(n)))
    star_of_key = {key: s for key, s in zip(columns["obs_id"], star, strict=True)}
    stars = np.array([star_of_key[key] for key in table["obs_id"].to_pylist()], dtype=int)
    leader = {s: rng.choice(np.flatnonzero(stars == s)) for s in np.unique(stars).tolist()}
    return table, np.array([leader[s] for s in stars.tolist()], dtype=np.int64)


def by_hand(rows: list[dict], leader: dict, chosen: DedupeSettings, expected: dict) -> dict:
    """One star by the stated rule; rows in the order of ``obs_id``."""
    good = [row for row in rows if row["quality"] == 0]
    used = good or rows
    best = max(used, key=lambda row: -math.inf if row["snr"] is None else row["snr"])
    star = {"n_obs": len(rows), "n_used": len(used), "star_id": leader["obs_id"]}
    star |= {name: best[name] for name in (*FLOATS, "plan")}
    for name in ("_healpix_29", "ra", "dec", "position_epoch"):
        star[name] = leader[name]
    for pair in (("pmra", "pmdec"), ("gaia_dr3_source_id",)):
        having = [r for r in [best, *rows] if all(r[name] is not None for name in pair)]
        star |= {name: (having or [best])[0][name] for name in pair}
    bits = [row["quality"] for row in rows]
    common, either = bits[0], 0
    for bit in bits:
        common, either = common & bit, either | bit
    star["quality"] = 0 if good else common or either
    star["flag_spread"] = False
    for label in LABELS:
        some = [row for row in used if row[label] is not None]
        values = [row[label] for row in some]
        stated = [r[f"{label}_err"] for r in some if (r[f"{label}_err"] or 0) > 0]
        rms = math.sqrt(math.fsum(e * e for e in stated) / len(stated)) if stated else None
        if label not in ("rv", "mg_fe"):
            spread = statistics.stdev(values) if len(values) > 1 else None
            star[f"{label}_spread"] = spread
            limit = expected.get(label) if rms is None else rms
            if spread is not None and limit is not None:
                star["flag_spread"] |= spread > chosen.max_spread * limit
        if chosen.method == "best-snr" or len(rows) == 1:
            continue
        if not values:
            value = error = None
        elif chosen.method == "median":
            value, error = statistics.median(values), None
            if rms is not None:
                factor = math.sqrt(math.pi / 2) if len(values) > 2 else 1.0
                error = factor * rms / math.sqrt(len(values))
        elif stated:
            weights = [(r[label], r[f"{label}_err"] ** -2) for r in some if r[f"{label}_err"]]
            total = math.fsum(w for _, w in weights)
            value, error = math.fsum(v * w for v, w in weights) / total, total**-0.5
        else:
            value, error = statistics.fmean(values), None
        star[label], star[f"{label}_err"] = value, error
    if chosen.method != "best-snr" and len(rows) > 1:
        snr = [row["snr"] for row in used if row["snr"] is not None]
        star["snr"] = math.sqrt(math.fsum(s * s for s in snr)) if snr else None
    return star


@THOROUGH
@given(seeds, st.integers(1, 60), st.sampled_from(METHODS), st.booleans(), st.booleans())
def test_combine_equals_one_by_one(seed, n, method, text_keys, errors_expected):
    rng = np.random.default_rng(seed)
    table, primary = observations(rng, n, text_keys)
    expected = {"teff": 300.0, "feh": 0.001} if errors_expected else {}
    spread = float(rng.choice([0.5, 2.0, 5.0]))
    chosen = DedupeSettings(method=method, max_spread=spread, labels=("mg_fe", "nobody"))
    rows = table.to_pylist()
    wanted = []
    for leader in np.unique(primary).tolist():
        members = [rows[k] for k in np.flatnonzero(primary == leader).tolist()]
        members.sort(key=lambda row: row["obs_id"])
        wanted.append(by_hand(members, rows[leader], chosen, expected))
    wanted.sort(key=lambda star: (star["_healpix_29"], star["star_id"]))
    found = combine(table, primary, chosen, expected)
    found.validate(full=True)
    for name in found.schema.names:
        got = found[name].to_pylist()
        want = [star[name] for star in wanted]
        if pa.types.is_floating(found.schema.field(name).type):
            assert [v is None for v in got] == [v is None for v in want], name
            assert [v or 0.0 for v in got] == pytest.approx(
                [v or 0.0 for v in want], rel=1e-6, abs=1e-6
            ), name
        else:
            assert got == want, name


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_for_any_order_of_rows(method):
    rng = np.random.default_rng(6)
    table, primary = observations(rng, 400)
    chosen = DedupeSettings(method=method)
    one = combine(table, primary, chosen, {})
    order = rng.permutation(400)
    place = np.argsort(order)
    other = combine(table.take(pa.array(order)), place[primary[order]], chosen, {})
    assert one.equals(other)
    # A part of the sky gives the same stars as the whole.
    part = np.isin(primary, np.unique(primary)[::3])
    row_of = np.cumsum(part) - 1
    some = combine(table.filter(pa.array(part)), row_of[primary[part]], chosen, {})
    keys = set(some["star_id"].to_pylist())
    mask = pa.array([key in keys for key in one["star_id"].to_pylist()])
    assert some.equals(one.filter(mask))
    # So do all rows when those of the other stars are left out.
    assert some.equals(combine(table, np.where(part, primary, -1), chosen, {}))
    # Rows of several chunks, as those of a partition and of its surroundings, are as good as one.
    for cut in (0, 1, 150, 399):
        chunks = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
        assert one.equals(combine(chunks, primary, chosen, {}))


def test_stars_observed_once_stay_as_they_are():
    rng = np.random.default_rng(9)
    table, _ = observations(rng, 50)
    table = table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])
    stars = combine(table, np.arange(50), DedupeSettings(), {})
    for name in table.schema.names:
        assert stars["star_id" if name == "obs_id" else name].equals(table[name])
    assert set(stars["n_obs"].to_pylist()) == set(stars["n_used"].to_pylist()) == {1}
    assert stars["teff_spread"].null_count == 50


def test_star_schema():
    table, primary = observations(np.random.default_rng(3), 30)
    index = table.schema.get_field_index("teff")
    field = table.schema.field("teff").with_metadata({"unit": "K"})
    table = table.set_column(index, field, table["teff"])
    stars = combine(table, primary, DedupeSettings(), {})
    rest = [c for c in table.schema.names if c not in ("_healpix_29", "obs_id", "ra", "dec")]
    assert stars.schema.names == [
        "_healpix_29", "star_id", "n_obs", "n_used", "ra", "dec",
        *(c for c in rest if c != "quality"),
        "teff_spread", "logg_spread", "feh_spread", "flag_spread", "quality",
    ]  # fmt: skip
    assert stars.schema.field("n_obs").type == stars.schema.field("n_used").type == pa.int32()
    assert stars.schema.field("teff_spread").type == stars.schema.field("teff").type == pa.float32()
    assert stars.schema.field("teff").metadata[b"unit"] == b"K"
    assert stars.schema.field("teff_spread").metadata[b"unit"] == b"K"
    nobody = combine(table.slice(0, 0), np.zeros(0, dtype=np.int64), DedupeSettings(), {})
    assert nobody.schema.equals(stars.schema, check_metadata=True)
    assert nobody.num_rows == 0
    assert combine(table, np.full(table.num_rows, -1), DedupeSettings(), {}).equals(nobody)


def test_a_star_whose_rows_fail_different_cuts_does_not_pass():
    table = pa.table({
        "_healpix_29": [5, 6], "obs_id": [1, 2], "ra": [1.0, 1.0], "dec": [0.0, 0.0],
        "teff": [5000.0, 5100.0], "quality": [1, 2],
    })  # fmt: skip
    stars = combine(table, np.array([0, 0]), DedupeSettings(), {"teff": 10.0})
    assert stars["quality"].to_pylist() == [3]
    assert stars["n_used"].to_pylist() == [2]
    assert stars["teff"].to_pylist() == [5050.0]
    assert stars["flag_spread"].to_pylist() == [True]  # 70.7 K > 5 * 10 K
    stars = combine(table, np.array([0, 0]), DedupeSettings(), {"teff": 15.0})
    assert stars["flag_spread"].to_pylist() == [False]
    stars = combine(table, np.array([0, 0]), DedupeSettings(), {})
    assert stars["flag_spread"].to_pylist() == [False]


def test_combine_refuses_what_does_not_belong_together():
    table, primary = observations(np.random.default_rng(3), 30)
    with pytest.raises(PartitionError, match="primaries do not belong"):
        combine(table, primary[:-1], DedupeSettings(), {})
    with pytest.raises(PartitionError, match="primaries do not belong"):
        combine(table, (np.arange(30) + 1) % 30, DedupeSettings(), {})
    with pytest.raises(ConfigError, match="no column 'quality'"):
        combine(table.drop(["quality"]), primary, DedupeSettings(), {})
