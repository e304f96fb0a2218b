"""Names, units and numbers as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

UNITS = {"teff": "K", "logg": "dex", "feh": "dex"}
WORDS = {
    "teff": "Teff",
    "logg": "log g",
    "feh": "[Fe/H]",
    "snr": "S/N",
    "phot_g_mean_mag": "G",
    "ebv": "E(B-V)",
    "bp_rp": "BP-RP",
}
NONE = "none"
STATISTICS = {
    "median": "median",
    "mad": "scatter (1.4826 MAD)",
    "width": "half of the 16–84 % width",
    "rms_binned": "rms of binned medians",
    "worst_bin": "worst bin",
}
SUBSETS = ("all", "dense", "sparse", "logg < 1", "teff > 7000", "feh < -2", "feh > 0.2")


def number(value: float | None, label: str, sign: bool = False) -> str:
    """A value of a label with the digits that mean something; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    digits = 1 if UNITS.get(label) == "K" else 4
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def ordered(found: Sequence[str], first: Sequence[str]) -> list[str]:
    """Names that are there, those of ``first`` before the others."""
    names = list(dict.fromkeys(found))
    return [*(n for n in first if n in names), *(n for n in names if n not in first)]


def subset_words(subset: str) -> str:
    """A part of the parameter space as it is read: ``log g < 1`` for ``logg < 1``."""
    first, _, rest = subset.partition(" ")
    return f"{WORDS.get(first, first)} {rest}".strip().replace("-", "−").replace("snr", "S/N")


def readable(text: str) -> str:
    """A text of a manifest with columns named as a person names them: ``log g`` for ``logg``."""
    return re.sub(r"\b(teff|logg|feh|snr)\b", lambda found: WORDS[found[1]], text)


def percent(part: int, whole: int) -> str:
    """A share; of some that are there never ``0.0 %``."""
    if not whole:
        return "–"
    return "<0.1 %" if 0 < part < 0.0005 * whole else f"{100 * part / whole:.1f} %"
