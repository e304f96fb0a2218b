import itertools
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sos_dask.columns import key_hashes, one_array
from sos_dask.errors import SurveyError
from sos_dask.ingest.keys import (
    HISTOGRAM_ORDER,
    check_conflicts,
    conflicting_keys,
    histogram_of,
    holders,
    key_ranges,
    losing_rows,
    merge_rows,
    partition_edges,
    rejected_rows,
    sorted_hashes,
)
from sos_dask.sky.healpix import HealpixPixel, ang2pix, plan_partitions
from tests.survey_files import ipc_bytes, read, rows, survey, write_fits

VALUE = st.sampled_from([None, 0.0, 1.0])


OBSERVATION = st.tuples(
    st.sampled_from(["a", "b", "é", "longer than eight bytes 1", "longer than eight bytes 2"]),
    st.sampled_from([(0.0, 90.0), (10.0, 0.0)]),
    st.sampled_from([None, 4000.0, 5000.0]),
    VALUE,
    VALUE,
    VALUE,
    st.sampled_from([0, 1, 3, 4]),
)


MERGE_SURVEY = survey(
    {"obs_id": {"source": "obsid", "dtype": "string"}, "snr": {"source": "snr"}},
    cuts={f"c{i}": {"bit": i, "column": "flag", "bits_unset": [i]} for i in range(3)},
    missing=[],
)


def write_observations(path: Path, items: list) -> None:
    names = ("obsid", "place", "teff", "logg", "feh", "snr", "flag")
    data = dict(zip(names, zip(*items, strict=True), strict=True))
    ra, dec = zip(*data.pop("place"), strict=True)
    columns = {name: pa.array(values) for name, values in data.items()}
    for name in ("teff", "logg", "feh", "snr"):
        columns[name] = columns[name].cast(pa.float64())
    pq.write_table(pa.table(columns | {"ra": ra, "dec": dec}), path, row_group_size=3)


def preferred(items: list) -> tuple:
    """The rule of the docstring, row by row."""

    def key(item):
        content = [item[1], *item[2:]]
        flat = [(value is not None, value or 0) for value in (*item[2:6],)]
        return (
            -sum(value is not None for value in content),
            bin(item[6]).count("1"),
            -(item[5] if item[5] is not None else -np.inf),
            ang2pix(np.array([item[1][0]]), np.array([item[1][1]]))[0],
            flat,
            item[6],
        )

    return min(items, key=key)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(OBSERVATION, min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_merging_depends_on_the_rows_alone(tmp_path_factory, items, random):
    folder = tmp_path_factory.mktemp("merge")
    shuffled = items.copy()
    random.shuffle(shuffled)
    cut = random.randint(0, len(items) - 1)
    outputs = []
    for number, files in enumerate(([items], [shuffled[cut:], shuffled[:cut]])):
        batches = []
        for index, content in enumerate(part for part in files if part):
            path = folder / f"{number}-{index}"
            write_observations(path, content)
            sizes = {"chunk_rows": random.randint(1, 9), "batch_rows": random.randint(1, 9)}
            batches += read(path, MERGE_SURVEY, index=index, **sizes).batches
        random.shuffle(batches)
        tables = [batch.rows for batch in batches]
        keys = conflicting(tables)
        everything = pa.concat_tables(tables)
        lost = losing_rows(everything.filter(pc.is_in(everything["obs_id"], value_set=keys)))
        marks = set(zip(lost["_file"].to_pylist(), lost["_row"].to_pylist(), strict=True))
        tables = [
            table.filter(
                pa.array(
                    [
                        (f, r) not in marks
                        for f, r in zip(
                            table["_file"].to_pylist(), table["_row"].to_pylist(), strict=True
                        )
                    ],
                    pa.bool_(),
                )
            )
            for table in tables
        ]
        merged = merge_rows(tables, ["x", "y"])
        rejected = pa.concat_tables([merged.rejected, rejected_rows(lost, ["x", "y"])])
        assert merged.rows.num_rows + merged.n_duplicates + rejected.num_rows == len(items)
        assert set(rejected["reason"].to_pylist()) <= {"conflicting obs_id"}
        ids = rejected["obs_id"].to_pylist()
        outputs.append((ipc_bytes(merged.rows), merged.n_duplicates, sorted(ids)))
        assert merged.rows.schema.equals(MERGE_SURVEY.arrow_schema(), check_metadata=True)
    assert outputs[0] == outputs[1]
    for row in merged.rows.to_pylist():
        best = preferred([item for item in items if item[0] == row["obs_id"]])
        found = (row["ra"], row["dec"], row["teff"], row["logg"], row["feh"], row["snr"])
        assert found == (*best[1], *best[2:6])
        assert row["quality"] == best[6]
    assert sorted(merged.rows["obs_id"].to_pylist()) == sorted({item[0] for item in items})


def test_exact_duplicates_are_dropped_and_conflicts_rejected(tmp_path):
    data = rows(6)
    for name in data:
        data[name][1] = data[name][0]  # an exact repeat
        data[name][3] = data[name][2]
        data[name][5] = data[name][4]
    data["feh"][3] += 0.5
    data["teff"][4] = -9999  # fewer values than row 5
    batches = read(write_fits(tmp_path / "a", data), survey(), chunk_rows=1).batches
    merged = merge_rows([batch.rows for batch in batches], ["a.fits"])
    assert merged.n_duplicates == 1
    assert merged.rows.num_rows == 3
    assert "_row" not in merged.rows.column_names
    assert merged.rejected["row"].to_pylist() == [3, 4]  # of 2 and 3 the smaller [Fe/H] stays
    assert merged.rejected["reason"].to_pylist() == ["conflicting obs_id"] * 2
    assert merged.rejected["file"].to_pylist() == ["a.fits"] * 2
    assert merged.rejected["ra"].to_pylist() == [data["ra"][3], data["ra"][4]]
    assert merged.rejected["obs_id"].to_pylist() == [str(data["obsid"][i]) for i in (3, 4)]


def test_duplicates_of_a_row_with_nulls(tmp_path):
    data = rows(3)
    for name in data:
        data[name][:] = data[name][0]
    data["feh"][:2] = np.nan
    data["feh"][2] = 0.0  # a null is not 0
    merged = merge_rows([read(write_fits(tmp_path / "a", data), survey()).rows], ["a"])
    assert (merged.rows.num_rows, merged.n_duplicates, merged.rejected.num_rows) == (1, 0, 2)
    assert merged.rows["feh"].to_pylist() == [0.0]


def conflicting(tables: list[pa.Table]) -> pa.Array:
    return conflicting_keys(tables, [sorted_hashes(one_array(t["obs_id"])) for t in tables])


def write_pieces(folder: Path, tables: list[pa.Table]) -> list[Path]:
    paths = []
    for number, table in enumerate(tables):
        paths.append(folder / f"{number}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return paths


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("n_ranges", [1, 3])
def test_keys_at_several_places_as_by_brute_force(tmp_path, text, n_ranges):
    rng = np.random.default_rng(3)
    ids, cells = rng.integers(-40, 40, 120), rng.integers(0, 3, 120) + 7
    keys = pa.array([f"{'x' * (abs(i) % 13)}{i}" for i in ids]) if text else pa.array(ids)
    table = pa.table({"_healpix_29": cells, "obs_id": keys, "other": np.zeros(120)})
    places: dict = {}
    for key, cell in zip(keys.to_pylist(), cells.tolist(), strict=True):
        places.setdefault(key, set()).add(cell)
    expected = {key for key, found in places.items() if len(found) > 1}
    pieces = write_pieces(tmp_path, [table.slice(0, 50), table.slice(50, 0), table.slice(50)])
    runs = [tmp_path / f"{number}.npy" for number in range(3)]
    for run, piece in zip(runs, (keys[:50], keys[:0], keys[50:]), strict=True):
        np.save(run, sorted_hashes(piece))
    ranges = key_ranges(runs, n_ranges)
    assert len(ranges) == n_ranges
    found = [conflicting_keys(pieces, runs, *hashes) for hashes in ranges]
    together = [key for keys in found for key in keys.to_pylist()]
    assert sorted(together) == sorted(expected)
    assert all(keys.to_pylist() == sorted(keys.to_pylist()) for keys in found)
    assert all(keys.type == keys_type for keys in found for keys_type in [table["obs_id"].type])
    assert len(found[-1]) > 0
    tables = [table.slice(i, 13) for i in range(0, 120, 13)]  # with offsets, not from files
    assert conflicting(tables).to_pylist() == sorted(expected)


def test_only_pieces_with_a_key_that_stands_twice_are_read(tmp_path):
    tables = [
        pa.table({"obs_id": ids, "_healpix_29": [place] * 2})
        for place, ids in enumerate([[1, 2], [3, 4], [5, 1]])
    ]
    pieces = write_pieces(tmp_path, tables)
    pieces[1].unlink()
    runs = [sorted_hashes(one_array(table["obs_id"])) for table in tables]
    assert conflicting_keys(pieces, runs).to_pylist() == [1]


def test_more_pieces_than_files_may_be_open(tmp_path):
    tables = [pa.table({"obs_id": [number, 7], "_healpix_29": [0, 0]}) for number in range(200)]
    pieces = write_pieces(tmp_path, tables)
    runs = [tmp_path / f"{number}.npy" for number in range(200)]
    for run, table in zip(runs, tables, strict=True):
        np.save(run, sorted_hashes(one_array(table["obs_id"])))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
    try:
        assert len(key_ranges(runs, 3)) >= 2
        assert len(conflicting_keys(pieces, runs)) == 0
        assert holders(runs, np.array([7], np.uint64)) == list(range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=30), max_size=5),
    n_ranges=st.integers(1, 6),
)
def test_ranges_of_keys_hold_each_hash_once(runs, n_ranges):
    hashes = [np.sort(np.array(run, np.uint64)) for run in runs]
    ranges = key_ranges(hashes, n_ranges)
    assert 1 <= len(ranges) <= n_ranges
    assert ranges[0][0] == 0 and ranges[-1][1] == 2**64 - 1
    assert all(first <= last for first, last in ranges)
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(ranges))


def test_ranges_of_keys_are_about_equal():
    rng = np.random.default_rng(5)
    skewed = (rng.random(400_000) ** 4 * 2**63).astype(np.uint64)
    runs = [np.sort(part) for part in np.split(skewed, 40)]
    alike = [np.arange(0, 10_000_000, 1000, dtype=np.uint64)] * 40
    for hashes in (runs, alike):
        together = np.sort(np.concatenate(hashes))
        ranges = key_ranges(hashes, 20)
        n = [np.diff(np.searchsorted(together, (a, b), "right"))[0] for a, b in ranges]
        assert len(ranges) == 20
        assert max(n) < 1.2 * len(together) / 20


def test_texts_that_share_a_hash_are_not_the_same_key(monkeypatch):
    monkeypatch.setattr(
        "sos_dask.ingest.keys.key_hashes", lambda ids: np.zeros(len(ids), np.uint64)
    )
    table = pa.table({"obs_id": ["a", "b", "c", "c"], "_healpix_29": [1, 2, 3, 4]})
    assert conflicting([table]).to_pylist() == ["c"]


@settings(max_examples=50, deadline=None)
@example(["", "a", "a\0", "a" * 8, "a" * 8 + "\0"])
@example(["", "\x01", "\x02\0", "\x03\x01"])
@given(st.lists(st.text(max_size=30)))
def test_hashes_of_text_differ_as_the_texts_do(texts):
    column = pa.array(["prefix", *texts], pa.string()).slice(1)
    hashes = key_hashes(column)
    assert len(set(hashes.tolist())) == len(set(texts))
    again = {text: key_hashes(pa.array([text]))[0] for text in texts}
    assert [again[text] for text in texts] == hashes.tolist()


def test_no_pieces_and_no_conflicts():
    assert len(conflicting([])) == 0
    table = pa.table({"obs_id": ["a", "a"], "_healpix_29": [1, 1]})
    assert conflicting([table]).type == pa.string()
    assert len(conflicting([table])) == 0


def test_a_column_that_is_no_key_is_refused():
    n = 5000
    table = pa.table({"obs_id": ["plate 17"] * n, "_healpix_29": np.arange(n)})
    with pytest.raises(SurveyError, match=r"'obs_id' is not a key.*plate 17") as caught:
        conflicting([table])
    assert "join" in caught.value.hint


def test_some_conflicts_are_allowed():
    check_conflicts(100, 100, "x")
    check_conflicts(101, 10100, "x")
    with pytest.raises(SurveyError, match="survey a: 'obs_id' is not a key: 102 of 10100 rows"):
        check_conflicts(102, 10100, "x", "survey a")


def test_losing_rows_keeps_the_best_row_and_its_duplicates(tmp_path):
    data = rows(5)
    for name in ("obsid", "teff", "logg", "feh"):
        data[name][:4] = data[name][0]
    for name in ("ra", "dec"):
        data[name][1] = data[name][0]
    data["feh"][2] = -9999
    out = read(write_fits(tmp_path / "a", data), survey()).rows.slice(0)
    keys = conflicting([out])
    assert keys.to_pylist() == [data["obsid"][0]]
    lost = losing_rows(out.filter(pc.is_in(out["obs_id"], value_set=keys)))
    winner = min((0, 3), key=lambda i: ang2pix(data["ra"][i : i + 1], data["dec"][i : i + 1])[0])
    assert lost["_row"].to_pylist() == ([2, 3] if winner == 0 else [0, 1, 2])
    assert losing_rows(out.slice(0, 0)).num_rows == 0


N_CELLS = 12 << 58


# Many rows in few cells, in two corners of the sky.
CELLS = st.integers(0, 40).map(lambda i: i << 36) | st.integers(N_CELLS - 5, N_CELLS - 1)


@settings(max_examples=15, deadline=None)
@given(
    pieces=st.lists(st.lists(CELLS, max_size=40).map(sorted), max_size=4),
    rows_per_partition=st.integers(1, 30),
)
def test_partitions_lie_in_sorted_pieces_where_their_rows_do(pieces, rows_per_partition):
    arrays = [np.array(piece, np.int64) for piece in pieces]
    histograms = [histogram_of(cells) for cells in arrays]
    total = np.zeros(12 * 4**HISTOGRAM_ORDER, np.int64)
    for cells, n_rows in histograms:
        total[cells] += n_rows
    assert total.sum() == sum(map(len, pieces))
    pixels = plan_partitions(total, HISTOGRAM_ORDER, rows_per_partition)
    edges = partition_edges(pixels, histograms)
    assert edges.shape == (len(pixels) + 1, len(pieces))
    assert edges[-1].tolist() == [len(piece) for piece in pieces]
    for pixel, starts, stops in zip(pixels, edges, edges[1:], strict=False):
        for piece, first, stop in zip(arrays, starts, stops, strict=True):
            expected = piece[(piece >= pixel.first) & (piece < pixel.stop)]
            np.testing.assert_array_equal(piece[first:stop], expected)


def test_no_rows_and_no_pieces():
    assert histogram_of(np.empty(0, np.int64)).shape == (2, 0)
    assert partition_edges([], []).shape == (1, 0)
    assert partition_edges([HealpixPixel(0, 3)], []).shape == (2, 0)
