"""Settings, declared once; TOML that people write, JSON that says its own digest; names."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sos_dask.errors import ConfigError, SosError
from sos_dask.schema import MOST_ROWS, nearest

NAME_RULE = "use lower-case letters, digits and dashes, 64 at most"
COLUMN_RULE = "use letters, digits and _ only, 64 at most, and no digit first"
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PRODUCT = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SEAL = "sha256"
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
    """Parse a TOML document; return its text with plain line ends, and its content.

    A byte order mark and line ends of Windows are accepted.

    Raises `SosError`: of class ``kind``: not UTF-8, not TOML, nested too deep; NaN or infinity, a
    number beyond 64 bits or a text with a NUL character, with its key.
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


def to_json(document: Any) -> bytes:
    """JSON text, always the same for the same content; floats keep every bit."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def sealed(document: Mapping[str, Any], text: Callable[[Any], bytes] = to_json) -> dict[str, Any]:
    """Document that says, as ``sha256``, the digest of the text of all else in it.

    One that says so already is given back as it is, unless it was changed.
    """
    content = {key: value for key, value in document.items() if key != _SEAL}
    return {**content, _SEAL: hashlib.sha256(text(content)).hexdigest()}


Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
RowsPerPartition = Annotated[
    int,
    Field(
        ge=1,
        le=MOST_ROWS,
        description="Pixels are split until each contains at most this many rows.",
    ),
]


class Settings(BaseModel):
    """Settings of a stage, a method or a job: frozen, every field with its limits and meaning.

    A field is declared once: the job nests the settings, the command line makes options of their
    fields, and a recipe is their dump (`as_json`), less the fields with ``exclude=True``. A text
    that looks like a number or a yes is refused, not taken for one.

    Raises `ConfigError`: an unknown field (with the nearest known ones), a missing one, or a value
    out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise explained(type(self), error) from None

    # Settings inside others are validated by pydantic itself, which then knows their place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def but(self, **changed: Any) -> Self:
        """Copy with other values, which are checked."""
        return type(self)(**{**dict(self), **changed})

    @property
    def as_json(self) -> dict[str, Any]:
        """JSON values of the fields that decide what is made."""
        return self.model_dump(mode="json")


def explained(model: type[BaseModel], error: ValidationError, where: str = "") -> ConfigError:
    """Turn the first fault that pydantic found into a sentence, with names like an unknown one.

    ``where``, such as the path of a file, is put before the message.
    """
    where = f"{where}: " if where else ""
    errors = error.errors(include_url=False)
    # A wrong name makes others missing: it is the fault.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    # Members of a union are no keys.
    loc = [part for part in map(str, first["loc"]) if not re.match(r"[\w-]+\[", part)]
    place = ".".join(loc)
    inside: Any = model
    for part in loc[:-1]:
        inside = _inner(inside, part)
    if first["type"] == "extra_forbidden":
        fields = getattr(inside, "model_fields", {})
        known = [name for name, field in fields.items() if not field.exclude or field.description]
        return ConfigError(
            f"{where}unknown key '{place}'",
            nearest(loc[-1], known) or f"Known are: {', '.join(known)}.",
        )
    if first["type"] == "missing":
        return ConfigError(f"{where}'{place}' is missing")
    if first["type"] in ("model_type", "dict_type"):
        hint = getattr(model, "TABLE_HINTS", {}).get(loc[0])
        return ConfigError(
            f"{where}{place} = {first['input']!r:.60} is given where a table is needed",
            hint or f"Write a table [{place}] with its keys.",
        )
    message = str(first["msg"]).removeprefix("Value error, ").replace("valid tuple", "list")
    message = message.replace("Input should be", "must be")
    given = first["input"]
    shown = "" if not place or isinstance(given, dict | BaseModel) else f" (given: {given!r:.60})"
    return ConfigError(f"{where}{place + ': ' if place else ''}{message}{shown}")


def _inner(model: Any, part: str) -> Any:
    """Model of a field; of a free key of a mapping that of its values."""
    field = getattr(model, "model_fields", {}).get(part)
    if field is None:
        return model
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return model
