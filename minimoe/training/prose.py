"""From a docstring to its prose: whole paragraphs of sentences, one per line, without code, tables or signatures."""

import re

MIN_WORDS = 7
MIN_DOCUMENT_CHARACTERS = 240

_RULE = re.compile(r"[-=~^*#+_.:\"' ]{3,}")
_PARAMETER = re.compile(r"[*`\w][^.]{0,60}? : .*|[*`\w][\w, *.`]{0,40}:|:\w[^:]*:.*|@\w+.*")
_MARKUP = re.compile(r":\w+(?::\w+)?:`[~!]?([^`<]*?)(?: <[^`>]*>)?`")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_CODE = re.compile(r">>>|^\s*\.\. |::=|\w\(\)|[{}|\\$=]{2}|\w_\w+_|https?:")


def paragraphs(text: str, seen: set[str]) -> str:
    """Keep the paragraphs that are prose and have not been seen before.

    Parameters
    ----------
    text
        A docstring, or several joined by empty lines.
    seen
        Fingerprints of the paragraphs already taken; grows.

    Returns
    -------
    str
        One paragraph per line, or "" when there is too little prose for a document of its own.
    """
    kept = []
    for block in re.split(r"\n[ \t]*\n", text.expandtabs()):
        for paragraph in _split_sections(block):
            fingerprint = re.sub(r"\W+", " ", paragraph.lower())
            if is_prose(paragraph) and fingerprint not in seen:
                seen.add(fingerprint)
                kept.append(paragraph)
    document = "\n".join(kept) + "\n"
    return document if len(document) >= MIN_DOCUMENT_CHARACTERS else ""


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph reads as sentences: enough words, a full stop, few symbols, nothing that is code."""
    words = _WORD.findall(paragraph)
    letters = sum(map(len, words))
    symbols = sum(not (c.isalnum() or c in " .,;:'\"-()`*") for c in paragraph)
    return (
        len(words) >= MIN_WORDS
        and len(_CODE.findall(paragraph)) <= len(words) // 25
        and paragraph.rstrip("\"'`)").endswith((".", ":", "!", "?"))
        and letters >= 0.7 * len(paragraph)
        and symbols <= 0.04 * len(paragraph)
        and letters >= 3.2 * len(words)
        and paragraph.isascii()
    )


def _split_sections(block: str) -> list[str]:
    """Cut a block at headings and parameter lines, and join the lines of what is left into one."""
    found: list[str] = []
    current: list[str] = []
    lines = block.splitlines()
    for i, line in enumerate(lines):
        below = lines[i + 1].strip() if i + 1 < len(lines) else ""
        heading = bool(below) and bool(_RULE.fullmatch(below)) and len(below) >= 3
        if heading or _RULE.fullmatch(line.strip()) or _PARAMETER.fullmatch(line.strip()):
            found.append(_join(current))
            current = []
        else:
            current.append(line.strip())
    found.append(_join(current))
    return [paragraph for paragraph in found if paragraph]


def _join(lines: list[str]) -> str:
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r"^[-*o] (?=\S)", "", text)  # a list's bullet
    return _MARKUP.sub(r"\1", text).replace("``", "`")
