"""Grids against brute force and scipy, and the files of models."""

import json

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from sos_dask.errors import ModelError
from sos_dask.stats.table import Grid, pack, seal, unpack, unseal

GRID = Grid((0.0, -1.0), (4.0, 1.0), (5, 3))


def test_nodes_end_at_the_corners_and_centers_half_a_step_inside():
    nodes, centers = GRID.nodes(), GRID.centers()
    assert GRID.size == len(nodes) == len(centers) == 15
    assert nodes[0].tolist() == [0, -1] and nodes[-1].tolist() == [4, 1]
    assert nodes[1].tolist() == [0, 0] and nodes[3].tolist() == [1, -1], "the last axis runs first"
    assert centers[0] == pytest.approx([0.4, -2 / 3]) and centers[-1] == pytest.approx([3.6, 2 / 3])


def test_every_center_is_in_its_cell_and_rows_outside_in_the_nearest():
    assert GRID.cells(GRID.centers().astype(np.float32)).tolist() == list(range(15))
    x = np.array([[-9, -9], [9, 9], [9, -9], [0.79, 0], [0.81, 0], [np.nan, 0]], np.float32)
    found = GRID.cells(x).tolist()
    assert found[:5] == [0, 14, 12, 1, 4]
    assert 0 <= found[5] < 15


def test_a_box_without_width_has_one_cell():
    flat = Grid((0.0, 2.5), (1.0, 2.5), (4, 3))
    x = np.array([[0.1, 2.5], [0.9, -7], [0.9, 99]], np.float32)
    assert flat.cells(x).tolist() == [0, 9, 9]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (4, 2, 6)])
def test_interpolation_is_that_of_scipy_in_blocks_of_any_size(shape):
    rng = np.random.default_rng(0)
    k = len(shape)
    grid = Grid((0.0,) * k, (1.0,) * k, shape)
    values = rng.normal(size=(grid.size, 2)).astype(np.float32)
    axes = [np.linspace(0, 1, n) for n in shape]
    exact = RegularGridInterpolator(axes, values.reshape(*shape, 2))
    x = rng.uniform(-0.2, 1.2, (10_000, k)).astype(np.float32)
    found = grid.interpolate(values, x)
    assert found == pytest.approx(exact(np.clip(x, 0, 1)), abs=1e-5)
    np.testing.assert_array_equal(grid.interpolate(values, x[8190:8195]), found[8190:8195])
    np.testing.assert_allclose(grid.interpolate(values, grid.nodes().astype(np.float32)), values,
                               atol=1e-6)  # fmt: skip
    x[0, 0] = np.nan
    assert np.isnan(grid.interpolate(values, x[:1])).all()


ARRAYS = [np.arange(6.0).reshape(2, 3), np.array([True, False]), np.zeros((0, 4), np.float32)]


def test_arrays_come_back_as_they_were():
    found = unpack(pack(ARRAYS), "it")
    for one, other in zip(found, ARRAYS, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert unpack(b"", "it") == []


@pytest.mark.parametrize(
    "spoilt", [b"x", pack(ARRAYS)[:-50], pack(ARRAYS)[:100], pack(ARRAYS) + b"x"]
)
def test_damaged_arrays_are_named(spoilt):
    with pytest.raises(ModelError, match="the table is damaged"):
        unpack(spoilt, "the table")


def saved(folder, **changed):
    files = seal("it", {"format": 3, "a": [1.5, None]} | changed, ARRAYS)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def test_a_sealed_model_is_read_and_any_change_is_noticed(tmp_path):
    files = saved(tmp_path)
    assert files == saved(tmp_path) and set(files) == {"it.json", "it.npy"}
    document, arrays = unseal(tmp_path, "it", 3, "thing")
    assert document["a"] == [1.5, None] and len(arrays) == 3
    for name, old, new in (
        ("it.json", b"1.5", b"2.5"),
        ("it.json", b'"a"', b'"b"'),
        ("it.npy", files["it.npy"][-8:], b"12345678"),
        ("it.npy", files["it.npy"][130:], b""),
    ):
        saved(tmp_path)
        (tmp_path / name).write_bytes(files[name].replace(old, new))
        with pytest.raises(ModelError, match=f"{name} is not the file that was saved"):
            unseal(tmp_path, "it", 3, "thing")


def test_missing_files_other_formats_and_what_is_no_document_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ModelError, match=r"it\.json: not the thing of format 4"):
        unseal(tmp_path, "it", 4, "thing")
    for content, message in ((b"{", "not JSON"), (b"[3]", "not the thing of format 3"),
                             (b"\xff", "not JSON")):  # fmt: skip
        (tmp_path / "it.json").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            unseal(tmp_path, "it", 3, "thing")
    saved(tmp_path)
    (tmp_path / "it.npy").unlink()
    with pytest.raises(ModelError, match=r"it\.npy: No such file") as caught:
        unseal(tmp_path, "it", 3, "thing")
    assert "made by a rebuild" in caught.value.hint
    with pytest.raises(ValueError, match="JSON compliant"):
        seal("it", {"a": float("nan")}, [])
    assert json.loads(seal("it", {"format": 1}, [])["it.json"])["format"] == 1
