"""Corrected rows that know their coverage."""

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.correct import FLAG_OUTSIDE, Faded, correct, widened, with_coverage
from sos_dask.errors import PartitionError


class Constant:
    """A correction of one everywhere."""

    def predict(self, features):
        return np.ones((len(features), 3), dtype=np.float32)

    def in_range(self, features):
        return np.ones(len(features), dtype=bool)


def test_the_correction_fades_from_inside_to_outside():
    coverage = np.array([0.9, 0.8, 0.7, 0.6, 0.1, np.nan], dtype=np.float32)
    x = np.zeros((6, 3), dtype=np.float32)
    none = Faded(Constant(), coverage, 0.8, 0.6).predict(x)
    assert none[:, 0] == pytest.approx([1, 1, 0.5, 0, 0, 1], abs=1e-6)
    smooth = Faded(Constant(), coverage, 0.8, 0.6, lambda x: np.full((len(x), 3), 3, np.float32))
    assert smooth.predict(x)[:, 1] == pytest.approx([1, 1, 2, 3, 3, 1], abs=1e-6)


def table():
    labels = {"teff": [5000.0, 6000.0], "logg": [4.0, 4.0], "feh": [0.0, 0.0]}
    return pa.table({"obs_id": [1, 2], **{k: pa.array(v, pa.float32()) for k, v in labels.items()}})


def scores(ids):
    return pa.table(
        {
            "obs_id": ids,
            "coverage": pa.array([0.9, 0.4], pa.float32()),
            "flag_coverage": pa.array([0, FLAG_OUTSIDE], pa.int32()),
        }
    )


def test_coverage_and_flags_join_the_corrected_rows():
    corrected = correct(table(), Constant())
    for label in ("teff", "logg", "feh"):
        error = pa.array([10.0, 10.0], pa.float32())
        corrected = corrected.add_column(4, f"{label}_sos_err", error)
    found = with_coverage(corrected, scores([1, 2]))
    found = widened(found, np.array([[1, 1, 1], [2, 3, 4]], np.float32))
    assert found.schema.names[-2:] == ["coverage", "flag_sos"]
    assert found["flag_sos"].to_pylist() == [0, FLAG_OUTSIDE]
    assert found["teff_sos_err"].to_pylist() == [10, 20]
    assert found["feh_sos_err"].to_pylist() == [10, 40]
    assert b"16: outside" in found.schema.field("flag_sos").metadata[b"description"]


def test_other_rows_are_refused():
    with pytest.raises(PartitionError, match="hold other rows"):
        with_coverage(correct(table(), Constant()), scores([2, 1]))
