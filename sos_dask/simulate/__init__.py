"""A mock sky with known truth, written as the surveys' own tables.

`simulate` writes five files. What is injected, and where, is documented by `lamost_bias`,
`galah_bias`, `RV_OFFSETS`, `stated_error_factor`, `references_avoid` and `special_stars`.
"""

from __future__ import annotations

from sos_dask.simulate.measurement import RV_OFFSETS, galah_bias, lamost_bias, stated_error_factor
from sos_dask.simulate.plan import SkySettings, reference_rows
from sos_dask.simulate.run import GAIA_SCHEMA, TRUTH_SCHEMA, simulate, sky_files
from sos_dask.simulate.sky import references_avoid, special_stars
from sos_dask.simulate.tables import POSITION_EPOCHS

__all__ = [
    "GAIA_SCHEMA",
    "POSITION_EPOCHS",
    "RV_OFFSETS",
    "TRUTH_SCHEMA",
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
