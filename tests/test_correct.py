"""Corrected labels, nulls and flags, with a correction that is known in closed form."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.correct import (
    FLAG_MEANINGS,
    FLAG_NULL_INPUT,
    FLAG_OUTSIDE,
    FLAG_OUTSIDE_TRAINING,
    FLAG_QUALITY,
    Covered,
    correct,
    corrected_schema,
)
from sos_dask.errors import PartitionError
from sos_dask.evidence.widening import Limits
from sos_dask.problem import Input, Label, Problem
from sos_dask.schema import CANONICAL, LABELS
from tests.skies import observations
from tests.steps import features

NEW = ["teff_sos", "logg_sos", "feh_sos", "teff_delta", "logg_delta", "feh_delta", "flag_sos"]


class _Linear:
    """Differences that are linear in the features; trained between 4500 K and 6500 K."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            out = np.stack([100 * x[:, 0] - 3 * x[:, 1], 0.1 * x[:, 1], x[:, 2] + 0.01], axis=1)
        out[~np.isfinite(x).all(axis=1)] = np.nan
        return out.astype(np.float32)

    def in_range(self, x: np.ndarray) -> np.ndarray:
        return (x[:, 0] >= 4500 / 5040) & (x[:, 0] <= 6500 / 5040)


LINEAR: Any = _Linear()


def rows(n: int = 200, nulls: float = 0.3, seed: int = 0) -> pa.Table:
    table = observations(n, seed, spread=True)
    rng = np.random.default_rng(seed)
    for label in LABELS:
        index = table.schema.get_field_index(label)
        values = pa.array(table[label].to_numpy(), mask=rng.random(n) < nulls)
        table = table.set_column(index, table.schema.field(label), values)
    return table


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 50))
def test_labels_minus_their_predicted_difference(seed, nulls, n):
    table = rows(max(n, 1), nulls, seed).slice(0, n)
    found = correct(table, LINEAR)
    assert found.select(table.schema.names).equals(table)
    assert found.schema.names == [*table.schema.names, *NEW]
    columns = [table[label].to_pylist() for label in LABELS]
    predicted = [found[f"{label}_delta"].to_pylist() for label in LABELS]
    result = [found[f"{label}_sos"].to_pylist() for label in LABELS]
    for row in range(n):
        values = [column[row] for column in columns]
        deltas = [column[row] for column in predicted]
        after = [column[row] for column in result]
        flag = found["flag_sos"][row].as_py()
        assert bool(flag & FLAG_QUALITY) == (table["quality"][row].as_py() != 0)
        if None in values:
            assert after == [None] * 3 and deltas == [None] * 3
            assert flag & FLAG_NULL_INPUT and not flag & FLAG_OUTSIDE_TRAINING
            continue
        x = features(*(np.array([value], dtype=np.float32) for value in values))
        expected = LINEAR.predict(x)[0]
        assert deltas == expected.tolist()
        assert after == [float(np.float32(v) - d) for v, d in zip(values, expected, strict=True)]
        assert not flag & FLAG_NULL_INPUT
        assert bool(flag & FLAG_OUTSIDE_TRAINING) == (not LINEAR.in_range(x)[0])


class _OfTwo:
    """Differences 1 and 0.5 of two labels, by two inputs."""

    def predict(self, features):
        return np.tile(np.array([1.0, 0.5], dtype=np.float32), (len(features), 1))

    def in_range(self, features):
        return np.ones(len(features), dtype=bool)


def test_a_label_that_is_no_input_is_null_alone():
    """What is made of the other labels stays; an unknown input takes all."""
    labels = tuple(Label(name=name) for name in ("teff", "mg_fe"))
    problem = Problem(labels=labels, inputs=(Input(column="teff"), Input(column="logg")))
    columns: dict[str, Any] = {"teff": [5e3, 5e3, None, 5e3], "mg_fe": [0.1, None, 0.1, 0.1]}
    columns["logg"] = [3.0, 3.0, 3.0, None]
    table = pa.table({name: pa.array(values, pa.float32()) for name, values in columns.items()})
    two: Any = _OfTwo()
    found = correct(table, two, problem=problem)
    assert found["teff_sos"].to_pylist() == [4999.0, 4999.0, None, None]
    assert found["mg_fe_delta"].to_pylist() == [0.5, None, None, None]
    assert [flag & FLAG_NULL_INPUT for flag in found["flag_sos"].to_pylist()] == [0, 1, 1, 1]


def test_no_value_is_nan():
    found = correct(rows(), LINEAR)
    for name in NEW[:6]:
        assert not np.isnan(found[name].drop_null().to_numpy()).any()


def test_schema_has_units_and_meanings():
    table = rows(5)
    schema = corrected_schema(table.schema)
    assert correct(table, LINEAR).schema.equals(schema, check_metadata=True)
    for label in LABELS:
        assert schema.field(f"{label}_sos").metadata[b"unit"].decode() == CANONICAL[label].unit
        assert schema.field(f"{label}_sos").metadata[b"ucd"].decode() == CANONICAL[label].ucd
        assert b"target - reference" in schema.field(f"{label}_delta").metadata[b"description"]
    text = schema.field("flag_sos").metadata[b"description"].decode()
    assert all(f"{bit}: {meaning}" in text for bit, meaning in FLAG_MEANINGS.items())
    assert not schema.field("flag_sos").nullable


def test_correcting_twice_is_correcting_once():
    once = correct(rows(), LINEAR)
    assert correct(once, LINEAR).equals(once)


def test_rows_without_quality_have_no_flag_of_it():
    table = rows().drop_columns(["quality"])
    assert not (correct(table, LINEAR)["flag_sos"].to_numpy() & FLAG_QUALITY).any()


class _Widths:
    """Half-widths that can be told apart: of the first feature and S/N."""

    def half_widths(self, x: np.ndarray, snr: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        base = x[:, 0] if snr is None else x[:, 0] * 100 / snr
        own = np.stack([base, 2 * base, 3 * base], axis=1).astype(np.float32)
        return own, 2 * own

    def is_sparse(self, x: np.ndarray) -> np.ndarray:
        return np.zeros(len(x), dtype=bool)

    def describe(self, label: str) -> tuple[str, str]:
        return f"half-width of {label}", f"half-width of {label} - reference"


WIDTHS: Any = _Widths()


def test_errors_stand_beside_their_labels():
    table = rows()
    plain, found = correct(table, LINEAR), correct(table, LINEAR, WIDTHS)
    errors = [f"{label}_sos_err{end}" for label in LABELS for end in ("", "_pair")]
    assert found.schema.names == [*plain.schema.names[:-1], *errors, "flag_sos"]
    assert found.select(plain.schema.names).equals(plain)
    x = features(*(table[label].to_numpy() for label in LABELS))
    wanted, of_pair = WIDTHS.half_widths(x, table["snr"].to_numpy())
    for number, label in enumerate(LABELS):
        known = found[f"{label}_sos"].is_valid().to_numpy()
        column = found[f"{label}_sos_err"]
        assert np.array_equal(column.is_valid().to_numpy(), known)
        assert np.array_equal(column.to_numpy()[known], wanted[known, number])
        pair = found[f"{label}_sos_err_pair"].to_numpy()
        assert np.array_equal(pair[known], of_pair[known, number])
        field = found.schema.field(f"{label}_sos_err")
        assert field.metadata[b"description"] == f"half-width of {label}".encode()
        assert field.metadata[b"unit"].decode() == CANONICAL[label].unit
    assert found.schema.equals(corrected_schema(table.schema, WIDTHS), check_metadata=True)
    assert correct(found, LINEAR).equals(plain), "errors of another run do not stay"


def test_errors_of_rows_without_snr():
    table = rows().drop_columns(["snr"])
    found = correct(table, LINEAR, WIDTHS)
    known = found["teff_sos"].is_valid().to_numpy()
    teff = table["teff"].to_numpy()[known].astype(np.float32)
    assert np.array_equal(found["teff_sos_err"].to_numpy()[known], teff / np.float32(5040.0))


@pytest.mark.parametrize("cut", [1, 57, 199])
def test_rows_do_not_depend_on_their_company(cut):
    table = rows()
    parts = [correct(table.slice(0, cut), LINEAR), correct(table.slice(cut), LINEAR)]
    assert pa.concat_tables(parts).combine_chunks().equals(correct(table, LINEAR).combine_chunks())


# -- with a coverage ------------------------------------------------------------------------------


class _Constant:
    """A correction of one everywhere."""

    def predict(self, features):
        return np.ones((len(features), 3), dtype=np.float32)

    def in_range(self, features):
        return np.ones(len(features), dtype=bool)


ONE: Any = _Constant()


def covered(coverage, **more) -> Covered:
    n = len(coverage)
    scores = {"obs_id": range(n), "coverage": pa.array(coverage, pa.float32())}
    scores |= {"flag_coverage": pa.array([0] * n, pa.int32())}
    scores |= {"kind_coverage": pa.array([0] * n, pa.int8())}
    return Covered(
        pa.table(scores), lambda kind, error_class, width, star: np.ones_like(width), **more
    )


def test_the_correction_fades_from_inside_to_outside():
    limits = Limits(inside=0.8, outside=0.6)
    coverage = [0.9, 0.8, 0.7, 0.6, 0.1, None]
    x, delta = np.zeros((6, 3), dtype=np.float32), np.ones((6, 3), dtype=np.float32)
    assert covered(coverage).faded(delta, x) is delta, "nothing fades"
    none = covered(coverage, limits=limits).faded(delta, x)
    assert none[:, 0] == pytest.approx([1, 1, 0.5, 0, 0, 1], abs=1e-6)
    three = {"fallback": lambda x, kind: np.full((len(x), 3), 3, np.float32)}
    smooth = covered(coverage, limits=limits, **three).faded(delta, x)
    assert smooth[:, 1] == pytest.approx([1, 1, 2, 3, 3, 1], abs=1e-6)
    assert (delta == 1).all(), "what a correction gives is not changed"


def two_rows() -> pa.Table:
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


class _Ten:
    """Errors of ten everywhere; the second row is of the sparse class."""

    def half_widths(self, features, snr):
        own = np.full((len(features), 3), 5, np.float32)
        return own, 2 * own

    def is_sparse(self, features):
        return np.arange(len(features)) == 1

    def describe(self, label):
        return "five", "ten"


TEN: Any = _Ten()


def factors(kind, error_class, width, star):
    """By kind and class: one inside for the dense, else 2, 3 and 4 for the labels."""
    assert (width == 10).all()
    return np.where(((kind == 2) & (error_class == 1))[:, None], [2.0, 3.0, 4.0], 1.0)


def test_coverage_and_flags_join_the_corrected_rows():
    found = correct(two_rows(), ONE, TEN, covered=Covered(scores([1, 2]), factors))
    assert found.schema.names[-2:] == ["coverage", "flag_sos"]
    assert found["coverage"].to_pylist() == pytest.approx([0.9, 0.4])
    assert found["flag_sos"].to_pylist() == [0, FLAG_OUTSIDE]
    assert found["teff_sos_err_pair"].to_pylist() == [10, 20]
    assert found["feh_sos_err_pair"].to_pylist() == [10, 40]
    assert found["feh_sos_err"].to_pylist() == [5, 20]
    assert found["teff_delta"].to_pylist() == [1, 1]
    assert b"16: outside" in found.schema.field("flag_sos").metadata[b"description"]
    assert found.schema.equals(
        corrected_schema(two_rows().schema, TEN, covered=True), check_metadata=True
    )
    again = correct(found, ONE, TEN, covered=Covered(scores([1, 2]), factors))
    assert again.equals(found), "coverage and errors of another run do not stay"


def test_other_rows_are_refused():
    with pytest.raises(PartitionError, match="contain other rows"):
        correct(two_rows(), ONE, covered=Covered(scores([2, 1]), factors))
