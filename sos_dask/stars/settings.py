"""How repeats are found and combined."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sos_dask.settings import Settings

METHODS = ("inverse-variance", "best-snr", "median")


class Radii(Settings):
    """Separations up to which rows can be one star: by position, and by Gaia id."""

    radius_arcsec: float = Field(
        1.5, gt=0, lt=3600, description="Largest separation of rows of one star."
    )
    id_radius_arcsec: float = Field(
        10.0, gt=0, lt=3600, description="Largest separation of rows of one Gaia id."
    )
    use_gaia_id: bool = Field(True, description="Gaia ids count, not only positions.")

    @model_validator(mode="after")
    def _ids_reach_farther(self) -> Self:
        if self.use_gaia_id and self.id_radius_arcsec < self.radius_arcsec:
            raise ValueError(
                f"id_radius_arcsec = {self.id_radius_arcsec:g} is smaller than radius_arcsec = "
                f"{self.radius_arcsec:g}: rows with the same id may lie farther apart than others; "
                "make it larger, or match by position alone (--no-gaia-id)"
            )
        return self


class DedupeSettings(Radii):
    """How repeats of one star are found and combined."""

    method: Literal["inverse-variance", "best-snr", "median"] = Field(
        "inverse-variance", description="How the observations of a star are combined."
    )
    max_spread: float = Field(
        5.0,
        gt=0,
        le=1e9,
        description="Flag stars whose repeats spread over so many expected errors.",
    )
