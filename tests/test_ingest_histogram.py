import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.ingest.keys import HISTOGRAM_ORDER, histogram_of, partition_edges
from sos_dask.sky.healpix import HealpixPixel, plan_partitions

N_CELLS = 12 << 58
# Many rows in few cells, in two corners of the sky.
CELLS = st.integers(0, 40).map(lambda i: i << 36) | st.integers(N_CELLS - 5, N_CELLS - 1)


@settings(max_examples=30, deadline=None)
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
