"""Pages that open offline: a filled template, the specifications of its figures, and the library that draws them."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from alignment_gap.errors import UserError
from alignment_gap.evaluation import charts
from alignment_gap.folders import AnyPath, write_bytes
from alignment_gap.study.marks import Figure

try:
    import jinja2
    import markupsafe
    import vl_convert
except ImportError as error:
    raise UserError(
        f'{error.name} writes the report and is not installed: pip install "alignment-gap[study]"'
    ) from error

PAGE, FIGURES = "report.html", "figures"
_DARK = {"white": "#16191d", charts.INK: "#b9c0c8", charts.GRID: "#2d333a", charts.LINE: "#6b737d"}


def render(template: str, figures: Sequence[Figure], **values: Any) -> str:
    """Fills a template of this package; it gets `values` by name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignment_gap.study", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(
        figures=figures,
        library=markupsafe.Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        specs=_packed({figure.name: figure.spec for figure in figures if not figure.missing}),
        greys=_json(_DARK),
        **values,
    )


def write_page(folder: AnyPath, page: str, figures: Sequence[Figure], stale: Sequence[str] = ()) -> AnyPath:
    """Writes figures/*.png, then the page; removes figures that match a pattern in `stale` and are no longer drawn.

    Returns:
      The path of the page.
    """
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    pictures = {folder / FIGURES / f"{figure.name}.png": figure for figure in figures if not figure.missing}
    for path, figure in pictures.items():
        write_bytes(path, figure.png())
    for path in (path for pattern in stale for path in (folder / FIGURES).glob(pattern)):
        if path not in pictures:
            path.unlink()
    write_bytes(folder / PAGE, page.encode())
    return folder / PAGE


def _packed(value: object) -> str:
    """Compressed JSON, in base64: many figures have the same rows."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _json(value: object) -> markupsafe.Markup:
    """JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return markupsafe.Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
