import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.evidence.coverage_maps import count_maps, follow_up, sum_maps
from sos_dask.evidence.widening import CLASSES
from sos_dask.schema import LABELS
from tests.evidence.test_coverage import sky


@given(cut=st.integers(0, 400))
@settings(max_examples=10, deadline=None)
def test_maps_add_up_however_the_rows_are_cut(cut):
    rng = np.random.default_rng(1)
    rows, cells = sky(400, rng), rng.integers(0, 12 << 58, 400)
    rows["phot_g_mean_mag"][:50] = np.nan
    place = rng.integers(-1, 3, 400).astype(np.int8)
    whole = sum_maps([count_maps(cells, rows, place)])
    parts = [
        count_maps(cells[part], {k: v[part] for k, v in rows.items()}, place[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert sum_maps(parts).equals(whole)
    for name in ("sky", "kiel", "labels"):
        of_map = [row for row in whole.to_pylist() if row["map"] == name]
        for number, kind in enumerate(CLASSES):
            assert sum(row[kind] for row in of_map) == np.count_nonzero(place == number)


def test_follow_up_names_the_cell_with_most_rows_outside():
    columns = {
        "teff": np.array([5100.0] * 5 + [6100.0] * 3),
        "logg": np.full(8, 4.1),
        "feh": np.full(8, 0.1),
        "phot_g_mean_mag": np.array([15.0, 16.0, 17.0, 10.0, 10.0, 12.0, 12.0, 12.0]),
    }
    place = np.array([2, 2, 2, 0, 0, 2, 2, 0], dtype=np.int8)
    maps = sum_maps([count_maps(np.zeros(8, dtype=np.int64), columns, place)])
    first, second = follow_up(maps)
    assert (first["teff"], first["logg"], first["outside"], first["rows"]) == (5125, 4.125, 3, 5)
    assert first["phot_g_mean_mag"] == 16 and second["outside"] == 2
    assert set(LABELS) <= set(first)
