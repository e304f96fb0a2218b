"""Headers of FITS files (FITS Standard 4.0, sections 3 and 4), as much as tables need of them.

``import astropy.io.fits`` takes longer than all that a small file needs beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

Header: TypeAlias = dict[str, str | int | float | bool]
BLOCK_BYTES = 2880
_CARD_BYTES = 80
_TEXT = re.compile(r"'((?:[^']|'')*)'")


def read_headers(path: Path) -> list[tuple[Header, int]]:
    """Header of each HDU, and where its data begin.

    What follows the last whole HDU is left out, as is everything behind data that are cut off.

    Raises
    ------
    ValueError
        The file does not begin with a whole header, or a card that tells the size of the data is
        missing or wrong.
    """
    found: list[tuple[Header, int]] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 0
        while begin < size:
            file.seek(begin)
            cards = list(_cards(file))
            is_header = cards[-1:] == ["END"] and cards[0].startswith(("SIMPLE", "XTENSION"))
            if not is_header:
                if not found:
                    raise ValueError("its first header has no END")
                break
            header, data = _parsed(cards), file.tell()
            found.append((header, data))
            begin = data + -(-_data_bytes(header) // BLOCK_BYTES) * BLOCK_BYTES
    return found


def _cards(file: BinaryIO) -> Iterator[str]:
    """Cards of a header up to and with END, after which the file stands at the data."""
    while len(block := file.read(BLOCK_BYTES)) == BLOCK_BYTES:
        for first in range(0, BLOCK_BYTES, _CARD_BYTES):
            card = block[first : first + _CARD_BYTES].decode("latin-1").rstrip()
            yield card
            if card == "END":
                return


def _parsed(cards: list[str]) -> Header:
    header: Header = {}
    last = ""
    for card in cards:
        key, content = card[:8].rstrip(), card[10:]
        text = header.get(last)
        if key == "CONTINUE" and isinstance(text, str) and text.endswith("&"):
            header[last] = text[:-1] + str(_value(content))
        elif card[8:10] == "= " and key not in header and content.partition("/")[0].strip():
            header[key] = _value(content)
            last = key
    return header


def _value(content: str) -> str | int | float | bool:
    """Value of a card; one that is none stays the text it is."""
    match = _TEXT.match(content.lstrip())
    if match:
        return match[1].replace("''", "'").rstrip()
    text = content.partition("/")[0].strip()
    if text in ("T", "F"):
        return text == "T"
    for kind in (int, float):
        try:
            return kind(text.replace("D", "E"))
        except ValueError:
            continue
    return text


def _data_bytes(header: Header) -> int:
    """Bytes of the data, by equations 1 and 2 of the standard."""
    try:
        axes = [int(header[f"NAXIS{number + 1}"]) for number in range(int(header["NAXIS"]))]
        bits = abs(int(header["BITPIX"]))
    except KeyError as error:
        raise ValueError(f"a header has no {error.args[0]}") from None
    if axes and axes[0] == 0 and header.get("GROUPS"):
        axes = axes[1:]
    elements = math.prod(axes) if axes else 0
    more = int(header.get("PCOUNT", 0)) if axes else 0
    n_bytes = bits // 8 * int(header.get("GCOUNT", 1)) * (more + elements)
    if n_bytes < 0:
        raise ValueError("a header states data of negative size")
    return n_bytes
