"""Text of the mock surveys: names from positions and numbers, made without a loop over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.simulate.sky import FloatArray, IntArray, to_galactic

ByteArray = NDArray[np.uint8]
Names = NDArray[np.bytes_]

_TWO_DIGITS = np.array([list(f"{n:02d}".encode()) for n in range(100)], dtype=np.uint8)


def digits(values: IntArray, width: int) -> ByteArray:
    """Decimal digits of numbers below 10**width, zero-padded, as bytes of shape (n, width)."""
    out = np.empty((len(values), width + width % 2), dtype=np.uint8)
    rest = values
    for start in range(out.shape[1] - 2, -1, -2):
        rest, pair = np.divmod(rest, 100)
        out[:, start : start + 2] = _TWO_DIGITS[pair]
    return out[:, width % 2 :]


def compose(parts: list[ByteArray | bytes], n: int) -> Names:
    """Fixed-width strings from byte matrices (n, w) and constants, joined."""
    width = sum(part.shape[1] if isinstance(part, np.ndarray) else len(part) for part in parts)
    out = np.empty((n, width), dtype=np.uint8)
    start = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            stop = start + part.shape[1]
            out[:, start:stop] = part
        else:
            stop = start + len(part)
            out[:, start:stop] = np.frombuffer(part, dtype=np.uint8)
        start = stop
    return out.view(f"S{width}").ravel()


def sexagesimal(ra: FloatArray, dec: FloatArray) -> list[ByteArray]:
    """HH, MM, SS, ss of ra; sign, DD, MM, SS, s of dec (truncated), as bytes."""
    seconds = np.minimum((ra * 24000.0).astype(np.int64), 8639999)  # of time, in hundredths
    rest, hundredths = np.divmod(seconds, 100)
    rest, s = np.divmod(rest, 60)
    h, m = np.divmod(rest, 60)
    tenths = np.minimum(np.abs(dec * 36000.0).astype(np.int64), 3240000)
    rest, tenth = np.divmod(tenths, 10)
    rest, arcsec = np.divmod(rest, 60)
    degrees, arcmin = np.divmod(rest, 60)
    sign = np.where(dec < 0, ord("-"), ord("+")).astype(np.uint8)[:, None]
    pairs = [_TWO_DIGITS[part] for part in (h, m, s, hundredths)]
    return [
        *pairs,
        sign,
        *(_TWO_DIGITS[part] for part in (degrees, arcmin, arcsec)),
        _TWO_DIGITS[tenth][:, 1:],
    ]


def as_bytes(names: Names) -> ByteArray:
    """The bytes (n, width) of fixed-width strings."""
    return np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)


def field_names(ra: FloatArray, dec: FloatArray) -> Names:
    """Names of fields by Galactic longitude and latitude, as ``270+60``."""
    lon, lat = to_galactic(ra, dec)
    sign = np.where(lat < 0, ord("-"), ord("+")).astype(np.uint8)[:, None]
    return compose(
        [
            digits(np.floor(lon).astype(np.int64) % 360, 3),
            sign,
            digits(np.abs(lat).astype(np.int64), 2),
        ],
        len(lon),
    )


def telescopes(dec: FloatArray) -> Names:
    """Telescope of a field by its declination: north or south."""
    return np.where(dec > -20.0, b"apo25m", b"lco25m").astype("S6")


def dotted(parts: list[Names | bytes]) -> Names:
    """Names joined by dots; they vary in length, so through numpy's string functions."""
    out: Any = parts[0]
    for part in parts[1:]:
        out = np.strings.add(np.strings.add(out, b"."), part)
    return np.asarray(out)
