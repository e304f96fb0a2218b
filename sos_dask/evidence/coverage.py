"""How well the overlap represents a star: a distance to the overlap, calibrated as error growth.

A measure gives every row a distance from the overlap, small where overlap stars are dense. On pairs
that no correction was trained on, the residual in units of the noise at its signal to noise grows
with that distance. The growth is 1 in the nearer half of the pairs and rises with what is measured
beyond (`growth.Growth`); coverage = 1 / growth, so a coverage c says: the error of the corrected
labels is 1/c times that of a star of the same signal to noise in the dense overlap. The rows are
*inside*, *sparse* or *outside* by two limits of the coverage. Outside are, too, rows of a kind that
the overlap lacks, near which it has less than a quarter of the stars that the number of such rows
calls for (`measures.Share`), and rows beyond the outermost held-out pairs, where growth cannot be
measured: the coverage of both is held below the limit.

The error model of a correction knows something of all this already. What it does not know is
counted on held-out pairs: for each kind of place, apart for the two classes of the error model, by
what its half-widths are to be multiplied to hold 68 % of all measurements (`widths`; Mondrian
conformal prediction, see `uncertainty`). Places outside are of two kinds. Where stars of all
surveys are few, pairs are there, and many are wrong measurements. Where the overlap alone lacks
stars there are no pairs, and the widths are extrapolated.

Measures (``MEASURES``):

* ``neighbours``: distance to the k-th nearest overlap star in robustly scaled (Teff, log g,
  [Fe/H]), the labels that a correction sees;
* ``neighbours8``: the same in all parameters that the catalog has;
* ``ratio``: density of the catalog over that of the overlap in all parameters, by a classifier
  (Sugiyama, Suzuki & Kanamori 2012, Density Ratio Estimation in Machine Learning, chapter 4);
* ``mixture``: density of the overlap in the three labels as a mixture of Gaussians, as a distance:
  density^(-1/3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.evidence.growth import Growth, Noise
from sos_dask.evidence.measures import Measure, Mixture, Neighbours, Ratio, Share
from sos_dask.evidence.widening import LACKING, Limits, Widths
from sos_dask.problem import parameters_of
from sos_dask.schema import LABELS

FloatArray = NDArray[np.float64]
_REACH = 0.6  # beyond it the polynomial is worse than a constant, on the simulation
_FORMAT = 4
MODEL_FILE = "coverage.json"


@dataclass(frozen=True)
class CoverageModel:
    """A measure with its scaling, and what its distances mean.

    Parameters
    ----------
    name : str
        One of `MEASURES`.
    parameters : tuple of str
        Parameters that the catalog has, in the order of the columns of the measure.
    center, scale : ndarray of float64, shape (k,)
    measure : Measure
    noise : Noise
    growth : Growth
    limits : Limits
    share : Share
        Of the overlap stars and a sample of the catalog, in scaled labels.
    widths : Widths
        How the half-widths of an error model are widened.
    """

    name: str
    parameters: tuple[str, ...]
    center: FloatArray
    scale: FloatArray
    measure: Measure
    noise: Noise
    growth: Growth
    limits: Limits
    share: Share = field(repr=False)
    widths: Widths

    def scaled(self, columns: Mapping[str, NDArray[np.floating]]) -> FloatArray:
        """Parameters of rows on the scale of the model, nan where unknown."""
        return (parameters_of(columns, self.parameters) - self.center) / self.scale

    def distance(self, columns: Mapping[str, NDArray[np.floating]]) -> FloatArray:
        """Distance of rows from the overlap, nan where a label is missing."""
        return self.measure.distance(self.scaled(columns))

    def coverage(
        self, columns: Mapping[str, NDArray[np.floating]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Coverage of rows, 0 to 1, and which of `KINDS` their places are.

        nan and -1 where a label is missing.
        """
        x = self.scaled(columns)
        return self.coverage_at(x, self.measure.distance(x), self.share)

    def coverage_at(
        self, x: FloatArray, distance: FloatArray, share: Share
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """See `coverage`: of scaled rows at known distances from the overlap of ``share``."""
        coverage = (1.0 / self.growth(distance)).astype(np.float32)
        lacks = share.lacks(x[:, : len(LABELS)], distance if self.name == "neighbours" else None)
        outside = lacks | (distance > self.growth.last)
        below = np.nextafter(np.float32(self.limits.outside), np.float32(0))
        coverage[outside] = np.minimum(coverage[outside], below)
        kind = self.limits.classify(coverage)
        kind[lacks] = LACKING
        kind[np.isnan(coverage)] = -1
        return coverage, kind

    def within_reach(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features drawn towards their nearest overlap star until they are just outside.

        A smooth correction can be extended a little beyond its data, not without end: what is
        predicted at the returned place is held constant farther out.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)
            See `features.features`; finite.
        """
        if "_tree" not in self.__dict__:
            from sos_dask.stats.kdtree import Tree

            self.__dict__["_tree"] = Tree(self.share.overlap)
        center, scale = self.center[: len(LABELS)], self.scale[: len(LABELS)]
        x = (features - center) / scale
        distance, index = self.__dict__["_tree"].nearest(x)
        reach = self.reach
        share = np.minimum(1.0, reach / np.maximum(distance, 1e-12))[:, None]
        near = self.share.overlap[index]
        return np.asarray((near + (x - near) * share) * scale + center, dtype=np.float32)

    @property
    def reach(self) -> float:
        """Scaled distance to the nearest overlap star up to which a smooth model is extended."""
        return _REACH

    def save(self, directory: Path) -> None:
        """Write ``coverage.json`` and the arrays of the measure."""
        np.save(directory / "overlap.npy", self.share.overlap)
        np.save(directory / "catalog.npy", self.share.catalog)
        document: dict[str, Any] = {
            "format": _FORMAT,
            "measure": self.name,
            "parameters": list(self.parameters),
            "center": self.center.tolist(),
            "scale": self.scale.tolist(),
            "noise": asdict(self.noise),
            "growth": asdict(self.growth),
            "limits": asdict(self.limits),
            "widths": self.widths.factors.tolist(),
            "lonely": None if self.widths.lonely is None else self.widths.lonely.tolist(),
        }
        if isinstance(self.measure, Ratio):
            (directory / "ratio.ubj").write_bytes(self.measure.model)
        elif isinstance(self.measure, Mixture):
            arrays = {name: value.tolist() for name, value in vars(self.measure).items()}
            document["mixture"] = arrays
        elif self.name == "neighbours8" and isinstance(self.measure, Neighbours):
            np.save(directory / "overlap8.npy", self.measure.overlap)
        (directory / MODEL_FILE).write_text(json.dumps(document, indent=1, sort_keys=True))

    @classmethod
    def load(cls, directory: Path) -> CoverageModel:
        """Read a saved model.

        Raises
        ------
        ModelError
            A file is missing, damaged or of another format.
        """
        try:
            document = json.loads((directory / MODEL_FILE).read_text())
            if document["format"] != _FORMAT:
                raise ModelError(
                    f"{directory / MODEL_FILE} has format {document['format']}, not {_FORMAT}",
                    "Make the product again with this version of sos-dask.",
                )
            name = document["measure"]
            overlap = np.load(directory / "overlap.npy")
            measure: Measure
            if name == "ratio":
                measure = Ratio((directory / "ratio.ubj").read_bytes())
            elif name == "mixture":
                measure = Mixture(**{k: np.array(v) for k, v in document["mixture"].items()})
            elif name == "neighbours8":
                measure = Neighbours(np.load(directory / "overlap8.npy"))
            else:
                measure = Neighbours(overlap)
            lonely = document["lonely"]
            noise = {key: tuple(map(tuple, value)) for key, value in document["noise"].items()}
            growth = document["growth"]
            return cls(
                name,
                tuple(document["parameters"]),
                np.array(document["center"]),
                np.array(document["scale"]),
                measure,
                Noise(**noise),
                Growth(tuple(growth["distance"]), tuple(growth["growth"]), float(growth["last"])),
                Limits(**document["limits"]),
                Share(overlap, np.load(directory / "catalog.npy")),
                Widths(
                    np.array(document["widths"]), lonely if lonely is None else np.array(lonely)
                ),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the coverage model in {directory} is missing or damaged: {error!r}",
                "Make the product again.",
            ) from None
