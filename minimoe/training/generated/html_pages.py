"""HTML pages: the title returns as a heading, links lead to the sections, tables have totals, tags are closed."""

from html import escape
from random import Random

from .words import ADJECTIVES, COLOURS, GOODS, PARTS, PLACES, QUANTITIES, SECTIONS, STATES, code

VOID = ("meta", "link", "br", "hr", "img", "input")


class Page:
    """Lines of markup under one style: a page's own indentation and prefix of class names."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.indent = rng.choice(("", " ", "  ", "  ", "    "))
        self.prefix = rng.choice(("", "", *PARTS, *COLOURS))
        self.lines: list[str] = []
        self.open: list[str] = []

    def start(self, tag: str, **attributes: str) -> None:
        """Open an element that holds others."""
        self.line(self.tag(tag, **attributes))
        self.open.append(tag)

    def end(self) -> None:
        """Close the element opened last."""
        tag = self.open.pop()
        self.line(f"</{tag}>")

    def line(self, markup: str) -> None:
        """Write one line at the present depth."""
        self.lines.append(self.indent * len(self.open) + markup)

    def leaf(self, tag: str, text: str, **attributes: str) -> None:
        """Write an element that holds text only; the text is escaped."""
        self.line(f"{self.tag(tag, **attributes)}{escape(text)}</{tag}>")

    def tag(self, tag: str, **attributes: str) -> str:
        """Format an opening tag; `kind` becomes the class, with the page's prefix."""
        named = {"class" if key == "kind" else key: value for key, value in attributes.items()}
        if "class" in named and self.prefix:
            named["class"] = f"{self.prefix}-{named['class']}"
        return f"<{tag}{''.join(_attribute(key, value) for key, value in named.items())}>"


def _attribute(key: str, value: str) -> str:
    return f' {key}="{escape(value)}"'


def write(rng: Random) -> str:
    """Write one page of one to four sections."""
    page = Page(rng)
    part, cargo = f"{rng.choice(ADJECTIVES)} {rng.choice(PARTS)}", f"{rng.choice(GOODS)} in {rng.choice(PLACES)}"
    subject = rng.choice((part, cargo))
    title = subject[0].upper() + subject[1:]
    sections = rng.sample(SECTIONS, rng.randint(1, 4))
    page.line("<!DOCTYPE html>")
    page.start("html", lang="en")
    page.start("head")
    page.line('<meta charset="utf-8">')
    page.leaf("title", title)
    page.end()
    page.start("body", id=code(rng).lower())
    page.leaf("h1", title)
    page.start("nav", kind="menu")
    for name in sections:
        page.leaf("a", name, href=f"#{name.lower()}")
    page.end()
    for name in sections:
        page.start("section", id=name.lower(), kind="part")
        page.leaf("h2", name)
        rng.choice((_table, _table, _list, _definitions, _form, _prose))(page, subject)
        page.end()
    page.leaf("footer", f"{title}: {', '.join(sections)}")
    page.end()
    page.end()
    return "\n".join(page.lines) + "\n"


def _table(page: Page, subject: str) -> None:
    rng = page.rng
    columns = rng.sample(PLACES, rng.randint(2, 3)) if rng.random() < 0.5 else rng.sample(QUANTITIES, rng.randint(2, 3))
    totals = [0] * len(columns)
    page.start("table", kind="data")
    page.leaf("caption", f"The {subject} in figures")
    page.line("<tr>" + "".join(page.tag("th") + column + "</th>" for column in ("part", *columns, "sum")) + "</tr>")
    for part in rng.sample(PARTS, rng.randint(2, 5)):
        figures = [rng.randint(0, 30) for _ in columns]
        totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
        _row(page, part, figures)
    _row(page, "all", totals)
    page.end()


def _row(page: Page, name: str, figures: list[int]) -> None:
    cells = [page.tag("td", kind="name") + name, *(page.tag("td") + str(n) for n in (*figures, sum(figures)))]
    page.line("<tr>" + "".join(cell + "</td>" for cell in cells) + "</tr>")


def _list(page: Page, subject: str) -> None:
    rng = page.rng
    page.leaf("p", f"Parts of the {subject}, and what each is made up of:", kind="lead")
    page.start(rng.choice(("ul", "ol")), kind="list")
    for part in rng.sample(PARTS, rng.randint(2, 4)):
        if rng.random() < 0.5:
            page.leaf("li", part)
            continue
        page.start("li", kind="group")
        page.leaf("b", part)
        page.start("ul")
        for adjective in rng.sample(ADJECTIVES, rng.randint(1, 3)):
            page.leaf("li", f"{adjective} {part}")
        page.end()
        page.end()
    page.end()


def _definitions(page: Page, subject: str) -> None:
    page.start("dl", kind="terms")
    for quantity in page.rng.sample(QUANTITIES, page.rng.randint(2, 4)):
        page.leaf("dt", quantity, id=quantity)
        low = page.rng.randint(1, 60)
        high = low + page.rng.randint(1, 9) * 10
        page.leaf("dd", f"The {quantity} of the {subject} lies between {low} and {high}; above {high} it is too high.")
    page.end()


def _form(page: Page, subject: str) -> None:
    page.start("form", action=f"/{subject.replace(' ', '-')}", method=page.rng.choice(("get", "post")))
    for quantity in page.rng.sample(QUANTITIES, page.rng.randint(1, 3)):
        page.leaf("label", quantity.capitalize(), **{"for": quantity})
        page.line(page.tag("input", id=quantity, name=quantity, value=str(page.rng.randint(1, 99))))
    page.start("select", name="state")
    for state in page.rng.sample(STATES, page.rng.randint(2, 4)):
        page.leaf("option", state.capitalize(), value=state)
    page.end()
    page.leaf("button", f"Save {subject}", kind="action")
    page.end()


def _prose(page: Page, subject: str) -> None:
    rng = page.rng
    first, second = rng.sample(PARTS, 2)
    place, state = rng.choice(PLACES), rng.choice(STATES)
    for sentence in rng.sample(
        (
            f"The {first} of the {subject} is kept in {place} & checked together with the {second}.",
            f"While the {first} is {state}, the {second} must be {state} too.",
            f"A <{second}> from {place} fits every {first} made there.",
            f'Write "{first}" or "{second}" on the label, then send it to {place}.',
        ),
        rng.randint(1, 3),
    ):
        page.leaf("p", sentence, kind="text")
