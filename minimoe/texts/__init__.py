"""One short original text per domain, written for this project: what demos, tests and golden outputs read."""

from importlib.resources import files

_DOMAINS = ("python", "c", "english", "arithmetic", "json", "html")

_PROMPTS = {
    "python": "class Queue:\n    def __init__(self, size):\n        self.items = []\n        self.size =",
    "c": "#include <stddef.h>\n\nint sum(const int *values, size_t count)\n{\n    int total = 0;\n    for (size_t",
    "english": "The function returns a new array with the same shape as the input. If the input is empty, it",
    "arithmetic": "add 4827 + 396\n7 + 6 + 0 = 13: write 3, carry 1\n2 + 9 + 1 =",
    "json": '{\n  "sensor": "T-118",\n  "place": "Bergen",\n  "readings": [\n    {\n      "sensor": "T-118",',
    "html": '<!DOCTYPE html>\n<html lang="en">\n<head>\n<title>Small pump</title>\n</head>\n<body>\n<h1>Small',
}


def names() -> tuple[str, ...]:
    """The six domains, in the order in which figures show them."""
    return _DOMAINS


def load() -> dict[str, str]:
    """Read every domain's text."""
    folder = files(__name__)
    return {domain: (folder / f"{domain}.txt").read_text(encoding="utf-8") for domain in _DOMAINS}


def prompts() -> dict[str, str]:
    """The beginning of a text in each domain, for a model to continue."""
    return dict(_PROMPTS)
