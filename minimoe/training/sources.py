"""Text that every installation carries: Python and C source, and the prose of docstrings.

Nothing is downloaded and nothing is copied into the repository: the standard library, the C headers of Python and
the packages that minimoe depends on are read where they are installed. Text that says the same in many files
(licence headers) is dropped: it would be in the training part and in the held-out part at once.
"""

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from .document import Document, place_in_part, unit_hash
from .prose import paragraphs

PACKAGES = ("numpy", "numba", "matplotlib")  # read if installed; the manifest says which were
PYTHON_TEST_SHARE = 0.143  # of the standard library's test modules: all of them would outweigh the library
MAX_FILE_BYTES = 160_000  # beyond this, files are tables more often than text

_SKIPPED_FOLDERS = {"encodings", "idlelib", "pydoc_data", "site-packages", "dist-packages", "data", "__pycache__"}
_SKIPPED_FILES = re.compile(
    r"_sysconfigdata.*|.*unicode.*(db|data).*|pyconfig\.h|badsyntax.*|bad_.*|libdivide\.h|cuda_.*"
)
_LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
_C_COMMENT = re.compile(r"/\*.*?\*/[ \t]*\n?", re.DOTALL)


def python_documents() -> Iterator[Document]:
    """Yield the standard library's modules without docstrings, then some of its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path, name in chain(_files(root, "*.py", tests=False), _files(root, "*.py", tests=True)):
        if is_test(name) and place_in_part(name) >= PYTHON_TEST_SHARE:
            continue
        text = _read(path)
        tree = _parse(text)
        if tree is not None and _is_text(text):
            yield Document(name, tidy(_drop_legal(_COMMENT_BLOCK, strip_docstrings(text, tree))))


def c_documents() -> Iterator[Document]:
    """Yield the C headers and sources of Python and of the packages, without licence comments."""
    roots = [("include", Path(sysconfig.get_paths()["include"])), ("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    roots += [(package, folder) for package, folder in installed_packages() if package != "matplotlib"]
    for label, root in roots:
        for pattern in ("*.h", "*.c"):
            for path, name in _files(root, pattern, tests=None):
                text = _read(path)
                if _is_text(text):
                    yield Document(f"{label}/{name}", tidy(_drop_legal(_C_COMMENT, text)))


def english_documents() -> Iterator[Document]:
    """Yield the prose of docstrings, one document per source file, and of `pydoc`'s topics; no paragraph twice."""
    seen: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _prose_of_topics(seen)
    for path, name in _files(root, "*.py", tests=None, max_bytes=None):
        yield from _prose_of_file(path, name, seen, comments=False)
    for package, folder in installed_packages():
        for path, name in _files(folder, "*.py", tests=None, max_bytes=None):
            yield from _prose_of_file(path, f"{package}/{name}", seen, comments=True)


def installed_packages() -> list[tuple[str, Path]]:
    """Find the packages of `PACKAGES` that are installed, without importing them."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found.append((package, Path(spec.origin).parent))
    return found


def strip_docstrings(text: str, tree: ast.Module) -> str:
    """Remove every docstring and keep everything else, comments included."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]  # ast counts columns in UTF-8 bytes
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(owner, clean=False) is None:
            continue
        statement = owner.body[0]
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        alone = not before.strip() and not after.strip()
        lines[first : last + 1] = [b""] * (last + 1 - first)  # emptied, not removed: the tree's line numbers stay
        if not alone or (len(owner.body) == 1 and not isinstance(owner, ast.Module)):
            lines[first] = before + b"pass" + after
        elif last + 1 < len(lines) and not lines[last + 1].strip():
            lines[last + 1] = b""  # the blank line that set the docstring off from the code
    return b"".join(lines).decode()


def is_test(name: str) -> bool:
    """Say whether a path names a test module."""
    return any(part in ("test", "tests") for part in Path(name).parts)


def tidy(text: str) -> str:
    """Drop trailing blanks, leading and repeated empty lines: noise that no model can predict."""
    text = re.sub(r"[ \t\f]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def _files(
    root: Path, pattern: str, tests: bool | None, max_bytes: int | None = MAX_FILE_BYTES
) -> list[tuple[Path, str]]:
    """List files below a folder with their relative names, in an order that is arbitrary but always the same."""
    found = []
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts) or _SKIPPED_FILES.fullmatch(path.name):
            continue
        fits = max_bytes is None or path.stat().st_size <= max_bytes
        if fits and (tests is None or is_test(relative.as_posix()) == tests):
            found.append((path, relative.as_posix()))
    return sorted(found, key=lambda item: unit_hash(item[1]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _is_text(text: str) -> bool:
    """Refuse tables of numbers, generated one-line files and files about other alphabets."""
    if len(text) < 200 or "\0" in text or "\u2581" in text:  # U+2581 is SentencePiece's own mark for a space
        return False
    digits = sum(map(text.count, "0123456789"))
    foreign = len(text.encode()) - len(text)
    return digits < 0.15 * len(text) and foreign < 0.01 * len(text) and max(map(len, text.splitlines())) <= 300


def _drop_legal(block: re.Pattern[str], text: str) -> str:
    return block.sub(lambda match: "" if _LEGAL.search(match[0]) else match[0], text)


def _prose_of_topics(seen: set[str]) -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return
    for topic, text in topics.items():
        prose = paragraphs(text, seen)
        if prose:
            yield Document(f"pydoc_data/topics/{topic}", prose)


def _prose_of_file(path: Path, name: str, seen: set[str], comments: bool) -> Iterator[Document]:
    source = _read(path)
    tree = _parse(source)
    if tree is None:
        return
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call):  # NumPy attaches the docstrings of its C functions by calls
            texts += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if comments:  # of files whose code is in no domain
        blocks = _COMMENT_BLOCK.findall(_drop_legal(_COMMENT_BLOCK, source))
        texts += [re.sub(r"^[ \t]*#+[ ]?", "", block, flags=re.MULTILINE) for block in blocks]
    prose = paragraphs("\n\n".join(texts), seen)
    if prose:
        yield Document(name, prose)
