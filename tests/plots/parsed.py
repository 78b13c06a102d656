"""Reading a page as a browser would: tables by caption, tokens by text, scripts, pictures, and what it refers to."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "input", "link", "hr"}


@dataclass
class Parsed(HTMLParser):
    """What a page holds; `tables` maps captions to rows of cells, the head's row first."""

    tables: dict = field(default_factory=dict)
    scripts: list = field(default_factory=list)  # (attributes, text)
    images: list = field(default_factory=list)
    tags: list = field(default_factory=list)  # (name, attributes)
    texts: dict = field(default_factory=dict)  # number of the text -> [(class, piece, expert)]
    text: str = ""

    def __post_init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.cells, self.caption, self.reading, self.token = [], None, None, None, None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "table":
            self.cells = []
        elif tag == "tr":
            self.cells.append([])
        elif tag in ("th", "td"):
            assert tag == "td" or attributes["scope"] in ("col", "row")
            self.cells[-1].append("")
        elif tag == "caption":
            self.caption = ""
        elif tag == "img":
            self.images.append(attributes)
        elif tag == "script":
            self.scripts.append([attributes, ""])
        elif tag == "figure" and "data-text" in attributes:
            self.reading = self.texts.setdefault(int(attributes["data-text"]), [])
        elif tag == "span" and any(name == "pre" for name, _ in self.open):
            self.token = [attributes["class"], "", ""]

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert name == tag, f"<{name}> is closed by </{tag}>"
        if tag == "table":
            self.tables[self.caption] = self.cells
            self.cells = None
        elif tag == "span" and self.token:
            self.reading.append(tuple(self.token))
            self.token = None

    def handle_data(self, data):
        names = [name for name, _ in self.open]
        if "script" in names:
            self.scripts[-1][1] += data
            return
        if "style" in names:
            return
        self.text += data
        if "caption" in names:
            self.caption += data
        elif self.cells and ("td" in names or "th" in names):
            self.cells[-1][-1] += data
        if self.token:
            self.token[2 if "sub" in names else 1] += data


def parsed(source):
    """Parse a page, which must be well formed."""
    page = Parsed()
    page.feed(str(source))
    page.close()
    assert not page.open, page.open
    return page


def numbers(table, columns=slice(1, None)):
    """The cells below the head as numbers; the first number of each cell; a dash is NaN."""

    def number(cell):
        first = cell.replace("−", "-").replace(",", "").split("[")[0].split("(")[0].split("±")[0].strip()
        return float("nan") if first == "–" else float("inf") if first == "∞" else float(first)

    return np.array([[number(cell) for cell in row[columns]] for row in table[1:]])


def pixels(image):
    """The picture that an <img> holds, as an array (height, width, 3)."""
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
