"""A mock sky with known truth, written as the surveys' own tables, and the demonstration on it.

What is injected, and where, is documented by `surveys.lamost_bias`, `galah_bias`, `SURVEYS` and
`stated_error_factor`, by `sky.references_avoid` and `SPECIAL_STARS`, and of skies that are harder
by `SkySettings.shapes` and the module `shapes`.
"""

from sos_dask.simulate.files import simulate, sky_files
from sos_dask.simulate.sky import SkySettings

__all__ = ["SkySettings", "simulate", "sky_files"]
