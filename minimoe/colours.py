"""One colour per expert, the same in every figure, notebook and terminal.

The first eight are the palette of Okabe and Ito (Color Universal Design, 2008), which people with any of the common
colour deficiencies can tell apart; its black is softened to a dark grey. Experts beyond eight take lighter and darker
shades of the same eight.
"""

PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#474747")

# How far a round of eight goes from the pure colours: towards white (positive) or black (negative).
_SHADES = (0.0, 0.55, -0.45, 0.78, -0.68, 0.3, -0.22, 0.88)


def expert_colour(expert: int) -> str:
    """Return the colour of an expert as "#rrggbb"; 64 experts have different ones, then they repeat.

    >>> expert_colour(0), expert_colour(8)
    ('#e69f00', '#f4d48c')
    """
    base, shade = PALETTE[expert % 8], _SHADES[expert // 8 % len(_SHADES)]
    end = 255 if shade > 0 else 0
    return "#" + "".join(f"{round(part + abs(shade) * (end - part)):02x}" for part in _parts(base))


def ink(colour: str) -> str:
    """Return black or white, whichever is read better on `colour` (WCAG 2.2, relative luminance).

    >>> ink("#f0e442"), ink("#0072b2")
    ('#000000', '#ffffff')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (p / 255 for p in _parts(colour))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def xterm256(colour: str) -> int:
    """Return the nearest of a terminal's 256 colours: the 6 × 6 × 6 cube from 16, or one of 24 greys from 232."""
    parts = _parts(colour)
    steps = (0, 95, 135, 175, 215, 255)
    cube = [min(range(6), key=lambda i, part=part: abs(steps[i] - part)) for part in parts]  # type: ignore[misc]
    grey = min(range(24), key=lambda i: sum((8 + 10 * i - part) ** 2 for part in parts))
    cube_error = sum((steps[i] - part) ** 2 for i, part in zip(cube, parts, strict=True))
    grey_error = sum((8 + 10 * grey - part) ** 2 for part in parts)
    return 232 + grey if grey_error < cube_error else 16 + 36 * cube[0] + 6 * cube[1] + cube[2]


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
