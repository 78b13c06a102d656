"""Hold an implementation's outputs against a golden kit. Needs Python and NumPy only: copy this folder where you like.

    python verify KIT OUTPUTS [--profile float32] [--only 'gating*']

A kit is a folder: manifest.json; cases/<id>.safetensors with the tensors `inputs/<name>`, `truth/<name>` (float64) and
`truth32/<name>` (its rounding to float32); models/<name>/, Hugging Face checkpoints. README.md beside it is the
specification. OUTPUTS is a folder of <id>.safetensors or <id>.npz that hold the outputs of the cases by name.

Everything is measured in bounds: error = max |output - truth| over a tensor, bound = relative · max |truth| + absolute,
and what counts is error ÷ bound. Exit status: 0 all fits, 1 something does not, 2 bad usage or an unreadable kit.
"""

from .check import check, check_folder, expected_failures, matching, select
from .compare import compare, force_routing
from .files import read_outputs, unknown_files
from .kit import VERSION, Case, KitError, Output, read_kit, read_tensors
from .report import Report
from .results import CaseResult, Decision, Element, TensorResult, describe, details

__all__ = [
    "VERSION", "Case", "CaseResult", "Decision", "Element", "KitError", "Output", "Report", "TensorResult", "check",
    "check_folder", "compare", "describe", "details", "expected_failures", "force_routing", "matching", "read_kit",
    "read_outputs", "read_tensors", "select", "unknown_files",
]  # fmt: skip
