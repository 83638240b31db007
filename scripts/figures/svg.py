"""A small SVG writer: one style for every figure."""

from __future__ import annotations

from html import escape

Pair = tuple[int, int]
Colors = tuple[str, str]  # Of the line and of the inside.

INK = "#1a1a1a"
WHITE: Colors = ("none", "#ffffff")
BAND: Colors = ("none", "#ececec")
PLAIN: Colors = ("#767676", "#ffffff")
COMM: Colors = (INK, "#ffffff")
# One for each tp_rank: Okabe-Ito blue and vermilion, and a tint of each inside.
TP_COLORS: tuple[Colors, ...] = (("#0072b2", "#cde4f2"), ("#d55e00", "#fbdcc8"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
HEAD = (
    '<defs><marker id="head" orient="auto-start-reverse" markerUnits="userSpaceOnUse"'
    ' markerWidth="8" markerHeight="12" refX="5" refY="6">'
    f'<path d="M0 0L8 6L0 12Z" fill="{INK}"/></marker></defs>'
)


def tag(name: str, body: str = "", **attributes: float | str) -> str:
    """One SVG element; an underscore in an attribute's name stands for a dash."""
    pairs = ""
    for key, value in attributes.items():
        shown = value if isinstance(value, str) else f"{value:g}"
        pairs += f' {key.replace("_", "-")}="{shown}"'
    return f"<{name}{pairs}>{body}</{name}>"


class Figure:
    """A growing list of SVG elements.

    Its alt text is `names`, the docstring of the function that draws it: the first
    line is the title, which is also drawn, and the rest describes the picture.
    """

    def __init__(self, width: int, height: int, names: str) -> None:
        title, desc = (" ".join(part.split()) for part in names.split("\n\n"))
        self.width, self.height = width, height
        self.parts = [tag("title", escape(title)), tag("desc", escape(desc)), HEAD]
        self.rect(0, 0, width, height, WHITE)
        self.text(20, 26, title, look="left bold large")

    def rect(
        self, x: float, y: float, w: float, h: float, colors: Colors, dash: str = ""
    ) -> None:
        line, fill = colors
        style = {"stroke": line, "stroke_width": 2, "stroke_dasharray": dash or "none"}
        self.parts.append(tag("rect", x=x, y=y, width=w, height=h, fill=fill, **style))

    def text(self, x: float, y: float, *lines: str, look: str = "") -> None:
        """Lines centered on height y; `look` may contain left, bold, small or large."""
        size = 13 if "small" in look else 16 if "large" in look else 14
        style = {
            "fill": INK,
            "font_size": size,
            "font_weight": 600 if "bold" in look else 400,
            "text_anchor": "start" if "left" in look else "middle",
        }
        for i, line in enumerate(lines):
            # A baseline 0.35 of the size lower centers the letters on y.
            baseline = y + ((i - (len(lines) - 1) / 2) * 1.35 + 0.35) * size
            self.parts.append(tag("text", escape(line), x=x, y=baseline, **style))

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, group: str = ""
    ) -> None:
        """An arrow; two-headed along a group, thick for "tp" and dashed for "dp"."""
        style = {
            "stroke": INK,
            "stroke_width": 4 if group == "tp" else 2,
            "stroke_dasharray": "5 3" if group == "dp" else "none",
            "marker_start": "url(#head)" if group else "none",
        }
        path = f"M{x1:g} {y1:g}L{x2:g} {y2:g}"
        self.parts.append(tag("path", d=path, marker_end="url(#head)", **style))

    def svg(self) -> str:
        body = "\n".join(["", *self.parts, ""])
        size = {"width": self.width, "height": self.height, "font_family": FONT}
        box = f"0 0 {self.width} {self.height}"
        top = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "viewBox": box}
        return tag("svg", body, **top, **size) + "\n"
