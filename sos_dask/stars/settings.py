"""How repeats are found and combined."""

from __future__ import annotations

from dataclasses import dataclass

from sos_dask.errors import ConfigError
from sos_dask.schema import check_numbers
from sos_dask.sky.sphere import check_radii

METHODS = ("inverse-variance", "best-snr", "median")


@dataclass(frozen=True)
class DedupeSettings:
    """How repeats are found and combined.

    Parameters
    ----------
    radius_arcsec : float
        Rows farther apart are never one star by position.
    id_radius_arcsec : float
        Rows with equal Gaia ids farther apart are not one star. At least ``radius_arcsec``.
    method : {"inverse-variance", "best-snr", "median"}
    max_spread : float
        A star whose observations scatter by more than this multiple of their error is flagged.
    use_gaia_id : bool
        False: only positions count.

    Raises
    ------
    ConfigError
        A value is not positive, a radius is a degree or more, or the method is unknown.
    """

    radius_arcsec: float = 1.5
    id_radius_arcsec: float = 10.0
    method: str = "inverse-variance"
    max_spread: float = 5.0
    use_gaia_id: bool = True

    def __post_init__(self) -> None:
        check_radii(self.radius_arcsec, self.id_radius_arcsec, self.use_gaia_id)
        if self.method not in METHODS:
            raise ConfigError(f"method '{self.method}' is none of {', '.join(METHODS)}")
        check_numbers(self, max_spread=(1e-9, 1e9))
