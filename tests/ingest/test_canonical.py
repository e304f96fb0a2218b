import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import SurveyError
from sos_dask.ingest.canonical import Profile, check_profile, label_bins, plan_chunks, read_chunk
from sos_dask.ingest.keys import conflicting_keys, merge_rows
from sos_dask.ingest.reader import open_source
from sos_dask.sky.healpix import ang2pix
from sos_dask.surveys.definition import Survey, load_survey, parse_survey
from tests.survey_files import NAMES, fails, ipc_bytes, read, rows, survey, write_csv, write_fits


@pytest.mark.parametrize("kind", ["fits", "fits.gz", "csv", "csv.gz", "parquet", "vot", "vot.gz"])
def test_formats_give_the_same_rows(tmp_path, kind):
    data = rows(300)
    data["ra"] = data["ra"].round(6)
    path = tmp_path / f"any.{kind.removesuffix('.gz')}"
    if kind.startswith("fits"):
        write_fits(path, data)
    elif kind.startswith("csv"):
        write_csv(path, data)
    elif kind == "parquet":
        pq.write_table(pa.table(data), path, row_group_size=50)
    else:
        Table(data).write(path, format="votable")
    if kind.endswith(".gz"):
        packed = tmp_path / "no-suffix"  # told by content
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    out = read(path, survey(), chunk_rows=120, batch_rows=70)
    assert out.rejected.num_rows == 0
    for name, native in (("obs_id", "obsid"), *((n, n) for n in NAMES[1:])):
        assert out.column(name) == data[native].tolist(), name
    assert out.column("_row") == list(range(300))
    definition = survey()
    assert out.rows.schema.names == [*definition.arrow_schema().names, "_file", "_row"]
    assert out.rows.schema.field("teff").metadata == {
        b"unit": b"K",
        b"ucd": b"phys.temperature.effective",
        b"description": b"Effective temperature",
    }
    assert out.rows.select(definition.arrow_schema().names).schema == definition.arrow_schema()


def test_rows_are_sorted_and_on_their_cells(tmp_path):
    data = rows(500)
    data["ra"][:], data["dec"][:] = np.repeat(data["ra"][:100], 5), np.repeat(data["dec"][:100], 5)
    for number, batch in enumerate(read(write_fits(tmp_path / "a", data), survey()).batches):
        keys = list(
            zip(
                batch.rows["_healpix_29"].to_pylist(), batch.rows["obs_id"].to_pylist(), strict=True
            )
        )
        assert keys == sorted(keys)
        cells = ang2pix(batch.rows["ra"].to_numpy(), batch.rows["dec"].to_numpy())
        assert batch.rows["_healpix_29"].to_pylist() == cells.tolist()
        assert number == 0


@pytest.mark.parametrize(
    "ids", [np.arange(9), np.array([2**62, -(2**62), 0] * 3), list("zéa🂡bABCD")]
)
def test_ties_in_position_are_ordered_by_id(tmp_path, ids):
    data = {name: np.full(9, 10.0) for name in NAMES} | {"obsid": np.array(ids)}
    dtype = "int64"
    if isinstance(ids, list):
        data["obsid"], dtype = pa.array(ids), "string"
    data["teff"] = np.full(9, 5000.0)
    data["logg"] = data["feh"] = np.zeros(9)
    order = np.random.default_rng(1).permutation(9)
    table = pa.table(data).take(pa.array(order))
    pq.write_table(table, tmp_path / "t")
    out = read(tmp_path / "t", survey({"obs_id": {"source": "obsid", "dtype": dtype}}))
    keys = out.rows["obs_id"].to_pylist()
    assert keys == sorted(keys, key=lambda key: key.encode() if isinstance(key, str) else key)


def test_file_and_row_numbers(tmp_path):
    out = read(write_fits(tmp_path / "a", rows(10)), survey(), chunk_rows=3, index=7)
    assert out.rows["_file"].type == pa.int32()
    assert set(out.rows["_file"].to_pylist()) == {7}
    assert out.column("_row") == list(range(10))
    assert len(out.batches) == 4


def test_missing_values_become_null_and_are_counted(tmp_path):
    data = rows(8)
    data["teff"][:5] = [-9999, np.nan, np.inf, 99.5, 999.0]
    data["feh"][:3] = [9.75, 2.0, 2.1]
    definition = survey({"teff": {"source": "teff", "missing": [99.5]}})
    out = read(write_fits(tmp_path / "a", data), definition)
    teff = out.column("teff")
    assert teff[:5] == [None] * 5
    assert None not in teff[5:]
    assert out.profile.nulls["teff"] == 5
    assert out.profile.impossible == {"feh": 2, "teff": 1}
    assert out.profile.first_impossible == {"feh": (0, 0, "9.75"), "teff": (0, 4, "999")}
    assert out.column("feh")[1] == 2.0
    # Nulls are as 0 in memory, never the sentinel.
    chunk = out.rows["teff"].chunk(0)
    assert -9999.0 not in np.frombuffer(chunk.buffers()[1], np.float32).tolist()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_sentinels_compare_in_the_type_of_the_column(tmp_path, dtype):
    data = rows(3)
    data["rv"] = np.array([-999.99, -999.98, 12.5], dtype=dtype)
    widened = rows(3) | {"rv": np.array([-999.99, -999.98, 12.5], "f4").astype("f8")}
    definition = survey({"rv": {"source": "rv"}}, missing=[-999.99])
    for number, table in enumerate((data, widened)):
        values = read(write_fits(tmp_path / str(number), table), definition).column("rv")
        assert values[0] is None
        assert values[1:] == [pytest.approx(-999.98), 12.5]


def test_a_sentinel_beyond_the_limits_is_no_impossible_value(tmp_path):
    data = rows(3)
    data["feh"][:2] = [-9999.99, -99.0]
    out = read(write_fits(tmp_path / "a", data), survey(missing=[-9999.99]))
    assert out.column("feh")[:2] == [None, None]
    assert out.profile.impossible == {"feh": 1}
    assert out.profile.first_impossible["feh"] == (0, 1, "-99")


def test_minus_zero_is_zero(tmp_path):
    data = rows(2) | {"ra": np.array([-0.0, 0.0]), "feh": np.array([-0.0, 0.0], "f4")}
    out = read(write_fits(tmp_path / "a", data), survey())
    for name in ("ra", "feh"):
        assert not np.signbit(out.rows[name].to_numpy()).any()


def test_ids_that_are_not_positive_are_null(tmp_path):
    ids = np.array([0, -1, -9999, 2594341150806513152, 5], dtype=np.int64)
    definition = survey({"gaia_dr3_source_id": {"source": "gaia"}})
    out = read(write_fits(tmp_path / "a", rows(5) | {"gaia": ids}), definition)
    assert out.column("gaia_dr3_source_id") == [None, None, None, 2594341150806513152, 5]


@pytest.mark.parametrize("kind", ["fits", "csv", "parquet"])
def test_ids_as_text(tmp_path, kind):
    ids = ["2594341150806513152", "", "0", "-9999", " 17 ", "null"]
    data = rows(6) | {"gaia": np.array(ids)}
    path = tmp_path / "a"
    write = {
        "fits": lambda: write_fits(path, data),
        "csv": lambda: write_csv(path, data),
        "parquet": lambda: pq.write_table(pa.table(data | {"gaia": pa.array(ids)}), path),
    }
    write[kind]()
    out = read(path, survey({"gaia_dr3_source_id": {"source": "gaia"}}))
    expected = [2594341150806513152, None, None, None, 17, None]
    assert out.column("gaia_dr3_source_id") == expected


def test_positions_are_wrapped_or_rejected(tmp_path):
    ra = [-180.0, -1e-20, 360.0, 359.9, -180.1, 360.1, 10, 10, np.nan, 10, -9999, 10]
    dec = [0.0, 0, 0, 0, 0, 0, 90, -90, 0, 90.1, 0, np.inf]
    data = rows(12) | {"ra": np.array(ra), "dec": np.array(dec)}
    data["obsid"][0] = 1000
    data["obsid"][7] = -9999
    out = read(write_fits(tmp_path / "stars", data), survey())
    assert out.column("ra") == [180.0, 0.0, 0.0, 359.9, 10.0]
    assert out.column("_row") == [0, 1, 2, 3, 6]
    assert out.rejected.to_pydict() == {
        "file": ["stars"] * 7,
        "row": [4, 5, 7, 8, 9, 10, 11],
        "reason": [
            "ra out of range",
            "ra out of range",
            "null obs_id",
            "null position",
            "dec out of range",
            "null position",
            "null position",
        ],
        "obs_id": [None if i == 7 else str(data["obsid"][i]) for i in (4, 5, 7, 8, 9, 10, 11)],
        "ra": [-180.1, 360.1, 10.0, None, 10.0, None, 10.0],
        "dec": [0.0, 0.0, -90.0, 0.0, 90.1, 0.0, None],
    }
    assert out.profile.n_rows == 12
    assert out.profile.rejected == {
        "dec out of range": 1,
        "null obs_id": 1,
        "null position": 3,
        "ra out of range": 2,
    }
    assert out.profile.first_rejected[:2] == (0, 4)


def test_units_are_converted(tmp_path):
    data = rows(4)
    hours = data["ra"] / 15
    data |= {"ra": hours, "rv": np.array([1.5, -2, np.nan, -9999])}
    definition = survey(
        {"ra": {"source": "ra", "unit": "hourangle"}, "rv": {"source": "rv", "unit": "m/s"}}
    )
    out = read(write_fits(tmp_path / "a", data, {"ra": "hourangle"}), definition)
    assert out.column("ra") == pytest.approx((hours * 15).tolist(), rel=1e-15)
    assert out.column("rv") == [pytest.approx(0.0015), pytest.approx(-0.002), None, None]


def test_the_epoch_is_a_column_or_one_value(tmp_path):
    path = write_fits(tmp_path / "a", rows(2) | {"epoch": np.array([2015.5, 2016.0])})
    assert read(path, survey()).column("position_epoch") == [2000.0, 2000.0]
    of_file = survey({"position_epoch": {"source": "epoch"}})
    assert read(path, of_file).column("position_epoch") == [2015.5, 2016.0]
    columns = {"obs_id": {"source": "obsid"}} | {name: {"source": name} for name in NAMES[1:]}
    unknown = parse_survey({"format": 1, "name": "mock", "title": "Mock", "columns": columns})
    assert "position_epoch" not in read(path, unknown).rows.column_names


def test_joined_keys(tmp_path):
    table = {
        "field": pa.array(["M67", None, "", "M67"]),
        "fibre": pa.array([7, 8, None, None], pa.int16()),
        "snr": pa.array([12.5, 30.0, float("nan"), None]),
    }
    pq.write_table(pa.table(rows(4) | table), tmp_path / "a")
    definition = survey({"obs_id": {"join": ["field", "fibre", "snr"], "dtype": "string"}})
    out = read(tmp_path / "a", definition)
    assert out.column("obs_id") == ["M67.7.12.5", ".8.30", "M67.."]
    assert out.rejected["reason"].to_pylist() == ["null obs_id"]


def test_the_first_source_in_the_file_is_used_whatever_its_case(tmp_path):
    data = rows(3) | {"SNRG": np.array([1.0, 2, 3]), "snrr": np.array([4.0, 5, 6])}
    definition = survey({"snr": {"source": ["snr_px", "snrg", "snrr"]}})
    assert read(write_fits(tmp_path / "a", data), definition).column("snr") == [1.0, 2.0, 3.0]


def test_cuts_on_native_and_canonical_columns(tmp_path):
    data = rows(6)
    data["teff"][:3] = [-9999, 500, 5000]
    data |= {
        "flag": np.array([0, 1 << 40, 0, 0, 0, 0]),
        "class": np.array(["STAR", "STAR", "STAR", "QSO", "", "STAR"]),
    }
    cuts = {
        "teff": {"bit": 0, "column": "teff", "min": 0},  # 500 K is impossible: null, though above
        "flag": {"bit": 1, "column": "FLAG", "bits_unset": [40]},
        "class": {"bit": 2, "column": "class", "values": ["STAR"]},
        "snr": {"bit": 3, "column": "snr", "min": 10},
        "gone": {"bit": 4, "column": "gone", "min": 0, "optional": True},
    }
    columns = {"snr": {"source": "sn", "unit": ""}}
    data["sn"] = np.array([50.0, 50, 50, 50, 50, 5])
    expected = [1, 1 | 2, 0, 4, 4, 8]
    out = read(write_fits(tmp_path / "a", data), survey(columns, cuts=cuts))
    assert out.column("quality") == expected
    data["flag"] = [f"{value}.0" for value in data["flag"]]  # as pandas writes integers with gaps
    out = read(write_csv(tmp_path / "b", data), survey(columns, cuts=cuts))
    assert out.column("quality") == expected
    error = fails(
        write_fits(tmp_path / "c", rows(2)),
        survey(cuts={"snr": {"bit": 0, "column": "teffx", "min": 1}}),
        "no column 'teffx', which cut 'snr' needs",
    )
    assert "teff" in error.hint


def test_each_cut_has_its_bit(tmp_path):
    data = rows(2) | {"x": np.array([-1.0, 1.0]), "y": np.array([1, 1])}
    cuts = {
        "a": {"bit": 0, "column": "x", "min": 0},
        "b": {"bit": 62, "column": "y", "bits_unset": [0]},
        "c": {"bit": 5, "column": "gone", "min": 0, "optional": True},
    }
    out = read(write_fits(tmp_path / "a", data), survey(cuts=cuts))
    assert out.column("quality") == [1 | 1 << 62, 1 << 62]


def test_without_cuts_all_rows_pass(tmp_path):
    assert read(write_fits(tmp_path / "a", rows(4)), survey()).column("quality") == [0] * 4


@pytest.mark.parametrize(
    ("file", "name", "n_rows", "n_stars", "n_good"),
    [
        ("lamost_dr3_giants.csv", "lamost-dr3-giants", 27125, 21960, None),
        ("apogee_dr17.csv", "apogee-dr17-subset", 56664, None, None),
        ("galah_dr4.csv", "galah-dr4-subset", 2018, None, None),
        ("galah_dr3_m67.csv", "galah-dr3-m67", 813, 813, None),
        ("lamost_pilot_native_columns.csv", "lamost-pilot", 3165, 3165, 1380),
        ("apogee_dr12_allstar_hipparcos.fits.gz", "apogee-dr12-hipparcos", 3244, 3244, None),
    ],
)
def test_real_files(real_data, tmp_path, file, name, n_rows, n_stars, n_good):
    definition = load_survey(name)
    source = open_source(real_data / file, definition, 0, tmp_path)
    batches = [
        batch for chunk in plan_chunks(source, 1000) for batch in read_chunk(chunk, definition, 900)
    ]
    profile = Profile.merge([batch.profile for batch in batches])
    assert profile.n_rows == n_rows
    check_profile(profile, definition, [file])
    tables = [batch.rows for batch in batches]
    assert len(conflicting_keys(tables, [batch.keys for batch in batches])) == 0
    merged = merge_rows(tables, [file])
    n_rejected = sum(batch.rejected.num_rows for batch in batches) + merged.rejected.num_rows
    assert merged.rows.num_rows + merged.n_duplicates + n_rejected == n_rows
    if n_stars is not None:
        assert merged.rows.num_rows == n_stars
    if n_good is not None:
        assert np.count_nonzero(merged.rows["quality"].to_numpy() == 0) == n_good
    whole = [batch for chunk in plan_chunks(source) for batch in read_chunk(chunk, definition)]
    assert ipc_bytes(merge_rows([b.rows for b in whole], [file]).rows) == ipc_bytes(merged.rows)


def test_real_lamost_duplicates(real_data, tmp_path):
    definition = load_survey("lamost-dr3-giants")
    out = read_real(real_data / "lamost_dr3_giants.csv", definition, tmp_path)
    assert merge_rows([out], ["a"]).n_duplicates == 5165


def read_real(path: Path, definition: Survey, scratch: Path) -> pa.Table:
    source = open_source(path, definition, 0, scratch)
    batches = read_chunk(plan_chunks(source)[0], definition)
    return pa.concat_tables([batch.rows for batch in batches])


def test_real_fits_as_astropy_reads_it(real_data, tmp_path):
    path = real_data / "apogee_dr12_allstar_hipparcos.fits.gz"
    table = read_real(path, load_survey("apogee-dr12-hipparcos"), tmp_path)
    table = table.sort_by("_row")
    with fits.open(path) as hdus:
        native = hdus[1].data
        assert table["obs_id"].to_pylist() == [s.strip() for s in native["APSTAR_ID"]]
        assert table["ra"].to_pylist() == native["RA"].tolist()
        for name, values in (
            ("teff", native["TEFF"]),
            ("feh", native["FE_H"]),
            ("m_h", native["PARAM"][:, 3]),
        ):
            known = table[name].is_valid().to_numpy()
            bad = (values < -9998) | ~np.isfinite(values)
            assert (known == ~bad).all()
            assert table[name].to_numpy()[known].tolist() == values[known].tolist()
        labels = ("teff", "logg", "feh")
        valid = np.all([table[name].is_valid().to_numpy() for name in labels], axis=0)
        assert np.count_nonzero(valid) == 771
        star_bad = (native["ASPCAPFLAG"] & (1 << 23)) != 0
        assert ((table["quality"].to_numpy() & 1) != 0).tolist() == star_bad.tolist()


def profile_of(tmp_path, data: dict, definition: Survey | None = None, **kwargs):
    return read(write_fits(tmp_path / "data", data), definition or survey(), **kwargs).profile


def test_profiles_do_not_depend_on_chunks_and_survive_json(tmp_path):
    data = rows(200)
    data["teff"][::7] = 3.7
    data["ra"][::50] = 400
    whole = profile_of(tmp_path, data)
    parts = read(tmp_path / "data", survey(), chunk_rows=60, batch_rows=17).batches
    profiles = [batch.profile for batch in parts]
    for order in (profiles, profiles[::-1], [Profile(), *profiles]):
        assert Profile.merge(order) == whole
    for profile in (whole, Profile()):
        assert Profile(**json.loads(json.dumps(profile.model_dump()))) == profile
    assert Profile() == Profile.merge([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2e5, 2e5, width=32), min_size=1))
def test_medians(values):
    median = Profile(labels={"feh": label_bins(np.array(values))}).median("feh")
    expected = float(np.sort(np.array(values, np.float32))[(len(values) - 1) // 2])
    assert median == pytest.approx(expected, rel=0.05, abs=1e-37)


def test_a_median_is_the_middle_of_its_bin():
    """Bins keep four bits of the fraction: from 1 to 1 + 1/16, from 4 to 4 + 1/4."""
    for value, middle in ((1.0, 1 + 1 / 32), (1.06, 1 + 1 / 32), (4.2, 4.125), (-4.2, -4.125)):
        assert Profile(labels={"feh": label_bins(np.full(3, value))}).median("feh") == middle


def test_a_good_file_passes(tmp_path):
    profile = profile_of(tmp_path, rows(200))
    check_profile(profile, survey(), ["data"])
    assert profile.median("teff") == pytest.approx(np.median(rows(200)["teff"]), rel=0.04)


def refused(profile: Profile, *words: str, definition: Survey | None = None) -> None:
    with pytest.raises(SurveyError) as caught:
        check_profile(profile, definition or survey(), ["a/data.fits", "b/data.fits"])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_logarithm_of_temperature_is_refused(tmp_path):
    data = rows(100)
    data["teff"] = np.log10(data["teff"])
    data["teff"][:60] = -9999
    profile = profile_of(tmp_path, data)
    refused(
        profile, "a/data.fits", "'teff'", "looks like log10 of a temperature: its median is 3.6"
    )


def test_other_units_are_noticed_by_the_values(tmp_path):
    data = rows(100)
    data["teff"] /= 1000
    data["teff"][0] = 5.0
    refused(profile_of(tmp_path, data), "'teff'", "100 of 100", "1000 to 100000 K", "row 0")
    data = rows(100)
    data["logg"] += 20
    data["logg"][:3] = 4
    refused(profile_of(tmp_path, data, index=1), "b/data.fits", "97 of 100", "-2 to 10", "in row 3")
    data = rows(100)
    data["feh"] = 10 ** data["feh"] * 1e3
    refused(profile_of(tmp_path, data), "column 'feh' ('feh')", "[columns.feh]")


def test_velocities_in_another_unit_are_noticed_by_the_values(tmp_path):
    """A file that states no unit; a release without any velocity is right."""
    columns = {"rv": {"source": "rv"}}
    data = rows(100) | {"rv": np.linspace(-30_000, 90_000, 100)}
    profile = read(write_fits(tmp_path / "a", data), survey(columns)).profile
    with pytest.raises(SurveyError, match=r"'rv'.* are not within -2000 to 2000 km/s"):
        check_profile(profile, survey(columns), ["a"])
    data["rv"][:] = -9999
    profile = read(write_fits(tmp_path / "b", data), survey(columns)).profile
    check_profile(profile, survey(columns), ["b"])


@pytest.mark.parametrize(("n", "damaged"), [(20, True), (19, False)])
def test_ids_that_lost_digits_are_refused(n, damaged):
    """As floats hold them; one that no float above 2**61 can hold clears all others."""
    name = "gaia_dr3_source_id"
    whole = Profile(n_rows=n, labels={name: {0: n}})
    if damaged:
        with pytest.raises(SurveyError, match=rf"all {n} ids of '{name}' above 2\*\*61"):
            check_profile(whole, survey(), ["a"])
    else:
        check_profile(whole, survey(), ["a"])
    other = Profile(n_rows=1, labels={name: {1: 1}})
    check_profile(Profile.merge([whole, other]), survey(), ["a"])


def test_a_label_without_values_is_refused(tmp_path):
    data = rows(100)
    data["feh"][:] = -9999
    refused(profile_of(tmp_path, data), "column 'feh'", "no value in any row", "[columns.feh]")
    data["feh"][7] = 0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])


def test_right_ascension_in_hours_is_refused(tmp_path):
    data = rows(100)
    data["ra"] /= 15
    profile = profile_of(tmp_path, data)
    refused(profile, "column 'ra'", "hours", 'unit = "hourangle"', 'allow = ["ra_below_24"]')
    check_profile(profile, survey(allow=["ra_below_24"]), ["data"])
    small = {name: array[:49] for name, array in data.items()}
    check_profile(profile_of(tmp_path, small), survey(), ["data"])
    strip = data | {"dec": data["dec"] / 18}
    check_profile(profile_of(tmp_path, strip), survey(), ["data"])


def test_positions_in_radians_are_refused(tmp_path):
    data = rows(100)
    data |= {name: np.radians(data[name]) for name in ("ra", "dec")}
    profile = profile_of(tmp_path, data)
    refused(profile, "column 'ra'", "radians", 'unit = "rad"', 'allow = ["ra_below_24"]')
    check_profile(profile, survey(allow=["ra_below_24"]), ["data"])
    field = data | {"ra": data["ra"] / 2}
    check_profile(profile_of(tmp_path, field), survey(), ["data"])
    strip = data | {"dec": data["dec"] / 4}
    check_profile(profile_of(tmp_path, strip), survey(), ["data"])


def test_many_rejected_rows_are_refused(tmp_path):
    data = rows(1000)
    data["dec"][100:110] = -99.0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])
    data["ra"][50] = np.nan
    profile = profile_of(tmp_path, data)
    words = [
        "11 of 1000",
        "10 dec out of range",
        "1 null position",
        "a/data.fits row 50",
        "ra null",
    ]
    refused(profile, *words, "max_rejected_fraction")
    check_profile(profile, survey(max_rejected_fraction=0.02), ["data"])
    few = {name: array[50:51] for name, array in data.items()}
    refused(profile_of(tmp_path, few), "1 of 1 rows")


POSITIONS = {
    "radians": ((0.0, 6.2831), (-1.5, 1.5707)),
    "hours": ((0.0, 24.0), (-10.0, 10.1)),
}


@pytest.mark.parametrize(
    ("unit", "ra", "dec", "n_rows"),
    [
        ("radians", None, None, 50),
        ("radians", (2.2, 6.21), (-0.6, 0.41), 50),
        ("hours", None, None, 50),
        ("hours", (0.0, 12.01), None, 50),
        ("", *POSITIONS["radians"], 49),
        ("", (0.0, 6.2833), POSITIONS["radians"][1], 50),
        ("", (-0.01, 6.2), POSITIONS["radians"][1], 50),
        ("", POSITIONS["radians"][0], (-1.5, 1.5709), 50),
        ("", POSITIONS["radians"][0], (-1.5709, 1.5), 50),
        ("", (2.2, 6.2), POSITIONS["radians"][1], 50),
        ("", POSITIONS["radians"][0], (0.0, 1.0), 50),
        ("", (0.0, 24.01), POSITIONS["hours"][1], 50),
        ("", (-0.01, 24.0), POSITIONS["hours"][1], 50),
        ("", (0.0, 12.0), POSITIONS["hours"][1], 50),
        ("", POSITIONS["hours"][0], (-10.0, 10.0), 50),
    ],
)
def test_which_positions_look_like_another_unit(unit, ra, dec, n_rows):
    ra, dec = ra or POSITIONS[unit][0], dec or POSITIONS[unit][1]
    lowest, highest = ({"dec": dec[i], "ra": ra[i]} for i in (0, 1))
    profile = Profile(n_rows=n_rows, lowest=lowest, highest=highest)
    if unit:
        refused(profile, f"it looks like {unit}, not degrees")
    else:
        check_profile(profile, survey(), ["a"])


def test_how_many_impossible_values_and_rejected_rows_are_too_many():
    first = {"feh": (0, 3, "9")}
    for n_impossible, n_valid, is_refused in ((10, 9, 1), (10, 10, 0), (9, 8, 0)):
        n_rows = n_impossible + n_valid
        of_feh = {"nulls": {"feh": n_impossible}, "impossible": {"feh": n_impossible}}
        labels = {"feh": label_bins(np.full(n_rows, 9.0))}
        profile = Profile(n_rows=n_rows, first_impossible=first, labels=labels, **of_feh)
        if is_refused:
            refused(profile, "10 of 19 values are not within -10 to 2 dex", "median is about 9")
        else:
            check_profile(profile, survey(), ["a"])
    for n_rejected, n_rows, is_refused in ((9, 100, 0), (10, 100, 1), (5, 10, 0), (6, 11, 1)):
        rejected = {"rejected": {"null obs_id": n_rejected}, "first_rejected": (0, 7, "x")}
        profile = Profile(n_rows=n_rows, **rejected)
        if is_refused:
            refused(profile, f"{n_rejected} of {n_rows} rows cannot be used", "row 7: x")
        else:
            check_profile(profile, survey(), ["a"])


def test_the_log10_of_a_temperature_is_told_from_other_units():
    for median, word in ((3.1, "log10"), (4.8, "log10"), (2.8, "1000 to"), (5.3, "1000 to")):
        labels = {"teff": label_bins(np.full(20, median))}
        of_teff = {"nulls": {"teff": 20}, "impossible": {"teff": 20}}
        first = {"teff": (0, 0, str(median))}
        refused(Profile(n_rows=20, first_impossible=first, labels=labels, **of_teff), word)


def test_limits_of_a_column_are_possible_values(tmp_path):
    data = rows(4) | {"n": np.array([2, 3, 5, 6])}
    data["feh"][:] = [-10.0, 2.0, -10.001, 2.001]
    extra = {"n": {"source": "n", "dtype": "int64", "min": 3, "max": 5}}
    out = read(write_fits(tmp_path / "a", data), survey(extra=extra))
    assert out.column("feh") == [-10.0, 2.0, None, None]
    assert out.column("n") == [None, 3, 5, None]
    assert out.profile.impossible == {"feh": 2, "n": 2}
    assert out.profile.first_impossible == {"feh": (0, 2, "-10.001"), "n": (0, 0, "2")}


def test_a_number_beyond_the_type_of_its_column_is_impossible(tmp_path):
    data = rows(2) | {"big": np.array([1e39, 1.0])}
    out = read(write_fits(tmp_path / "a", data), survey(extra={"big": {"source": "big"}}))
    assert out.column("big") == [None, 1.0] and out.profile.impossible == {"big": 1}
