"""The package's golden kit."""

from pathlib import Path

import minimoe.golden
from minimoe.golden.verify import read_kit

KIT = Path(minimoe.golden.__file__).parent / "vectors"
_, CASES = read_kit(KIT)


def select(profile):
    """The cases that have bounds for a profile."""
    return [case for case in CASES if profile in case.profiles]
