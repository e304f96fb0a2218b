"""How well the overlap represents a row, as a number with a meaning (see `coverage.model`)."""

from sos_dask.coverage.fit import Fit, Overlap, check_measure, fit
from sos_dask.coverage.growth import MIN_GROWTH_PAIRS, Growth, Noise, residual_width
from sos_dask.coverage.maps import MAP_SCHEMA, SKY_ORDER, coarse, count_maps, follow_up, sum_maps
from sos_dask.coverage.measures import MEASURES
from sos_dask.coverage.model import CoverageModel
from sos_dask.coverage.ranking import Ranking, compare
from sos_dask.coverage.widths import (
    CLASSES,
    INSIDE,
    KIND_FIELD,
    KINDS,
    LACKING,
    OUTSIDE,
    SPARSE,
    Limits,
    Target,
    counted,
)

__all__ = [
    "CLASSES",
    "INSIDE",
    "KINDS",
    "KIND_FIELD",
    "LACKING",
    "MAP_SCHEMA",
    "MEASURES",
    "MIN_GROWTH_PAIRS",
    "OUTSIDE",
    "SKY_ORDER",
    "SPARSE",
    "CoverageModel",
    "Fit",
    "Growth",
    "Limits",
    "Noise",
    "Overlap",
    "Ranking",
    "Target",
    "check_measure",
    "coarse",
    "compare",
    "count_maps",
    "counted",
    "fit",
    "follow_up",
    "residual_width",
    "sum_maps",
]  # fmt: skip
