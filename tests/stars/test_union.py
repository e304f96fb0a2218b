"""Uniting surveys against a plain-Python version of the stated rules."""

import math
import pickle
import statistics
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError, PartitionError
from sos_dask.schema import CANONICAL
from sos_dask.sky.healpix import ang2pix
from sos_dask.stars.union import UnionSettings, unite

THOROUGH = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=200
)
LABELS = ("teff", "logg", "feh")
MEASURED = (*LABELS, "rv", "mg_fe")
METHODS = get_args(UnionSettings.model_fields["method"].annotation)
SURVEYS = ("apogee-dr17", "galah-dr4", "lamost-dr11-lrs")
Rng = np.random.Generator


def stars(rng: Rng, n: int) -> tuple[Any, Any]:
    """Stars of three surveys with nulls everywhere, and the primary of each."""
    star = rng.integers(0, max(n // 2, 1), n)
    ra, dec = star / 100.0, rng.normal(0, 1e-5, n)
    same = rng.random(n) < 0.2
    ra, dec = np.where(same, 40.0, ra), np.where(same, 1.0, dec)  # equal cells: keys decide
    columns: dict[str, Any] = {
        "_healpix_29": ang2pix(ra, dec),
        "star_id": [f"s{k}" for k in rng.permutation(n)],
        "n_obs": rng.integers(1, 5, n),
        "ra": ra,
        "dec": dec,
        "survey": rng.choice(SURVEYS, n),
    }
    base = {"teff": 5000.0, "logg": 3.0, "feh": -1.0, "rv": 30.0, "mg_fe": 0.2}
    for label, value in base.items():
        values = value * rng.normal(1, 0.05, n)
        columns[label] = pa.array(values.astype("f4"), mask=rng.random(n) < 0.2)
        errors = np.abs(0.02 * value) * rng.choice([0.0, 1.0, 2.0], n, p=[0.1, 0.5, 0.4])
        columns[f"{label}_err"] = pa.array(errors.astype("f4"), mask=rng.random(n) < 0.3)
    for name in ("snr", "position_epoch", "phot_g_mean_mag", "parallax"):
        columns[name] = pa.array(rng.random(n).astype("f4"), mask=rng.random(n) < 0.3)
    for name in ("pmra", "pmdec"):
        columns[name] = pa.array(rng.random(n), mask=rng.random(n) < 0.3)
    for name in ("gaia_dr2_source_id", "gaia_dr3_source_id"):
        ids = rng.integers(1, 99, n) + 2**61
        columns[name] = pa.array(ids, mask=rng.random(n) < 0.4)
    columns["flag_spread"] = pa.array(rng.random(n) < 0.2, mask=rng.random(n) < 0.05)
    columns["extra"] = rng.random(n)
    columns["quality"] = rng.choice([0, 0, 1, 2], n)
    leader = {s: rng.choice(np.flatnonzero(star == s)) for s in np.unique(star).tolist()}
    return pa.table(columns), np.array([leader[s] for s in star.tolist()], dtype=np.int64)


def by_hand(members: list[dict], leader: dict, chosen: UnionSettings) -> dict:
    """One star by the stated rule; members in the order of precedence."""
    for member in members:
        shift = chosen.known_offsets.get(member["survey"], {})
        for label in MEASURED:
            if member[label] is not None:
                member[label] -= shift.get(label, 0.0)
        has = [member[label] is not None for label in LABELS]
        member["usable"] = member["quality"] == 0 and any(has)
        member["level"] = 3 - any(has) - member["usable"]
        member["level"] -= member["usable"] and all(has) and not member["flag_spread"]
    best = min(members, key=lambda member: member["level"])
    star = {name: leader[name] for name in ("_healpix_29", "ra", "dec", "position_epoch")}
    star["star_id"] = f"{leader['survey']}:{leader['star_id']}"
    for names in (
        ("gaia_dr2_source_id",),
        ("gaia_dr3_source_id",),
        ("pmra", "pmdec"),
        ("phot_g_mean_mag",),
        ("parallax",),
    ):
        having = [m for m in members if all(m[name] is not None for name in names)]
        star |= {name: (having or members)[0][name] for name in names}
    usable = [member for member in members if member["usable"]]
    good = [member for member in members if member["quality"] == 0]
    weighted = chosen.method == "weighted-mean"
    mean = weighted and bool(usable)
    givers = [best] if best["level"] < 3 and not mean else []
    star |= {"snr": best["snr"], "quality": best["quality"], "flag_spread": False}
    for label in MEASURED:
        those = usable if label in LABELS else good
        some = [(m[label], m[f"{label}_err"] or 0.0, m) for m in those if m[label] is not None]
        stated = [entry for entry in some if entry[1] > 0]
        if (mean if label in LABELS else weighted) and some:
            used = stated or some
            weights = [e**-2 for _, e, _ in stated] or [1.0] * len(used)
            star[label] = math.fsum(
                v * w for (v, _, _), w in zip(used, weights, strict=True)
            ) / math.fsum(weights)
            star[f"{label}_err"] = math.fsum(weights) ** -0.5 if stated else None
            if label in LABELS:
                givers += [m for _, _, m in used]
        else:
            source = best
            if label not in LABELS and best[label] is None:
                source = next((m for m in members if m[label] is not None), best)
            empty = mean and label in LABELS
            star[label] = None if empty else source[label]
            star[f"{label}_err"] = None if empty else source[f"{label}_err"]
        if label in LABELS and len(some) > 1:
            error = chosen.expected_error.get(label)
            if stated:
                error = math.sqrt(math.fsum(e * e for _, e, _ in stated) / len(stated))
            if error is not None:
                spread = statistics.stdev([v for v, _, _ in some])
                star["flag_spread"] |= spread > chosen.max_spread * error
    star["flag_spread"] |= any(bool(m["flag_spread"]) for m in givers)
    who = [m["survey"] for m in members if any(m is giver for giver in givers)]
    star["survey"] = "+".join(dict.fromkeys(who)) or None
    star["sources"] = ";".join(f"{m['survey']}:{m['star_id']}" for m in members)
    star["n_surveys"] = len({m["survey"] for m in members})
    return star


def assert_equal(found: Any, wanted: list[dict]) -> None:
    found.validate(full=True)
    for name in found.schema.names:
        got, want = found[name].to_pylist(), [star[name] for star in wanted]
        if pa.types.is_floating(found.schema.field(name).type):
            assert [v is None for v in got] == [v is None for v in want], name
            zeros = [[v or 0.0 for v in values] for values in (got, want)]
            assert zeros[0] == pytest.approx(zeros[1], rel=1e-6, abs=1e-6), name
        else:
            assert got == want, name


@THOROUGH
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
    st.sampled_from(METHODS),
    st.sampled_from([(), SURVEYS, SURVEYS[::-1], ("galah-dr4",), ("other", "lamost-dr11-lrs")]),
    st.booleans(),
)
def test_equals_one_by_one(seed, n, method, order, more):
    rng = np.random.default_rng(seed)
    table, primary = stars(rng, n)
    chosen = UnionSettings(
        method=method,
        order=order,
        labels=("mg_fe",),
        offsets={"galah-dr4": {"teff": 100.0, "rv": -3.0}, "nobody": {"feh": 1.0}} if more else {},
        max_spread=float(rng.choice([0.5, 2.0, 5.0])),
        expected_error={"teff": 50.0, "feh": 0.001} if more else {},
    )
    place = {name: k for k, name in enumerate(order)}
    wanted = []
    for leader in np.unique(primary).tolist():
        rows = table.to_pylist()
        members = [rows[k] for k in np.flatnonzero(primary == leader).tolist()]
        members.sort(key=lambda m: (place.get(m["survey"], 99), m["survey"], m["star_id"]))
        wanted.append(by_hand(members, rows[leader], chosen))
    wanted.sort(key=lambda star: (star["_healpix_29"], star["star_id"]))
    assert_equal(unite(table, primary, chosen), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_for_any_order_of_rows(method):
    rng = np.random.default_rng(6)
    table, primary = stars(rng, 300)
    chosen = UnionSettings(method=method, order=SURVEYS)
    one = unite(table, primary, chosen)
    order = rng.permutation(300)
    place = np.argsort(order)
    assert one.equals(unite(table.take(pa.array(order)), place[primary[order]], chosen))


def test_schema():
    table, primary = stars(np.random.default_rng(3), 30)
    index = table.schema.get_field_index("teff")
    table = table.set_column(index, CANONICAL["teff"].arrow(), table["teff"])
    found = unite(table, primary, UnionSettings())
    canonical = [name for name in CANONICAL if name in table.schema.names]
    assert found.schema.names == [
        "_healpix_29", "star_id", *canonical,
        "survey", "sources", "n_surveys", "flag_spread", "quality",
    ]  # fmt: skip
    assert found.schema.field("teff").equals(CANONICAL["teff"].arrow(), check_metadata=True)
    assert found.schema.field("n_surveys").type == pa.int32()
    nobody = unite(table.slice(0, 0), np.zeros(0, dtype=np.int64), UnionSettings())
    assert nobody.schema.equals(found.schema, check_metadata=True)
    assert nobody.num_rows == 0


def two(**columns: Any) -> Any:
    """A star that APOGEE and GALAH observed, with the given columns of each."""
    base = {
        "_healpix_29": [5, 6], "survey": ["galah-dr4", "apogee-dr17"], "star_id": ["1", "2"],
        "ra": [1.0, 1.1], "dec": [0.0, 0.1], "quality": [0, 0],
        "teff": [5000.0, 5200.0], "logg": [3.0, 3.0], "feh": [0.0, 0.0],
    }  # fmt: skip
    return pa.table(base | columns)


ORDER = ("apogee-dr17", "galah-dr4")


@pytest.mark.parametrize(
    ("columns", "survey", "quality"),
    [
        ({}, "apogee-dr17", 0),
        ({"quality": [0, 4]}, "galah-dr4", 0),
        ({"flag_spread": [False, True]}, "galah-dr4", 0),
        ({"logg": [3.0, None]}, "galah-dr4", 0),
        ({"logg": [3.0, None], "quality": [1, 0]}, "apogee-dr17", 0),
        ({"quality": [1, 4]}, "apogee-dr17", 4),
        ({"quality": [1, 4], **{k: pa.array([1.0, None]) for k in LABELS}}, "galah-dr4", 1),
        ({k: pa.array([None, None], pa.float64()) for k in LABELS}, None, 0),
    ],
)
def test_who_gives_the_labels(columns, survey, quality):
    found = unite(two(**columns), np.array([0, 0]), UnionSettings(order=ORDER)).to_pylist()[0]
    assert (found["survey"], found["quality"]) == (survey, quality)
    if survey and not columns:
        assert (found["teff"], found["star_id"], found["ra"]) == (5200.0, "galah-dr4:1", 1.0)
        assert found["sources"] == "apogee-dr17:2;galah-dr4:1"


def test_weighted_mean_offsets_and_disagreement():
    table = two(teff_err=[30.0, 40.0])
    chosen = UnionSettings(method="weighted-mean", order=ORDER, max_spread=3.0)
    star = unite(table, np.array([1, 1]), chosen).to_pylist()[0]
    assert star["teff"] == pytest.approx((5000 / 900 + 5200 / 1600) / (1 / 900 + 1 / 1600))
    assert star["teff_err"] == pytest.approx(24.0)
    assert (star["survey"], star["star_id"]) == ("apogee-dr17+galah-dr4", "apogee-dr17:2")
    assert star["flag_spread"] is True  # 200 K with an error of 50 K
    offsets = {"apogee-dr17": {"teff": 60.0}}
    star = unite(
        table,
        np.array([1, 1]),
        UnionSettings(method="weighted-mean", order=ORDER, offsets=offsets, max_spread=3.0),
    ).to_pylist()[0]
    assert star["teff"] == pytest.approx((5000 / 900 + 5140 / 1600) / (1 / 900 + 1 / 1600))
    assert star["flag_spread"] is False


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "median"},
        {"order": ("a", "a")},
        {"max_spread": 0.0},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError):
        UnionSettings(**wrong)


def test_wrong_input():
    with pytest.raises(PartitionError, match="primaries do not belong"):
        unite(two(), np.array([1, 0]), UnionSettings())
    with pytest.raises(ConfigError, match="no column 'survey'"):
        unite(two().drop(["survey"]), np.array([0, 0]), UnionSettings())


def test_settings_cross_processes():
    chosen = UnionSettings(
        method="weighted-mean", order=ORDER, offsets={"galah-dr4": {"teff": 1.0}}
    )
    assert pickle.loads(pickle.dumps(chosen)) == chosen
