"""Documents that people write: TOML with every value checked, and names that become folders."""

from __future__ import annotations

import math
import re
import tomllib
from typing import Any

from sos_dask.errors import SosError

NAME_RULE = "use lower-case letters, digits and dashes, 64 at most"
COLUMN_RULE = "use letters, digits and _ only, 64 at most, and no digit first"
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PRODUCT = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_DEEPEST = 20
_LARGEST_BYTES = 16 << 20


def is_name(text: str) -> bool:
    """Tell whether a text can name a survey, a job or a companion, and so a folder."""
    return _NAME.fullmatch(text) is not None


def is_column(text: str) -> bool:
    """Tell whether a text can name a new column."""
    return _COLUMN.fullmatch(text) is not None


def is_product(text: str) -> bool:
    """Tell whether a text can name a product (``lamost.stars``), and so a link in a build."""
    return _PRODUCT.fullmatch(text) is not None


def parse_toml(content: bytes, kind: type[SosError]) -> tuple[str, dict[str, Any]]:
    """Parse a TOML document of which every number and text can be a setting.

    Parameters
    ----------
    content : bytes
        A byte order mark and line ends of Windows are accepted.
    kind : type
        Class of the errors that are raised.

    Returns
    -------
    (str, dict)
        Text with plain line ends, and its content.

    Raises
    ------
    SosError
        Of class ``kind``: not UTF-8, not TOML, nested too deep; NaN or infinity, a number beyond 64
        bits or a text with a NUL character, with its key.
    """
    if len(content) > _LARGEST_BYTES:
        raise kind(f"{len(content):,} bytes are too many for a file of settings")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise kind(f"byte {error.start} is not UTF-8 text") from None
    except RecursionError:
        raise kind("lists or tables are nested too deep") from None
    except ValueError as error:  # among them numbers of more digits than Python converts
        raise kind(f"not valid TOML: {error}") from None
    found: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while found:
        place, value = found.pop()
        problem = _problem(value) if len(place) <= _DEEPEST else "is nested too deep"
        if problem:
            raise kind(f"'{'.'.join(place[:_DEEPEST])}' {problem}")
        if isinstance(value, dict):
            found += [((*place, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            found += [((*place, str(number)), inner) for number, inner in enumerate(value)]
    return text, document


def _problem(value: Any) -> str:
    """What no setting can be, in words; empty where it can."""
    if isinstance(value, str) and "\0" in value:
        return "contains a NUL character"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, not a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "is a number of more than 64 bits"
    return ""
