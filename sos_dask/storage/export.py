"""One file of a catalog, partition by partition; with a data dictionary and a citation of it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask import __version__
from sos_dask.columns import BoolArray, FloatArray
from sos_dask.errors import CatalogError, ConfigError, StorageError
from sos_dask.run.cluster import Report, silent
from sos_dask.sky.healpix import centre, separation_arcsec
from sos_dask.storage import store as stores
from sos_dask.storage.artifact import atomic_path, write_text
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.conditions import condition
from sos_dask.storage.formats import FORMATS, about, plain
from sos_dask.storage.manifest import Manifest
from sos_dask.surveys.definition import Cut, builtin_surveys, load_survey

_PIXEL_RADIUS = 62.0  # deg; healpy.max_pixrad is at most 61.3 deg / nside
_STATED = ("obs_title", "bib_reference", "obs_copyright")  # properties of others
_PAPER = "https://ui.adsabs.harvard.edu/abs/"


def export(
    catalog: Catalog, path: Path, *, columns: Sequence[str] = (), where: str = "",
    cone: Sequence[float] | None = None, dictionary: Path | None = None,
    citation: Path | None = None, overwrite: bool = False, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write a catalog to one file, in memory of one partition; the file appears complete.

    Parameters
    ----------
    path : path
        Its end names the format: one of `formats.FORMATS`.
    columns : sequence of str
        Names in their order; by default all.
    where : str
        Only rows that pass, such as ``teff > 4000 and flag_sos & 23 == 0`` (`condition`).
    cone : sequence of float, optional
        Right ascension, declination and radius, deg: only rows in it, of the partitions it touches.
    dictionary, citation : path, optional
        Columns with unit, range, nulls, bits (.md, .csv or .json); surveys, papers (.txt or .bib).

    Returns
    -------
    dict
        ``path``, ``rows``, ``bytes`` and ``columns``, as in the dictionary.
    """
    kinds = (FORMATS, (".md", ".csv", ".json"), (".txt", ".bib"))
    for file, known in zip((path, dictionary, citation), kinds, strict=True):
        if file is not None and file.suffix not in known:
            raise ConfigError(f"{file} ends with no known format", f"Known: {', '.join(known)}.")
        if file and (path == dictionary or file.is_dir() or (file.exists() and not overwrite)):
            raise StorageError(f"{file} exists", "Choose another name, or give --overwrite.")
    names = list(columns) or catalog.schema.names
    catalog.require(*names)
    if len(set(names)) < len(names):
        raise ConfigError(f"a column is named twice: {', '.join(names)}")
    fields = [catalog.schema.field(name) for name in names]
    schema = pa.schema(fields if path.suffix == ".parquet" else map(plain, fields))
    passes, needed = condition(where, catalog) if where.strip() else (None, [])
    pixels, inside = list(catalog.pixels), partial(_inside, cone or ())
    if cone is not None:
        if not (math.isfinite(cone[0]) and abs(cone[1]) <= 90 and 0 < cone[2] <= 180):
            raise ConfigError(f"no cone: {cone}", "Give RA DEC RADIUS in degrees.")
        pixels = [x for x in pixels if inside(*centre(x), _PIXEL_RADIUS / 2**x.order)[0]]
        needed += ["ra", "dec"]
    n_rows = 0
    begin: dict[str, Any] = {"nulls": 0, "min": None, "max": None}
    lines = [{**about(item), "type": str(item.type), **begin} for item in schema]

    def read(some: pa.Schema) -> Iterator[pa.Table]:
        nonlocal n_rows
        wanted = list(dict.fromkeys([*some.names, *needed]))
        for number, pixel in enumerate(pixels):
            report(f"export {catalog.name}", number, len(pixels))
            table = catalog.read(pixel, wanted)
            table = table if passes is None else table.filter(passes)
            if cone is not None:
                table = table.filter(inside(table["ra"].to_numpy(), table["dec"].to_numpy()))
            table = table.select(some.names).cast(some)
            if some is schema:
                n_rows += table.num_rows
                for line, column in zip(lines, table.columns, strict=True):
                    _count(line, column)
            yield table
        report(f"export {catalog.name}", len(pixels), len(pixels))

    with atomic_path(path) as temporary:
        FORMATS[path.suffix](temporary, catalog.name, schema, read)
        n_bytes = temporary.stat().st_size
    entries, quality = _sources(catalog)
    for line in lines:
        told = re.findall(r"(?:^|; )(\d+): ([^;]+)", line["description"])
        of_flag = {int(bit): text for bit, text in told if line["name"].startswith("flag")}
        line["bits"] = quality if line["name"] == "quality" else of_flag
    if dictionary is not None:
        write_text(dictionary, _dictionary(dictionary.suffix, catalog.name, n_rows, lines))
    if citation is not None:
        write_text(citation, "\n".join(_cited(entries, citation.suffix == ".bib")))
    return {"path": path, "rows": n_rows, "bytes": n_bytes, "columns": lines}


def _inside(
    cone: Sequence[float], ra: FloatArray, dec: FloatArray, wider: float = 0.0
) -> BoolArray:
    """Places in a cone, whose radius may be wider; deg."""
    at = np.array([cone[0]]), np.array([cone[1]])
    return np.asarray(separation_arcsec(*at, ra, dec) <= 3600 * (cone[2] + wider))


# -- data dictionary ------------------------------------------------------------------------------


def _count(line: dict[str, Any], column: pa.ChunkedArray) -> None:
    """Add the values of a column to its range and nulls; text has no range."""
    line["nulls"] += column.null_count
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        for (key, end), best in zip(pc.min_max(column).items(), (min, max), strict=True):
            known = [x for x in (line[key], end.as_py()) if x is not None and math.isfinite(x)]
            line[key] = best(known, default=None)


def _dictionary(suffix: str, name: str, n_rows: int, lines: Sequence[Mapping[str, Any]]) -> str:
    if suffix == ".json":
        return json.dumps({"catalog": name, "rows": n_rows, "columns": lines}, indent=1) + "\n"
    cells = [list(lines[0])]
    for *values, bits in (line.values() for line in lines):
        texts = ["" if value is None else str(value) for value in values]
        cells.append([*texts, "; ".join(f"{bit}: {meaning}" for bit, meaning in bits.items())])
    if suffix == ".csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(cells)
        return out.getvalue()
    cells.insert(1, ["---"] * len(cells[0]))
    rows = (" | ".join(text.replace("|", "/") for text in row) for row in cells)
    return f"# {name}: {n_rows:,} rows\n\n" + "".join(f"| {row} |\n" for row in rows)


# -- citation -------------------------------------------------------------------------------------


def _behind(made: Manifest, store: Path) -> Iterator[Manifest]:
    """Yield a manifest and those of all that it is made of, first what its rows are from."""
    todo, seen = [made], set[str]()
    while todo:
        yield (one := todo.pop())
        roles = sorted(one.recipe.inputs, key=lambda role: role in stores.ROW_INPUTS)
        for name in [one.recipe.inputs[role] for role in roles]:
            for place in (
                (store / "artifacts").glob(f"*/{escape(name)}") if name not in seen else ()
            ):
                with suppress(CatalogError):
                    todo.append(Manifest.load(place))
            seen.add(name)


def _sources(catalog: Catalog) -> tuple[dict[str, dict[str, str]], dict[int, str]]:
    """Find build, surveys and papers behind a catalog, and what the bits of its quality mean."""
    made, parents = catalog.manifest, catalog.path.resolve().parents
    store = next((path.parent for path in parents if path.name == "artifacts"), catalog.path.parent)
    first = {"title": catalog.name, "exported_by": f"sos-dask {__version__}"}
    first |= {key: catalog.properties[key] for key in _STATED if key in catalog.properties}
    entries, quality, files = {catalog.name: first}, dict[int, str](), stores.file_names(store)
    for build in stores.builds_in(store):
        with suppress(CatalogError):
            if made and made.fingerprint in stores.read_build(build)["products"].values():
                first |= {"build": build.name, "fingerprint": made.fingerprint}
    for one in _behind(made, store) if made else ():
        if one.recipe.stage == "ingest":
            survey = one.recipe.params["settings"]["survey"]
            names = [f"{files.get(x, '')} sha256:{x}".strip() for x in one.recipe.inputs.values()]
            entry = {"title": survey["name"], "files": ", ".join(names)}
            if survey["name"] in builtin_surveys():
                known = load_survey(survey["name"])
                papers = ", ".join(f"{_PAPER}{bibcode}" for bibcode in known.citation)
                entry |= {"title": known.title, "note": known.reference, "papers": papers}
            entries[survey["name"]] = entry
            cuts = [Cut(name=name, **cut) for name, cut in survey["cuts"].items()]
            bits = {1 << cut.bit: f"not {cut.test_text()}" for cut in cuts}
            quality = quality or dict(sorted(bits.items()))
    return entries, quality


def _cited(entries: Mapping[str, Mapping[str, str]], bibtex: bool) -> Iterator[str]:
    """Lines of a citation file."""
    for name, entry in entries.items():
        yield f"@misc{{{name}," if bibtex else name
        for key, text in entry.items():
            escaped = re.sub(r"([_&%#$])", r"\\\1", text)
            yield f"  {key} = {{{escaped}}}," if bibtex else f"  {key}: {text}"
        yield "}\n" if bibtex else ""
