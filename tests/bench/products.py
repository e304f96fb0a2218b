"""Compare two stores, builds or products: ``python -m tests.bench.products OLD NEW``.

A product whose files have the same SHA-256 is equal. Of any other the values are compared: the
largest difference of every column with its row, rows that only one side has, numbers in JSON and
numpy files. Fingerprints in them do not count. Nothing of `sos_dask` is used, so stores of any
version can be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

_IDS = ("obs_id", "star_id", "target_obs_id", "target_star_id", "reference_star_id", "row")
_BINS = ("bin", "pixel", "bin_low", "teff_low", "logg_low", "level", "fold")
_OCCURRENCE = "occurrence"
_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_MOST_LINES = 40
SAME_VALUES = "same values in other bytes"


def products_of(path: Path) -> dict[str, Path]:
    """Folders of the products of a store, a build or a single artifact, by name."""
    if (path / "manifest.json").is_file():
        return {"product": path}
    build = path / "current" if (path / "current").exists() else path
    if not (build / "build.json").is_file():
        raise SystemExit(f"{path} is no store, build or product: it has no build.json")
    names = json.loads((build / "build.json").read_text())["products"]
    return {name: build / name for name in names}


def matched(
    old: dict[str, Path], new: dict[str, Path], renamed: dict[str, str]
) -> list[tuple[str, str]]:
    """Pairs of names; ``pairs`` finds ``lamost.pairs`` unless ``renamed`` says otherwise."""
    found = []
    for name in old:
        there = [renamed.get(name, name)]
        if there[0] not in new:
            there = [other for other in new if other.endswith(f".{name}")]
        found.append((name, there[0] if len(there) == 1 else ""))
    taken = {other for _, other in found}
    return found + [("", name) for name in new if name not in taken]


def compare(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """Differences between two products, and between the settings that made them, a line each."""
    hashes = [_hashes(folder) for folder in (old, new)]
    both = hashes[0].keys() & hashes[1].keys()
    partitions = [{name for name in names if "/Npix=" in name} for names in hashes]
    lines = []
    if partitions[0] != partitions[1]:
        both -= partitions[0]
        lines.append(f"other partitions ({len(partitions[0])} -> {len(partitions[1])})")
        lines += _tables(_read(old, partitions[0]), _read(new, partitions[1]))
    for text, some, rest in (("old", hashes[0], hashes[1]), ("new", hashes[1], hashes[0])):
        only = some.keys() - rest.keys() - partitions[0] - partitions[1]
        lines += [f"only {text}: {name}" for name in sorted(only)]
    same_values = []
    for name in sorted(both):
        if hashes[0][name] != hashes[1][name]:
            found = _files(old / name, new / name)
            lines += [f"{name}: {line}" for line in found]
            same_values += [] if found else [name]
    if same_values:
        lines.append(f"{SAME_VALUES}: {len(same_values)} files, as {same_values[0]}")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (old, new)]
    for key in ("rows", "summary"):
        found = _documents(*(manifest.get(key, {}) for manifest in manifests))
        lines += [f"manifest, {key}: {line}" for line in found]
    settings = _documents(*(manifest.get("params", {}) for manifest in manifests))
    return lines, [f"settings: {line}" for line in settings]


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json" and not path.name.endswith(".tmp")
    }


def _files(old: Path, new: Path) -> list[str]:
    if old.suffix == ".parquet":
        return _tables(pq.ParquetFile(old).read(), pq.ParquetFile(new).read())
    if old.suffix == ".json":
        return _documents(json.loads(old.read_text()), json.loads(new.read_text()))
    if old.suffix == ".npy":
        return _arrays(np.load(old), np.load(new))
    if old.name == "_common_metadata":
        one, other = pq.read_schema(old), pq.read_schema(new)
        return [] if one.equals(other) else [f"columns {sorted({*one.names} ^ {*other.names})}"]
    if old.suffix in (".csv", ".properties"):
        lines = {*old.read_text().splitlines()} ^ {*new.read_text().splitlines()}
        return [f"{len(lines)} lines differ, as {min(lines, default='')!r}"]
    return [f"{old.stat().st_size} -> {new.stat().st_size} bytes"]


def _read(folder: Path, names: set[str]) -> pa.Table:
    return pa.concat_tables([pq.ParquetFile(folder / name).read() for name in sorted(names)])


def _tables(old: pa.Table, new: pa.Table) -> list[str]:
    lines = []
    gone, came = ([n for n in a.column_names if n not in b.column_names]
                  for a, b in ((old, new), (new, old)))  # fmt: skip
    if gone or came:
        lines.append(f"columns only old: {gone}, only new: {came}")
    common = [name for name in old.column_names if name in new.column_names]
    for name in common:
        if old.schema.field(name).type != new.schema.field(name).type:
            lines.append(f"{name}: {old.schema.field(name).type} -> {new.schema.field(name).type}")
    if old.select(common).equals(new.select(common)):
        return lines
    key = [name for name in common if name in _IDS]
    if not key:
        texts = [name for name in common if pa.types.is_string(old.schema.field(name).type)]
        key = texts + [name for name in common if name in _BINS]
    one, other = _keyed(old.select(common), key), _keyed(new.select(common), key)
    places = one.index.intersection(other.index)
    for text, some, rest in (("old", one, other), ("new", other, one)):
        only = some.index.difference(rest.index)
        if len(only):
            lines.append(f"{len(only)} of {len(some)} rows only {text}, as {_place(only, 0)}")
    one, other = one.loc[places], other.loc[places]
    for name in common if len(places) else ():
        if name not in key and (line := _columns(name, one, other)):
            lines.append(line)
    return lines


def _keyed(table: pa.Table, key: list[str]) -> pd.DataFrame:
    """Rows by key; the n-th row of one key is compared with the n-th of the other side."""
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    index = frame[key].copy()
    for name in index.columns:
        if index[name].dtype.kind == "f":  # edges of bins, whose last digits may differ
            index[name] = index[name].map(lambda value: f"{value:.6g}")
    index = index.astype("string").fillna("")
    index[_OCCURRENCE] = index.groupby(key).cumcount() if key else range(len(index))
    return frame.set_index(pd.MultiIndex.from_frame(index))


def _columns(name: str, old: pd.DataFrame, new: pd.DataFrame) -> str:
    one, other = old[name], new[name]
    nulls = one.isna().to_numpy() != other.isna().to_numpy()
    text = f"{name}: null on one side {nulls.sum()}, as {_place(old.index, nulls.argmax())}"
    text = text if nulls.any() else ""
    both = ~(one.isna() | other.isna()).to_numpy()
    if pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(other):
        if pd.api.types.is_integer_dtype(one) and pd.api.types.is_integer_dtype(other):
            change = (other - one).fillna(0).to_numpy(np.int64).astype(float)
        else:
            change = other.to_numpy(float, na_value=np.nan) - one.to_numpy(float, na_value=np.nan)
        size = np.where(both, np.nan_to_num(np.abs(change)), 0.0)
        if size.any():
            at = int(size.argmax())
            values = f"{one.iloc[at]:.7g} -> {other.iloc[at]:.7g}"
            text += ("; " if text else f"{name}: ") + (
                f"largest difference {size[at]:.3g} ({values}) at {_place(old.index, at)}, "
                f"{np.count_nonzero(size)} of {len(size)} rows"
            )
            error = f"{name}_err"
            if error in old:
                share = size / old[error].to_numpy(float, na_value=np.nan)
                text += f", at most {np.nanmax(share):.3g} of its error"
    else:
        unequal = both & (one.astype("string") != other.astype("string")).to_numpy(bool, na_value=0)
        if unequal.any():
            at = int(unequal.argmax())
            text += ("; " if text else f"{name}: ") + (
                f"{unequal.sum()} of {len(unequal)} rows differ, as {one.iloc[at]!r} -> "
                f"{other.iloc[at]!r} at {_place(old.index, at)}"
            )
    return text


def _place(index: pd.Index[Any], at: int) -> str:
    value = index[int(at)]
    row = dict(zip(index.names, value if isinstance(value, tuple) else (value,), strict=True))
    if row[_OCCURRENCE] == 0 and len(row) > 1:
        del row[_OCCURRENCE]
    known = [f"{name}={value}" for name, value in row.items() if value not in ("", "nan")]
    return " ".join(known) or "a row without a key"


def _arrays(old: np.ndarray, new: np.ndarray) -> list[str]:
    if old.shape != new.shape:
        return [f"shape {old.shape} -> {new.shape}"]
    change = np.nan_to_num(np.abs(new.astype(float) - old.astype(float)))
    if not change.any():
        return []
    at = np.unravel_index(change.argmax(), change.shape)
    place = ", ".join(map(str, at))
    return [
        f"largest difference {change.max():.3g} ({old[at]:.7g} -> {new[at]:.7g}) at [{place}], "
        f"{np.count_nonzero(change)} of {change.size} values"
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts of a JSON value; SHA-256 sums are the same for all."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _leaves(one, f"{path}[{number}]")
    else:
        yield path, _HASH.sub("sha256", value) if isinstance(value, str) else value


def _documents(old: Any, new: Any) -> list[str]:
    one, other = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for text, some, rest in (("old", one, other), ("new", other, one)):
        only = [path for path in some if path not in rest]
        if only:
            shown = ", ".join(f"{path} = {some[path]!r}" for path in only[:3])
            lines.append(f"{len(only)} values only {text}, as {shown}"[:300])
    unequal = [path for path in one if path in other and one[path] != other[path]]
    numbers = [
        (abs(other[path] - one[path]) / max(abs(one[path]), abs(other[path])), path)
        for path in unequal
        if type(one[path]) in (int, float) and type(other[path]) in (int, float)
    ]
    if numbers:
        share, path = max(numbers)
        lines.append(
            f"{len(numbers)} of {len(one)} numbers differ, most by {share:.2g} of itself: "
            f"{path} = {one[path]!r} -> {other[path]!r}"
        )
    seen = {path for _, path in numbers}
    texts = [path for path in unequal if path not in seen]
    return lines + [f"{path} = {one[path]!r} -> {other[path]!r}"[:300] for path in texts[:5]]


def main(arguments: list[str] | None = None) -> int:
    """Print what differs, product by product; 1 where a value does."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.products", description=__doc__)
    parser.add_argument("old", type=Path, help="store, build or product")
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="name of a product"
    )
    parser.add_argument("--only", action="append", default=[], metavar="OLD", help="this product")
    given = parser.parse_args(arguments)
    old, new = products_of(given.old), products_of(given.new)
    unequal = 0
    for name, other in matched(old, new, dict(item.split("=", 1) for item in given.renamed)):
        if given.only and name not in given.only:
            continue
        if not (name and other):
            print(f"{name or other}: only {'old' if name else 'new'}")
            unequal += 1
            continue
        lines, settings = compare(old[name], new[other])
        title = name if name == other else f"{name} -> {other}"
        differs = any(not line.startswith(SAME_VALUES) for line in lines)
        print(f"{title}: {'differs' if differs else 'same values' if lines else 'same bytes'}")
        unequal += differs
        lines += settings
        for line in lines[:_MOST_LINES]:
            print(f"    {line}")
        if len(lines) > _MOST_LINES:
            print(f"    and {len(lines) - _MOST_LINES} differences more")
    return 1 if unequal else 0


if __name__ == "__main__":
    raise SystemExit(main())
