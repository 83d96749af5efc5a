"""One HTML file of a template, styles and scripts, under a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Page:
    """A page and its Content-Security-Policy, which names its styles and scripts by their hashes."""

    html: str
    policy: str


def page(
    template: str, names: Sequence[str], values: Mapping[str, Any], *, data: Any = None, connect: str = ""
) -> Page:
    """Make a page of files of this package.

    names: its styles (.css) and scripts (.js), each joined in this order. values: for the template, which escapes them.
    data: what scripts find as JSON in the element "data". connect: whom scripts may send requests to; default nobody.
    """
    folder = files("mara_deploy.see")
    style, script = (
        "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names if name.endswith(kind))
        for kind in (".css", ".js")
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            *[f"connect-src {connect}"] * bool(connect),
            "img-src data:",  # the empty icon, without which a browser asks for one
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = folder.joinpath(template).read_text(encoding="utf-8")
    html = environment.from_string(source).render(
        values, style=Markup(style), script=Markup(script), policy=policy, data=_embedded(data)
    )
    return Page(html, policy)


def _hash(source: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _embedded(data: Any) -> Markup:
    """JSON for a script element, which a "</script" or "<!--" within it would end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
