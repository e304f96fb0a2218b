"""Stage projection: a UMAP of target and overlap together, with a place for every row.

Three passes over the partitions: count the strata, collect the sample, place the rows. The plane
is laid out once, between the second and the third.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.columns import FloatArray, floats, key_hashes
from sos_dask.errors import ModelError
from sos_dask.evidence import projection as kernel
from sos_dask.evidence.projection import Projection, ProjectionSettings
from sos_dask.problem import DEFAULT, parameter_matrix
from sos_dask.schema import CANONICAL, HEALPIX, HEALPIX_COLUMN
from sos_dask.stages.base import Made, Place, Role, Run, Stage, loaded, partition_record, places
from sos_dask.stats.numbers import uniform
from sos_dask.storage.artifact import Output, partition_errors
from sos_dask.storage.manifest import Rows
from sos_dask.storage.objects import local

SAMPLE, MAPS, MODEL = "sample.parquet", "maps.parquet", "projection.json"
TARGET, OVERLAP = "target", "overlap"
_INPUTS = {TARGET: "observations", OVERLAP: "pairs"}
_PARAMETERS = tuple(item.column for item in DEFAULT.parameters)
_PLANE = ("umap_1", "umap_2")
_ABOUT = {"description": "Place on the UMAP plane"}
_SCHEMA = pa.schema(
    [HEALPIX.arrow(nullable=False), CANONICAL["obs_id"].arrow(nullable=False)]
    + [pa.field(name, pa.float32(), metadata=_ABOUT) for name in _PLANE]
)


class ProjectionStage(Stage[ProjectionSettings]):
    """Place every observation on a plane laid out from a sample of target and overlap.

    Makes a catalog with ``umap_1`` and ``umap_2`` of every observation in its order (null where a
    parameter is missing, or beyond ``share``), ``sample.parquet`` and ``projection.json`` (the
    plane), and ``maps.parquet``: rows of target and of overlap in each cell of the plane. Summary:
    parameters used and left out, rows of the sample, rows that lack a parameter and rows that were
    not asked for.
    """

    name = "projection"
    version = 6
    Settings = ProjectionSettings
    roles = (Role("observations", "Observations of the target."), Role("pairs", "Pairs."))

    @cached_property
    def parameters(self) -> list[str]:
        """Parameters that observations and pairs have."""
        return self.catalog("pairs").columns(self.catalog("observations").columns(_PARAMETERS))

    def check(self) -> None:
        """Refuse catalogs that share fewer than two parameters."""
        self.catalog("observations").require("obs_id", HEALPIX_COLUMN)
        self.catalog("pairs").require(HEALPIX_COLUMN)
        if len(self.parameters) < 2:
            raise ModelError(
                f"{self.path('observations')} and {self.path('pairs')} share "
                f"{', '.join(self.parameters) or 'none'} of the parameters "
                f"{', '.join(_PARAMETERS)}: a projection needs two",
                "Attach a catalog that has them.",
            )

    def make(self, run: Run) -> Made:
        """Lay out the plane, then place every row."""
        for name in _INPUTS.values():
            self.require_partition(run.cluster, self.catalog(name))
        parts = places({sample: self.catalog(name) for sample, name in _INPUTS.items()})
        n_sample = self._fitted(run, parts)
        placed = run.parts("placed", parts, self.place, "place")
        without = Counter({sample: 0 for sample in _INPUTS})
        bins = self.settings.map_bins
        n = {f"n_{sample}": np.zeros(bins * bins, dtype=np.int64) for sample in _INPUTS}
        for (key, (sample, _)), record in zip(parts.items(), placed, strict=True):
            without[sample] += record["without_place"]
            n[f"n_{sample}"] += run.output.read_piece(f"maps-{key}")["n"].to_numpy()
        target = self.catalog("observations")
        done = placed[: len(target.pixels)]
        n_rows = run.write_catalog(self.product, target.pixels, done, _SCHEMA)
        used = np.flatnonzero(sum(n.values()))
        cells = (index.astype(np.int32) for index in np.divmod(used, bins))
        counts = {name: values[used] for name, values in n.items()}
        run.write(MAPS, pa.table({**dict(zip(("cell_1", "cell_2"), cells, strict=True)), **counts}))
        return Rows(target.n_rows, n_rows), {
            "parameters": self.parameters,
            "left_out": [name for name in _PARAMETERS if name not in self.parameters],
            "sample_rows": n_sample,
            "without_place": dict(without),
            "not_asked": sum(record["not_asked"] for record in done),
        }

    def _fitted(self, run: Run, parts: dict[str, Place]) -> int:
        """Save sample and plane; what a killed run has saved is made again, alike. Its rows."""
        counted = run.parts("strata", parts, self.count, "strata")
        totals: dict[str, Counter[int]] = {sample: Counter() for sample in _INPUTS}
        for (sample, _), record in zip(parts.values(), counted, strict=True):
            totals[sample].update({int(cell): n for cell, n in record["counts"].items()})
        half, names = self.settings.sample_rows // 2, self.parameters
        rates = {sample: kernel.sampling_rates(total, half) for sample, total in totals.items()}
        asked = {key: (place, rates[place[0]]) for key, place in parts.items()}
        run.parts("sampled", asked, self.sample, "sample")
        sample = pa.concat_tables(run.output.read_piece(f"samples-{key}") for key in parts)
        order = [("sample", "descending"), *((name, "ascending") for name in ("place", *names))]
        sample = sample.sort_by(order)
        parameters = np.stack([sample[name].to_numpy() for name in names], axis=1)
        run.report("umap", 0, 1)
        plane = kernel.fit_projection(parameters, names, self.settings)
        run.report("umap", 1, 1)
        known = np.isfinite(parameters).all(axis=1)
        columns = {"sample": sample["sample"].filter(pa.array(known))}
        columns |= dict(zip(names, plane.sample.T.copy(), strict=True))
        columns |= dict(zip(_PLANE, plane.plane.T.copy(), strict=True))
        document = {
            "parameters": names,
            "center": plane.center.tolist(),
            "scale": plane.scale.tolist(),
            "neighbors": plane.neighbors,
            "limits": list(plane.limits()),
        }
        run.write(SAMPLE, pa.table(columns))
        run.write_bytes(MODEL, (json.dumps(document, indent=1) + "\n").encode())
        return int(np.count_nonzero(known))

    def _read(self, place: Place, *keys: str) -> tuple[pa.Table, dict[str, FloatArray]]:
        """Some columns of a partition, and its parameters."""
        sample, pixel = place
        table = self.catalog(_INPUTS[sample]).read(pixel, [*keys, *self.parameters])
        return table.select(keys), {name: floats(table, name) for name in self.parameters}

    def count(self, output: Output, key: str, place: Place) -> dict[str, Any]:
        """Count the rows of each stratum."""
        _, columns = self._read(place)
        cells, counts = np.unique(kernel.strata(columns), return_counts=True)
        return {"counts": dict(zip(map(str, cells.tolist()), counts.tolist(), strict=True))}

    def sample(
        self, output: Output, key: str, item: tuple[Place, dict[int, float]]
    ) -> dict[str, Any]:
        """Keep the rows of the sample."""
        place, rates = item
        keys, columns = self._read(place, HEALPIX_COLUMN)
        numbers, cells = keys[HEALPIX_COLUMN].to_numpy(), kernel.strata(columns)
        chosen = kernel.chosen_rows(numbers, cells, rates, self.settings.seed)
        values = _matrix(columns)[chosen]
        kept = {"sample": pa.array([place[0]] * len(values), pa.string()), "place": numbers[chosen]}
        kept |= dict(zip(self.parameters, values.T.copy(), strict=True))
        output.write_piece(f"samples-{key}", pa.table(kept))
        return {"rows": len(values)}

    def place(self, output: Output, key: str, item: Place) -> dict[str, Any]:
        """Place the rows of a partition."""
        sample, pixel = item
        plane = loaded(load_projection, output.directory, output.fingerprint)
        names = [HEALPIX_COLUMN, "obs_id"] if sample == TARGET else []
        keys, columns = self._read(item, *names)
        parameters = _matrix(columns)
        left = np.zeros(len(parameters), dtype=np.bool_)
        if sample == TARGET and self.settings.share < 1:
            left = uniform(key_hashes(keys["obs_id"]), self.settings.seed) >= self.settings.share
        parameters[left] = np.nan
        place = plane.place(parameters)
        missing = np.isnan(place[:, 0])
        counts = kernel.density_map(place, plane.limits(), self.settings.map_bins)
        output.write_piece(f"maps-{key}", pa.table({"n": counts.ravel()}))
        n_left, n_missing = (int(np.count_nonzero(rows)) for rows in (left, missing))
        record: dict[str, Any] = {"without_place": n_missing - n_left, "not_asked": n_left}
        if sample == TARGET:
            placed = [pa.array(values, pa.float32(), mask=missing) for values in place.T.copy()]
            table = pa.Table.from_arrays([*keys.columns, *placed], schema=_SCHEMA)
            record["file"] = partition_record(output, pixel, table)
        return record


def _matrix(columns: dict[str, FloatArray]) -> FloatArray:
    known = (item for item in DEFAULT.parameters if item.column in columns)
    return parameter_matrix(known, columns)


def load_projection(directory: Path) -> Projection:
    """Load the plane that the stage saved; `ModelError` or `PartitionError` where it is damaged."""
    path = directory / MODEL
    try:
        document = json.loads(path.read_text())
        names = tuple(document["parameters"])
        center, scale = (np.array(document[key], dtype=np.float64) for key in ("center", "scale"))
        neighbors = int(document["neighbors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}") from None
    with partition_errors(directory / SAMPLE):
        table = pq.read_table(local(directory / SAMPLE), columns=[*names, *_PLANE])
    sample, plane = (
        np.stack([table[name].to_numpy() for name in some], axis=1) for some in (names, _PLANE)
    )
    return Projection(names, center, scale, sample, plane, neighbors)
