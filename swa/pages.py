"""HTML pages: templates filled in, round numbers for their axes, and labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "data"


def render_page(template: str, **values: Any) -> str:
    """The text of a template in `TEMPLATES`; every value is escaped, every name must be given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_short_number,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[list[float], int]:
    """Round numbers that span [low, high], at least two, and the decimals that show them.

    They are multiples of 1, 2 or 5 times a power of ten, so zero is one wherever it is in the span.
    """
    if low == high:
        high = low + 1.0
    span = high - low
    power = math.floor(math.log10(span / wanted))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**power * wanted >= span)
    step = factor * 10.0**power
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [index * step for index in range(first, last + 1)]
    return ticks, max(0, -power - (factor == 10))


def shorten(text: str, limit: int) -> str:
    """A label of at most so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _short_number(value: object) -> object:
    """Coordinates with two decimals at most; what is no float as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
