"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources

from sos_dask.report.headline import Gain
from sos_dask.report.style import DPI, WIDTH
from sos_dask.report.tables import Table

TEMPLATE = "report.html"
FULL_PIXELS = round(WIDTH * DPI)  # of a figure as wide as the page


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Parameters
    ----------
    name : str
        Of its files, without the ending.
    title, caption, alt : str
    png : bytes
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes

    @cached_property
    def data(self) -> str:
        """The picture as text."""
        return base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        return int.from_bytes(self.png[16:20]), int.from_bytes(self.png[20:24])

    @property
    def share(self) -> float:
        """Of the width of the page."""
        return round(self.size[0] / FULL_PIXELS, 3)


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then tables and figures in their order.

    Parameters
    ----------
    key : str
        Anchor.
    title : str
    text : str
    items : tuple of Picture, Table or Code
    folded : tuple of Table or Code
        Shown on a click.
    """

    key: str
    title: str
    text: str = ""
    items: tuple[Picture | Table | Code, ...] = ()
    folded: tuple[Table | Code, ...] = ()


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    caption: str
    text: str


@dataclass(frozen=True)
class Page:
    """All that is on the page.

    Parameters
    ----------
    title, lead : str
    gains : sequence of Gain
    gains_caption : str
    notes : sequence of str
        What to watch out for.
    sections : sequence of Section
        Those without content are left out.
    version : str
    """

    title: str
    lead: str
    gains: Sequence[Gain]
    gains_caption: str
    notes: Sequence[str]
    sections: Sequence[Section]
    version: str = field(default="")


def html(page: Page) -> str:
    """The page as HTML; all text is escaped."""
    from jinja2 import Environment, StrictUndefined

    text = resources.files("sos_dask").joinpath(f"templates/{TEMPLATE}").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["picture"] = lambda item: isinstance(item, Picture)
    environment.tests["code"] = lambda item: isinstance(item, Code)
    sections = [s for s in page.sections if s.items or s.folded]
    return environment.from_string(text).render(page=page, sections=sections)
