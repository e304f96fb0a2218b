"""Small survey files for tests, and what is read from them."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits

from sos_dask.errors import SosError, SurveyError
from sos_dask.ingest.canonical import Profile, plan_chunks, read_chunk
from sos_dask.ingest.reader import open_source
from sos_dask.schema import TEXT_UNITS
from sos_dask.surveys.definition import Survey, parse_survey

NAMES = ("obsid", "ra", "dec", "teff", "logg", "feh")


def survey(columns: dict | None = None, **more) -> Survey:
    """The least survey, with more columns (None removes one) and settings."""
    base = {name: {"source": name} for name in NAMES[1:]}
    base["obs_id"] = {"source": "obsid"}
    base.update(columns or {})
    raw = {"format": 1, "name": "mock", "title": "Mock", "position_epoch": 2000.0}
    raw |= {"missing": [-9999.0], "columns": base}
    return parse_survey(raw | more)


def rows(n: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "obsid": rng.permutation(n).astype(np.int64) + 1,
        "ra": rng.uniform(0, 360, n),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
        "teff": rng.uniform(4000, 7000, n).astype(np.float32),
        "logg": rng.uniform(0.5, 5, n).astype(np.float32),
        "feh": rng.uniform(-2, 0.4, n).astype(np.float32),
    }


def write_fits(path: Path, data: dict, units: dict | None = None) -> Path:
    columns = []
    codes = {"f4": "E", "f8": "D", "i8": "K", "i4": "J", "i2": "I", "u1": "B", "b1": "L"}
    for name, given_array in data.items():
        array = np.asarray(given_array)
        if array.dtype.kind == "U":
            array = np.char.encode(array, "latin-1")
        width = array.shape[1] if array.ndim == 2 else ""
        kind = array.dtype.str[1:]
        code = f"{array.dtype.itemsize}A" if kind[0] == "S" else f"{width}{codes[kind]}"
        columns.append(fits.Column(name, code, array=array, unit=(units or {}).get(name)))
    fits.BinTableHDU.from_columns(columns, name="CATALOG").writeto(path, overwrite=True)
    return path


def write_csv(path: Path, data: dict, delimiter: str = ",") -> Path:
    lines = [delimiter.join(data)]
    for values in zip(*data.values(), strict=True):
        lines.append(delimiter.join("" if v is None else str(v) for v in values))
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Read:
    rows: pa.Table
    rejected: pa.Table
    profile: Profile
    batches: list = field(default_factory=list)

    def column(self, name: str):
        """Values in the order of the file, without rejected rows."""
        return self.rows.sort_by([("_file", "ascending"), ("_row", "ascending")])[name].to_pylist()


def read(path: Path, definition: Survey, chunk_rows=1_000_000, batch_rows=1_000_000, index=0):
    source = open_source(path, definition, index, path.parent / "scratch")
    source = pickle.loads(pickle.dumps(source))
    batches = [
        batch
        for chunk in plan_chunks(source, chunk_rows)
        for batch in read_chunk(chunk, definition, batch_rows)
    ]
    profile = Profile.merge([batch.profile for batch in batches])
    return Read(
        pa.concat_tables([batch.rows for batch in batches]),
        pa.concat_tables([batch.rejected for batch in batches]),
        profile,
        batches,
    )


def fails(path: Path, definition: Survey, *words: str) -> SosError:
    """The error of reading a file; the message must name the file and hold the words."""
    with pytest.raises(SurveyError) as caught:
        read(path, definition)
    text = str(caught.value)
    assert str(path) in text
    for word in words:
        assert word in text, text
    return caught.value


def ipc_bytes(table: pa.Table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def document(**changes: Any) -> dict[str, Any]:
    """The smallest valid definition, with changes; None removes a key."""
    raw: dict[str, Any] = {
        "format": 1,
        "name": "tiny",
        "title": "A tiny survey",
        "columns": {
            name: {"source": name} for name in ("obs_id", "ra", "dec", "teff", "logg", "feh")
        },
        "cuts": {"snr": {"bit": 0, "column": "snr", "min": 20}},
        **changes,
    }
    return {key: value for key, value in raw.items() if value is not None}


def with_column(name: str, entry: Any) -> dict[str, Any]:
    raw = document()
    raw["columns"][name] = entry
    return raw


def with_extra(entry: Any, name: str = "flag") -> dict[str, Any]:
    return document(extra={name: entry})


def with_cut(**entry: Any) -> dict[str, Any]:
    return document(cuts={"one": {"bit": 0, "column": "snr", **entry}})


def unit_is_known(unit: str) -> bool:
    from astropy import units

    return unit in TEXT_UNITS or units.Unit(unit) is not None
