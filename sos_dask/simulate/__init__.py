"""A mock sky with known truth, written as the surveys' own tables.

`simulate` writes five files. What is injected, and where, is documented by `lamost_bias`,
`galah_bias`, `SURVEYS`, `stated_error_factor`, `references_avoid` and `special_stars`.
"""

from __future__ import annotations

from sos_dask.simulate.files import simulate, sky_files
from sos_dask.simulate.sky import SkySettings, reference_rows, references_avoid, special_stars
from sos_dask.simulate.surveys import SURVEYS, galah_bias, lamost_bias, stated_error_factor

__all__ = [
    "SURVEYS",
    "SkySettings",
    "galah_bias",
    "lamost_bias",
    "reference_rows",
    "references_avoid",
    "simulate",
    "sky_files",
    "special_stars",
    "stated_error_factor",
]
