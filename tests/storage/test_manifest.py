import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.errors import CatalogError
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import (
    MANIFEST,
    Manifest,
    Recipe,
    Rows,
    canonical_json,
    footer_bytes,
    sealed_json,
    sum_of_file,
)

RECIPE = Recipe("dedupe", 1, {"radius_arcsec": 1.5}, {"observations": "abc"})
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_fingerprint_does_not_depend_on_the_order_of_keys(params):
    backwards = dict(reversed(params.items()))
    assert Recipe("s", 1, params, {}).fingerprint == Recipe("s", 1, backwards, {}).fingerprint


@given(st.dictionaries(st.text(), json_values, min_size=1, max_size=5), st.data())
def test_any_changed_setting_is_another_fingerprint(params, data):
    key = data.draw(st.sampled_from(sorted(params)))
    changed = {**params, key: data.draw(json_values)}
    same = canonical_json(params) == canonical_json(changed)
    before, after = Recipe("s", 1, params, {}), Recipe("s", 1, changed, {})
    assert (before.fingerprint == after.fingerprint) is same


def test_each_part_of_a_recipe_counts():
    others = [
        Recipe("other", 1, RECIPE.params, RECIPE.inputs),
        Recipe("dedupe", 2, RECIPE.params, RECIPE.inputs),
        Recipe("dedupe", 1, {"radius_arcsec": 2.0}, RECIPE.inputs),
        Recipe("dedupe", 1, RECIPE.params, {"observations": "abd"}),
    ]
    assert len({RECIPE.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: {**raw, "format": 99}, "newer"),
        (lambda raw: {**raw, "format": 1}, "of an older version of sos-dask.*Run the rebuild"),
        (lambda raw: {**raw, "params": {"radius_arcsec": 2}}, "was changed"),
        (lambda raw: {key: value for key, value in raw.items() if key != "rows"}, "damaged"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path, change, message):
    Output.prepare(tmp_path, RECIPE).commit(Rows(0, 0), ())
    path = tmp_path / MANIFEST
    path.write_text(sealed_json(change(json.loads(path.read_text()))))
    with pytest.raises(CatalogError, match=f"(?s){message}"):
        Manifest.load(tmp_path)


def test_an_output_of_another_version_of_its_stage_is_refused(tmp_path):
    Output.prepare(tmp_path, RECIPE).commit(Rows(0, 0), ())
    assert Manifest.of_stage(tmp_path, "dedupe", 1).recipe == RECIPE
    with pytest.raises(CatalogError, match=r"version 1 of 'dedupe', known here is version 2"):
        Manifest.of_stage(tmp_path, "dedupe", 2)
    with pytest.raises(CatalogError, match="not an output of 'reference' but of 'dedupe'"):
        Manifest.of_stage(tmp_path, "reference", 1)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CatalogError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, (1 << 18) - 1, 1 << 18, (1 << 18) + 3])
def test_the_sum_of_a_file_is_of_its_words(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(content)
    words = np.frombuffer(content + bytes(-size % 8), "<u8")
    stated = sum_of_file(tmp_path / "a")
    assert stated[0] == size and (stated[1] - sum(map(int, words))) % 2**64 == 0
    assert sum_of_file(tmp_path / "none") == []


def test_the_footer_is_what_arrow_reads(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": range(100)}), path, row_group_size=10)
    footer = footer_bytes(path)
    assert path.read_bytes().endswith(footer) and footer.endswith(b"PAR1")
    assert pq.read_metadata(pa.BufferReader(footer)).equals(pq.read_metadata(path))
    for content in (b"", b"PAR1", b"x" * 40 + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(content)
        with pytest.raises((OSError, pa.ArrowException)):
            pq.read_metadata(pa.BufferReader(footer_bytes(path)))


def test_files_are_compared_by_what_is_asked_for(tmp_path):
    output = Output.prepare(tmp_path, RECIPE)
    small = output.write_bytes("small", b"content")
    large = output.write_bytes("dataset/Norder=0/Dir=0/Npix=0.parquet.x", b"rows of a partition")
    output.commit(Rows(0, 0), (small, large))
    assert set(Manifest.checked(tmp_path).files) == {small, large}
    (tmp_path / large.path).write_bytes(b"rows of A partition")
    Manifest.checked(tmp_path), Manifest.checked(tmp_path, "size")
    with pytest.raises(CatalogError, match="its SHA-256 is not"):
        Manifest.checked(tmp_path, "sha256")
    (tmp_path / "small").write_bytes(b"Content")
    Manifest.checked(tmp_path, "size")
    with pytest.raises(CatalogError, match="small was changed"):
        Manifest.checked(tmp_path)
    (tmp_path / large.path).write_bytes(b"rows")
    with pytest.raises(CatalogError, match="has 4 bytes, the manifest says 19"):
        Manifest.checked(tmp_path, "size")


def test_a_number_of_rows_is_one():
    Rows(1 << 62, 0)
    wrong: Any
    for wrong in (-1, (1 << 62) + 1, True, 1.0, "1"):
        with pytest.raises(ValueError, match="not a number of rows"):
            Rows(0, wrong)
        with pytest.raises(ValueError, match="not a number of rows"):
            Rows(0, 0, 0, {"merged": wrong})
