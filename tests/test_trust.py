"""Corrected rows that know their coverage."""

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.correct import FLAG_OUTSIDE, Covered, correct, corrected_schema
from sos_dask.errors import PartitionError
from sos_dask.evidence.widening import Limits


class Constant:
    """A correction of one everywhere."""

    def predict(self, features):
        return np.ones((len(features), 3), dtype=np.float32)

    def in_range(self, features):
        return np.ones(len(features), dtype=bool)


def covered(coverage, **more) -> Covered:
    n = len(coverage)
    scores = {"obs_id": range(n), "coverage": pa.array(coverage, pa.float32())}
    scores |= {"flag_coverage": pa.array([0] * n, pa.int32())}
    scores |= {"kind_coverage": pa.array([0] * n, pa.int8())}
    return Covered(pa.table(scores), lambda kind, error_class, width: np.ones_like(width), **more)


def test_the_correction_fades_from_inside_to_outside():
    limits = Limits(inside=0.8, outside=0.6)
    coverage = [0.9, 0.8, 0.7, 0.6, 0.1, None]
    x, delta = np.zeros((6, 3), dtype=np.float32), np.ones((6, 3), dtype=np.float32)
    assert covered(coverage).faded(delta, x) is delta, "nothing fades"
    none = covered(coverage, limits=limits).faded(delta, x)
    assert none[:, 0] == pytest.approx([1, 1, 0.5, 0, 0, 1], abs=1e-6)
    three = {"fallback": lambda x: np.full((len(x), 3), 3, np.float32)}
    smooth = covered(coverage, limits=limits, **three).faded(delta, x)
    assert smooth[:, 1] == pytest.approx([1, 1, 2, 3, 3, 1], abs=1e-6)
    assert (delta == 1).all(), "what a correction gives is not changed"


def table():
    labels = {"teff": [5000.0, 6000.0], "logg": [4.0, 4.0], "feh": [0.0, 0.0]}
    return pa.table({"obs_id": [1, 2], **{k: pa.array(v, pa.float32()) for k, v in labels.items()}})


def scores(ids):
    return pa.table(
        {
            "obs_id": ids,
            "coverage": pa.array([0.9, 0.4], pa.float32()),
            "flag_coverage": pa.array([0, FLAG_OUTSIDE], pa.int32()),
            "kind_coverage": pa.array([None, 2], pa.int8()),
        }
    )


class Ten:
    """Errors of ten everywhere; the second row is of the sparse class."""

    def half_width(self, features, snr):
        return np.full((len(features), 3), 10, np.float32)

    def is_sparse(self, features):
        return np.arange(len(features)) == 1

    def describe(self, label):
        return "ten"


def factors(kind, error_class, width):
    """By kind and class: one inside for the dense, else 2, 3 and 4 for the labels."""
    assert (width == 10).all()
    return np.where(((kind == 2) & (error_class == 1))[:, None], [2.0, 3.0, 4.0], 1.0)


def test_coverage_and_flags_join_the_corrected_rows():
    found = correct(table(), Constant(), Ten(), covered=Covered(scores([1, 2]), factors))
    assert found.schema.names[-2:] == ["coverage", "flag_sos"]
    assert found["coverage"].to_pylist() == pytest.approx([0.9, 0.4])
    assert found["flag_sos"].to_pylist() == [0, FLAG_OUTSIDE]
    assert found["teff_sos_err"].to_pylist() == [10, 20]
    assert found["feh_sos_err"].to_pylist() == [10, 40]
    assert found["teff_delta"].to_pylist() == [1, 1]
    assert b"16: outside" in found.schema.field("flag_sos").metadata[b"description"]
    assert found.schema.equals(
        corrected_schema(table().schema, Ten(), covered=True), check_metadata=True
    )
    again = correct(found, Constant(), Ten(), covered=Covered(scores([1, 2]), factors))
    assert again.equals(found), "coverage and errors of another run do not stay"


def test_other_rows_are_refused():
    with pytest.raises(PartitionError, match="contain other rows"):
        correct(table(), Constant(), covered=Covered(scores([2, 1]), factors))
