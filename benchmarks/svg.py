"""The SVG that matplotlib writes, made small: the same picture, an element a line.

What goes: groups that only name something, shapes that nothing is painted with, decimals beyond a
hundredth of a point, fonts and styles that are written again and again. Lines that follow each
other in one style become one path.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

_TAG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
# Verdana's letters are as wide as those of DejaVu Sans, by which the picture was laid out.
_FONTS = "DejaVu Sans, Verdana, Arial, sans-serif"
_FONT = re.compile(r"font-family:[^;]*;?")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
_LINE = re.compile(r"M (\S+) (\S+)\s+L (\S+) (\S+)\s*")  # a marker that is one line


def small(text: str) -> str:
    """The same picture in fewer bytes; of the same text always the same ones."""
    return _Small(ElementTree.fromstring(text)).text()


class _Small:
    """The lines of the new file, and the names that they use."""

    def __init__(self, root: Element) -> None:
        self._size = " ".join(f'{key}="{root.get(key)}"' for key in ("width", "height", "viewBox"))
        self._by_id = {element.get("id", ""): element for element in root.iter()}
        self._classes: dict[str, str] = {}  # by style
        self._names: dict[str, str] = {}  # of what is referred to, by its old name
        self._definitions: list[str] = []
        self._lines: list[str] = []
        # The last line, where it can go on: its head, what follows, its tail.
        self._last = "", "", ""
        self._add(root, "")

    def text(self) -> str:
        styles = [f".{name}{{{style}}}" for style, name in self._classes.items()]
        return "\n".join(
            [
                f'<svg {_SPACES} {self._size} font-family="{_FONTS}">',
                "<style>*{stroke-linejoin:round;stroke-linecap:butt}",
                *styles,
                "</style>",
                *self._definitions,
                *self._lines,
                "</svg>\n",
            ]
        )

    def _add(self, group: Element, clip: str) -> None:
        """Everything in ``group`` that is painted, in turn."""
        for element in group:
            kind = element.tag.removeprefix(_TAG)
            within = element.get("clip-path", clip)
            if kind == "g" and "transform" in element.attrib:  # mathematics
                self._write(f'<g transform="{_short(element.attrib["transform"])}">')
                self._add(element, within)
                self._write("</g>")
            elif kind == "g":
                self._add(element, within)
            elif kind == "path":
                self._add_path(element, within)
            elif kind == "use":
                self._add_marker(element, within)
            elif kind == "text":
                self._write(self._letters(element))

    def _write(self, line: str) -> None:
        self._lines.append(line)
        self._last = "", "", ""

    def _join(self, head: str, part: str, tail: str) -> None:
        """Writes a line, or goes on with the last one where that has the same head and tail."""
        if self._last[::2] == (head, tail):
            del self._lines[-1]
            part = self._last[1] + part
        self._write(f"{head}{part}{tail}")
        self._last = head, part, tail

    def _add_path(self, element: Element, clip: str) -> None:
        style, path = element.attrib["style"], _path(element.attrib["d"])
        if style == "fill: none":
            return
        head, tail = f'<path{self._attributes(style, clip)} d="', '"/>'
        if "fill: none" in style:
            self._join(head, path, tail)
        else:
            self._write(f"{head}{path}{tail}")

    def _add_marker(self, element: Element, clip: str) -> None:
        old = element.attrib[_HREF].removeprefix("#")
        marker = self._by_id[old]
        attributes = self._attributes(element.attrib["style"], clip)
        x, y = element.attrib["x"], element.attrib["y"]
        line = _LINE.fullmatch(marker.attrib["d"])
        if line is not None:
            x0, y0, x1, y1 = (float(number) for number in line.groups())
            ends = f"M {float(x) + x0} {float(y) + y0} L {float(x) + x1} {float(y) + y1}"
            self._join(f'<path{attributes} d="', _path(ends), '"/>')
            return
        if old not in self._names:
            style = self._attributes(marker.attrib["style"])
            self._define(old, f'<path id="{{}}"{style} d="{_path(marker.attrib["d"])}"/>')
        # In a group: a clip path of the marker itself would move with it.
        place = f'xlink:href="#{self._names[old]}" x="{_short(x)}" y="{_short(y)}"'
        self._join(f"<g{attributes}>", f"<use {place}/>", "</g>")

    def _letters(self, element: Element) -> str:
        """A text, with the parts that it may have."""
        kind = element.tag.removeprefix(_TAG)
        places = {key: _short(element.get(key, "")) for key in ("x", "y", "transform")}
        if places["transform"].startswith("rotate(0 "):
            del places["transform"]
        attributes = "".join(f' {key}="{place}"' for key, place in places.items() if place)
        inside = "".join(self._letters(part) for part in element) or escape(element.text or "")
        return f"<{kind}{self._attributes(element.get('style', ''))}{attributes}>{inside}</{kind}>"

    def _attributes(self, style: str, clip: str = "") -> str:
        """For an element: a class that stands for its style, and what it is clipped by."""
        attributes = ""
        style = re.sub(r"([:;]) +", r"\1", _FONT.sub("", style)).strip(";")
        if style:
            attributes = f' class="{self._classes.setdefault(style, f"s{len(self._classes)}")}"'
        if clip:
            old = clip.removeprefix("url(#").removesuffix(")")
            if old not in self._names:
                (rect,) = self._by_id[old]
                area = " ".join(f'{key}="{_short(value)}"' for key, value in rect.attrib.items())
                self._define(old, f'<clipPath id="{{}}"><rect {area}/></clipPath>')
            attributes += f' clip-path="url(#{self._names[old]})"'
        return attributes

    def _define(self, old: str, line: str) -> None:
        self._names[old] = f"d{len(self._names)}"
        self._definitions.append(f"<defs>{line.format(self._names[old])}</defs>")


def _short(text: str) -> str:
    """With every number to a hundredth."""
    return _NUMBER.sub(lambda found: f"{round(float(found[0]), 2) + 0.0:g}", text)


def _path(text: str) -> str:
    """A path without spaces that say nothing; points after an L need no further one."""
    path = re.sub(r"\s*([A-Za-z])\s*", r"\1", _short(text)).strip()
    return re.sub(
        r"L[^A-Za-z]+(?:L[^A-Za-z]+)+", lambda found: "L" + found[0][1:].replace("L", " "), path
    )
