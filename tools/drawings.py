"""The drawings of docs/concepts/: writes docs/pictures/concept-*.svg.

    python tools/drawings.py

Each has a light ground of its own, so it reads alike on light and dark pages.
"""

from __future__ import annotations

import random
from html import escape
from itertools import product
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
INK, SOFT, GROUND = "#24292f", "#6e7781", "#fbfbf9"
SHADES = ["#2f6f8f", "#5b9bb5", "#9cc5d3", "#cfe3ea"]  # plane 0 is the darkest
ACCENT = "#c8553d"


class Drawing:
    """An SVG that grows by rectangles, lines and texts."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts = [f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'
        )

    def line(self, x: float, y: float, x2: float, y2: float, colour: str = SOFT, arrow: bool = False) -> None:
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.4"{head}/>'
        )

    def circle(self, x: float, y: float, fill: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="6" fill="{fill}" stroke="{INK}"/>')

    def text(self, x: float, y: float, words: str, *, at: str = "start", colour: str = INK, size: int = 13) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{at}" fill="{colour}" font-size="{size}">{escape(words)}</text>'
        )

    def label(self, x: float, y: float, width: float, height: float, words: str, fill: str = "white") -> None:
        """A box with words in the middle, white on dark fills."""
        self.box(x, y, width, height, fill, SOFT)
        self.text(
            x + width / 2, y + height / 2 + 4.5, words, at="middle", colour="white" if fill in SHADES[:2] else INK
        )

    def save(self, name: str) -> None:
        width, height = self.size
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>'
        )
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            'font-family="system-ui, sans-serif">'
        )
        (PICTURES / f"concept-{name}.svg").write_text("\n".join([opening, head, *self.parts, "</svg>"]) + "\n")


def planes() -> None:
    drawing, draw = Drawing(720, 250), random.Random(3)
    cell, columns = 26, 16
    for index in range(4):
        y = 30 + 48 * index
        drawing.text(20, y + 17, f"plane {index}")
        for column in range(columns):
            one = draw.random() < 0.5
            drawing.box(90 + cell * column, y, cell - 3, cell - 3, SHADES[index] if one else "white", SHADES[index])
            sign, colour = ("+", "white" if index < 2 else INK) if one else ("−", SOFT)  # noqa: RUF001
            drawing.text(90 + cell * column + 11.5, y + 16, sign, at="middle", colour=colour)
    for bits, x in ((2, 530), (3, 590), (4, 650)):
        drawing.line(x, 28, x, 48 * bits + 8, ACCENT)
        drawing.text(x + 6, 24 + 48 * bits - 6, f"{bits} bits", colour=ACCENT)
    drawing.text(90, 238, "one row of a weight, 16 columns; a request at p bits reads planes 0 to p - 1", colour=SOFT)
    drawing.save("planes")


def scales() -> None:
    """The values that a weight of one group can take, at 1, 2 and 3 bits."""
    drawing = Drawing(720, 250)
    steps = {1: (180,), 2: (170, 84), 3: (166, 82, 42)}
    levels = {
        bits: [360 + sum(s * v for s, v in zip(signs, scale, strict=True)) for signs in product((-1, 1), repeat=bits)]
        for bits, scale in steps.items()
    }
    for bits, values in levels.items():
        y = 20 + 62 * bits
        drawing.line(40, y, 680, y)
        drawing.text(24, y - 14, f"{bits} bit{'s' * (bits > 1)}")
        for number, value in enumerate(values):
            if bits > 1:
                drawing.line(levels[bits - 1][number // 2], y - 62, value, y, SHADES[2])
    for bits, values in levels.items():
        for value in values:
            drawing.circle(value, 20 + 62 * bits, SHADES[bits - 1])
    drawing.text(
        360, 238, "one more plane splits every value in two; each bits has scales of its own", at="middle", colour=SOFT
    )
    drawing.save("scales")


def bits() -> None:
    drawing = Drawing(720, 230)
    for index, wanted in enumerate((2, 4, 3)):
        y = 30 + 62 * index
        drawing.label(20, y, 150, 40, f"request: bits={wanted}")
        drawing.line(170, y + 20, 268, y + 20, arrow=True)
        for plane in range(4):
            fill = SHADES[plane] if plane < wanted else "white"
            drawing.label(275 + 82 * plane, y, 76, 40, f"plane {plane}", fill)
        drawing.line(605, y + 20, 640, y + 20, arrow=True)
        drawing.text(648, y + 24, f"{wanted} planes")
    drawing.text(360, 218, "one copy of the planes in memory, three requests in one batch", at="middle", colour=SOFT)
    drawing.save("bits")


def plans() -> None:
    drawing = Drawing(720, 240)
    uniform, chosen = [3] * 12, [4, 3, 2, 4, 3, 3, 2, 3, 2, 4, 2, 4]
    for x, title, heights in ((40, "bits=3", uniform), (390, "a plan of the same bytes, less loss", chosen)):
        drawing.text(x, 26, title)
        for layer, height in enumerate(heights):
            for plane in range(height):
                drawing.box(x + 24 * layer, 176 - 34 * plane, 20, 31, SHADES[plane])
        drawing.line(x - 6, 210, x + 290, 210)
        drawing.text(x, 228, "layers", colour=SOFT)
    drawing.save("plans")


def pages() -> None:
    drawing, start = Drawing(720, 210), 40
    drawing.label(start, 60, 190, 44, "smallest plan", SHADES[0])
    sizes = (44, 62, 36, 80, 52, 40, 70, 46)
    x = start + 194
    for number, width in enumerate(sizes):
        drawing.label(x, 60, width - 3, 44, str(number + 1), SHADES[2] if number < 5 else "white")
        x += width
    for place, words in ((start + 194 + sum(sizes[:2]), "400 MB"), (start + 194 + sum(sizes[:5]), "600 MB")):
        drawing.line(place - 1.5, 40, place - 1.5, 126, ACCENT)
        drawing.text(place, 34, words, at="middle", colour=ACCENT)
    drawing.line(start + 194 + sum(sizes[:2]), 138, start + 190 + sum(sizes[:5]), 138, arrow=True)
    drawing.text(start + 194 + sum(sizes[:2]), 158, "resize: read pages 3 to 5, keep the rest")
    drawing.text(360, 196, "every budget is a prefix of one order of pages", at="middle", colour=SOFT)
    drawing.save("pages")


def engine() -> None:
    drawing = Drawing(720, 230)
    for index, words in enumerate(("bits=2", "bits=4", "a plan")):
        drawing.label(20, 40 + 44 * index, 80, 32, words)
        drawing.line(100, 56 + 44 * index, 142, 100, arrow=True)
    for x, words in ((150, "admit"), (275, "choose bits"), (400, "pack"), (525, "one pass")):
        drawing.label(x, 80, 95, 40, words, SHADES[1] if words == "one pass" else "white")
    for x in (245, 370, 495):
        drawing.line(x, 100, x + 28, 100, arrow=True)
    drawing.line(620, 100, 648, 100, arrow=True)
    drawing.text(654, 104, "a token")
    drawing.text(654, 122, "for each")
    for x in (572, 197):
        drawing.line(x, 122 if x > 500 else 180, x, 180 if x > 500 else 124, arrow=x < 500)
    drawing.line(572, 180, 197, 180)
    drawing.text(385, 172, "next round", at="middle", colour=SOFT)
    drawing.text(197, 66, "room in the cache?", at="middle", colour=SOFT, size=11)
    drawing.text(322, 66, "the policy", at="middle", colour=SOFT, size=11)
    drawing.text(447, 66, "which rows together", at="middle", colour=SOFT, size=11)
    drawing.text(572, 66, "the whole model", at="middle", colour=SOFT, size=11)
    drawing.text(385, 214, "one thread; each request keeps its bits, seed and stop texts", at="middle", colour=SOFT)
    drawing.save("engine")


if __name__ == "__main__":
    for draw in (planes, scales, bits, plans, pages, engine):
        draw()
