"""What a file looks like, and whether that can be what its survey says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import SurveyError
from sos_dask.schema import LABELS
from sos_dask.surveys.definition import Survey

Example = tuple[int, int, str]


@dataclass(frozen=True)
class Profile:
    """Counts that tell whether a file is what its survey says; they merge exactly, in any order.

    Parameters
    ----------
    n_rows : int
        Rows read, rejected ones among them.
    rejected : mapping of str to int
        Rows by reason.
    first_rejected : tuple of (file index, row, text), optional
    nulls : mapping of str to int
        Nulls of each column of the product.
    impossible : mapping of str to int
        Values outside the limits of their column (they are nulls too).
    first_impossible : mapping of str to tuple of (file index, row, value)
    bounds : mapping of str to tuple of (smallest, largest)
        Of ``ra`` and ``dec``, as the file has them, deg.
    labels : mapping of str to mapping of int to int
        Rows in each sixteenth of an octave of a label, impossible values among them.
    """

    n_rows: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    first_rejected: Example | None = None
    nulls: Mapping[str, int] = field(default_factory=dict)
    impossible: Mapping[str, int] = field(default_factory=dict)
    first_impossible: Mapping[str, Example] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    labels: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @classmethod
    def merge(cls, profiles: Sequence[Profile]) -> Profile:
        """Profile of all rows together."""
        impossible: dict[str, Example] = {}
        bounds: dict[str, tuple[float, float]] = {}
        for profile in profiles:
            for name, example in profile.first_impossible.items():
                impossible[name] = min(example, impossible.get(name, example))
            for name, (low, high) in profile.bounds.items():
                known = bounds.get(name, (low, high))
                bounds[name] = (min(low, known[0]), max(high, known[1]))
        labels = sorted({name for profile in profiles for name in profile.labels})
        rejected = [item.first_rejected for item in profiles if item.first_rejected is not None]
        return cls(
            n_rows=sum(profile.n_rows for profile in profiles),
            rejected=added([profile.rejected for profile in profiles]),
            first_rejected=min(rejected, default=None),
            nulls=added([profile.nulls for profile in profiles]),
            impossible=added([profile.impossible for profile in profiles]),
            first_impossible=dict(sorted(impossible.items())),
            bounds=dict(sorted(bounds.items())),
            labels={name: added([p.labels.get(name, {}) for p in profiles]) for name in labels},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        plain = {name: dict(value) for name, value in vars(self).items() if hasattr(value, "items")}
        for name in ("bounds", "first_impossible"):
            plain[name] = {key: list(value) for key, value in plain[name].items()}
        plain["labels"] = {
            name: {str(key): count for key, count in counts.items()}
            for name, counts in self.labels.items()
        }
        first = None if self.first_rejected is None else list(self.first_rejected)
        return {"n_rows": self.n_rows, "first_rejected": first, **plain}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Profile:
        """Inverse of `to_dict`."""
        first = raw["first_rejected"]
        examples = {name: (f, r, v) for name, (f, r, v) in raw["first_impossible"].items()}
        return cls(
            n_rows=raw["n_rows"],
            rejected=raw["rejected"],
            first_rejected=None if first is None else (first[0], first[1], first[2]),
            nulls=raw["nulls"],
            impossible=raw["impossible"],
            first_impossible=examples,
            bounds={name: (low, high) for name, (low, high) in raw["bounds"].items()},
            labels={
                name: {int(key): count for key, count in counts.items()}
                for name, counts in raw["labels"].items()
            },
        )

    def impossible_values(self) -> dict[str, int]:
        """Columns that had values outside their limits, with the number of them."""
        return {name: count for name, count in sorted(self.impossible.items()) if count}

    def median(self, label: str) -> float | None:
        """Median of a label to about 4 %, impossible values among them; None without values."""
        counts = self.labels.get(label, {})
        if not counts:
            return None
        bins = np.array(list(counts), dtype=np.int32)
        centres = ((bins << LABEL_SHIFT) | (1 << (LABEL_SHIFT - 1))).view(np.float32)
        order = np.argsort(centres)
        total = np.cumsum(np.array(list(counts.values()))[order])
        return float(centres[order][np.searchsorted(total, (total[-1] + 1) // 2)])


LABEL_SHIFT = 19  # keeps sign, exponent and four bits of the fraction of a float32


def added(counts: Sequence[Mapping[Any, int]]) -> dict[Any, int]:
    """Sums of counts by key, sorted."""
    total: dict[Any, int] = {}
    for item in counts:
        for key, count in item.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items()))


def binned(bins: NDArray[Any]) -> dict[int, int]:
    """How often each integer stands in an array."""
    if not len(bins):
        return {}
    low = int(bins.min())
    counts = np.bincount(bins - low)
    return {low + int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def check_profile(profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    """Refuse files that cannot be what their survey says.

    Parameters
    ----------
    profile : Profile
        Of all rows of the job.
    survey : Survey
    files : sequence of str
        Name of each file, by its index.

    Raises
    ------
    SurveyError
        Too many rejected rows; right ascension in hours or radians, unless the survey allows
        ``ra_below_24``; a label in another unit, as a logarithm or without any value.
    """
    n_rejected, n_rows = sum(profile.rejected.values()), profile.n_rows
    is_many = n_rejected > survey.max_rejected_fraction * n_rows
    if is_many and profile.first_rejected and (n_rejected >= 10 or 2 * n_rejected > n_rows):
        file, row, text = profile.first_rejected
        counts = ", ".join(f"{count} {reason}" for reason, count in profile.rejected.items())
        raise SurveyError(
            f"survey {survey.name}: {n_rejected} of {n_rows} rows cannot be used ({counts}); the "
            f"first is {files[file]} row {row}: {text}",
            "Check the columns of the survey; if the file is right, raise max_rejected_fraction "
            f"({survey.max_rejected_fraction:g}).",
        )
    if n_rows >= 50 and "ra" in profile.bounds and "dec" in profile.bounds:
        (ra_low, ra_high), (dec_low, dec_high) = profile.bounds["ra"], profile.bounds["dec"]
        ra_span, dec_span = ra_high - ra_low, dec_high - dec_low
        unit = ""
        if ra_low >= 0 and ra_high <= 24 and ra_span > 12 and dec_span > 20:
            unit = "hours"
        # A wide survey in radians fills this box; few fields in degrees do, from edge to edge.
        elif ra_low >= 0 and ra_high <= 6.2832 and max(-dec_low, dec_high) <= 1.5708:
            unit = "radians" if ra_span > 4 and dec_span > 1 else ""
        if unit and "ra_below_24" not in survey.allow:
            fix = {
                "hours": 'unit = "hourangle" in [columns.ra]',
                "radians": 'unit = "rad" in [columns.ra] and [columns.dec]',
            }
            raise SurveyError(
                f"{files[0]}: column {_native_names(survey, 'ra')} ('ra') runs from {ra_low:g} to "
                f"{ra_high:g}: it looks like {unit}, not degrees",
                f'Set {fix[unit]}; if they are degrees, allow = ["ra_below_24"] in the survey.',
            )
    for label in LABELS:
        if label in survey.columns:  # a companion of a survey has none
            _check_label(label, profile, survey, files)


def _check_label(label: str, profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    where = f"column {_native_names(survey, label)} ('{label}')"
    column = survey.columns[label].column
    median = profile.median(label)
    n_impossible = profile.impossible.get(label, 0)
    n_valid = profile.n_rows - profile.nulls.get(label, 0)
    if label == "teff" and median is not None and 3 <= median <= 5 and n_impossible > n_valid:
        raise SurveyError(
            f"{files[0]}: {where} looks like log10 of a temperature: its median is {median:.2f}",
            "Use a file with the temperature in K.",
        )
    if n_impossible > n_valid and n_impossible >= 10:
        file, row, value = profile.first_impossible[label]
        raise SurveyError(
            f"{files[file]}: {where}: {n_impossible} of {n_impossible + n_valid} values are not "
            f"within {column.minimum:g} to {column.maximum:g} {column.unit}, the first is {value} "
            f"in row {row}; the median is about {median:.3g}",
            f"Check its unit and its 'missing' values in [columns.{label}].",
        )
    if n_valid == 0 and profile.n_rows:
        raise SurveyError(
            f"{', '.join(files)}: {where} has no value in any row",
            f"Map [columns.{label}] to a column that is filled in this release.",
        )


def _native_names(survey: Survey, name: str) -> str:
    return "'" + "' or '".join(survey.columns[name].sources) + "'"
