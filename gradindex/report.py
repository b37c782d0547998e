"""Faces for eyes: hits, curves and tables as one self-contained HTML page (owns matplotlib and jinja2)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, DependencyError, StoreError
from .output import check_file, new_file, printable

# What tells a page of gradindex, which the next may replace, from a file of somebody else.
_MARK = b'<meta name="generator" content="gradindex">'


@dataclass(frozen=True)
class Tile:
    """One example as a person should see it.

    Args:
        shown: a picture (an array (h, w) or (h, w, 3), or PIL), a text, a mapping (a table
            row), or ``None`` for the caption alone.
        title: the first line below it.
        lines: more lines.
        badges: short warnings, such as ``"flipped"``.
        score: signed; colours the tile.
    """

    shown: Any
    title: str
    lines: Sequence[str] = ()
    badges: Sequence[str] = ()
    score: float | None = None


@dataclass(frozen=True)
class Card:
    """A query and what answers it: named rows of tiles."""

    query: Tile
    rows: Mapping[str, Sequence[Tile]]


@dataclass(frozen=True)
class TokenText:
    """A text whose tokens are coloured by their shares: green above zero, orange below.

    Args:
        caption: what it is.
        tokens: in their order, as a tokenizer names them.
        shares: (len(tokens),) signed.
    """

    caption: str
    tokens: Sequence[str]
    shares: NDArray[np.float64]

    @property
    def spans(self) -> list[dict[str, Any]]:
        """For each token its text, its share, and the colour behind it, the fuller the larger the share."""
        largest = float(np.abs(self.shares).max(initial=0)) or 1.0
        return [
            {"text": _text_of(token), "share": share, "sign": "up" if share > 0 else "down",
             "strength": f"{80 * abs(share) / largest:.0f}%"}
            for token, share in zip(self.tokens, self.shares.tolist(), strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is left out.

    Args:
        title: the heading.
        text: one paragraph above the rest.
        cards: queries and their answers.
        figure: a picture as a ``data:`` address.
        caption: the text below the figure, which also says what it shows to those who cannot see it.
        table: records of the same keys.
        texts: texts with coloured tokens.
    """

    title: str
    text: str = ""
    cards: Sequence[Card] = ()
    figure: str = ""
    caption: str = ""
    table: Sequence[Mapping[str, Any]] = field(default=())
    texts: Sequence[TokenText] = ()


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a self-contained page: pictures lie inside, nothing is fetched from elsewhere.

    Raises:
        DependencyError: jinja2 or matplotlib is missing.
        StoreError: the file cannot be written, or something other than a page of gradindex is there.
    """
    page = _template("page.html").render(title=title, lead=lead, sections=sections)
    try:
        with new_file(path, _MARK) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}. Choose another path.") from None


def check_page(path: Path) -> None:
    """Refuse, before other work, to write a page where something other than a page of gradindex is.

    Raises:
        StoreError: something is there.
    """
    check_file(path, _MARK)


def require() -> None:
    """Check that pages can be drawn, before other work.

    Raises:
        DependencyError: jinja2 or matplotlib is missing.
    """
    with _needed():
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401


def cards_html(cards: Sequence[Card]) -> str:
    """Cards as a fragment of HTML with its own style, for a notebook.

    Raises:
        DependencyError: jinja2 or matplotlib is missing.
    """
    html: str = _template("cards.html").render(cards=cards)
    return html


def token_texts_html(texts: Sequence[TokenText], note: str) -> str:
    """Texts with coloured tokens as a fragment of HTML with its own style, for a notebook.

    Args:
        texts: what to show.
        note: a line below.

    Raises:
        DependencyError: jinja2 is missing.
    """
    html: str = _template("tokens.html").render(texts=texts, note=note)
    return html


def line_chart(x: Sequence[float], lines: Mapping[str, NDArray[Any]], x_label: str, y_label: str) -> str:
    """Lines over shares from 0 to 1 as a picture (a ``data:`` address); a dashed line for ``"chance"``.

    Raises:
        DependencyError: matplotlib is missing.
    """
    with _needed():
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, y in lines.items():
        axes.plot(x, y, label=name, **({"linestyle": "--", "color": "0.6"} if name == "chance" else {"linewidth": 2}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(min(x), max(x)), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return _data_address(buffer.getvalue())


def heat_map(values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Signed numbers (len(rows), len(columns)) as a picture (a ``data:`` address): green above zero, orange below.

    Raises:
        DependencyError: matplotlib is missing.
    """
    with _needed():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    colours = LinearSegmentedColormap.from_list("sign", ["#c2410c", "#ffffff", "#0a7d4f"])
    # Inches for cells, for names (those of columns stand upright), and for the bar of colours.
    width = 2.0 + 0.45 * len(columns) + 0.1 * max(map(len, rows))
    height = 1.5 + 0.35 * len(rows) + 0.1 * max(map(len, columns))
    figure = Figure(figsize=(min(60.0, max(5.0, width)), min(60.0, height)), layout="constrained")
    axes = figure.subplots()
    largest = float(np.abs(values).max()) or 1.0  # the colours of all zeros need some scale
    shown = axes.imshow(values, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
    # Names are texts, where a $ begins no formula.
    axes.set_xticks(range(len(columns)), map(printable, columns), rotation=90, parse_math=False)
    axes.set_yticks(range(len(rows)), map(printable, rows), parse_math=False)
    figure.colorbar(shown, ax=axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return _data_address(buffer.getvalue())


def picture(shown: Any) -> str:
    """A picture as a ``data:`` address (PNG).

    Args:
        shown: PIL image, or array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4): bytes, floats
            from 0 to 1, or (grey only) any numbers, which are stretched to black and white.

    Raises:
        ArgumentError: the array is not a picture.
    """
    array = np.asarray(shown)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ArgumentError(
            f"show(item) gave an array of shape {array.shape}, but a picture needs (h, w) or (h, w, 3)."
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 and array.ndim == 3:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    low, high = (0, 255) if array.dtype == np.uint8 else (None, None)
    with _needed():
        from matplotlib.image import imsave
    imsave(buffer, array, vmin=low, vmax=high, format="png", cmap="gray")
    return _data_address(buffer.getvalue())


def _is_picture(shown: Any) -> bool:
    return (
        not isinstance(shown, (str, Mapping, list, tuple))
        and (hasattr(shown, "__array__") or hasattr(shown, "__array_interface__"))
        and np.ndim(shown) >= 2
    )


def _text_of(token: str) -> str:
    """A token as people read it: tokenizers write spaces and ends of lines as signs of their own."""
    for sign, text in (("\u0120", " "), ("\u2581", " "), ("\u010a", "\n")):
        token = token.replace(sign, text)
    return printable(token)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _template(name: str) -> Any:
    with _needed():
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradindex"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(picture=picture, number=_number)
    environment.tests["picture"] = _is_picture
    return environment.get_template(name)


@contextmanager
def _needed() -> Iterator[None]:
    """Packages of the extra are imported where they are used, in a block of this.

    Raises:
        DependencyError: one is missing.
    """
    try:
        yield
    except ImportError as error:
        package = str(error.name or "a package").partition(".")[0]
        raise DependencyError(
            f"HTML pages need {package} ({error}). Install it: pip install 'gradindex[demo]'."
        ) from None
