"""Figures that papers have published about routing, to stand beside what is measured here; kept in this one place."""

MIXTRAL = "Mixtral 8x7B"
MIXTRAL_SOURCE = "Jiang et al., Mixtral of Experts, arXiv 2401.04088, table 5"
MIXTRAL_LAYERS = (0, 15, 31)

# How often consecutive tokens get the same expert, in percent, in layers 0, 15 and 31 of 32:
# domain -> ((same first choice), (first or second choice in common)).
MIXTRAL_REPEATS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ArXiv": ((14.0, 27.9, 22.7), (46.5, 62.3, 52.9)),
    "DM Mathematics": ((14.1, 28.4, 19.7), (44.9, 67.0, 44.5)),
    "Github": ((14.9, 28.1, 19.7), (49.9, 66.9, 49.2)),
    "Gutenberg": ((13.9, 26.1, 26.3), (49.5, 63.1, 52.2)),
    "PhilPapers": ((13.6, 25.3, 22.1), (46.9, 61.9, 51.3)),
    "PubMed Abstracts": ((14.2, 24.6, 22.0), (48.6, 61.6, 51.8)),
    "StackExchange": ((13.6, 27.2, 23.6), (48.2, 64.6, 53.6)),
    "Wikipedia": ((14.4, 23.6, 25.3), (49.8, 62.1, 51.8)),
}
