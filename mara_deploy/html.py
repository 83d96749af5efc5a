"""HTML reports: self-contained pages from the Jinja templates of the packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def render_report(package: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., str]]) -> str:
    """Render `report.html.jinja` of a package. Values are escaped unless they are `markupsafe.Markup`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    source = files(package).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(values)
