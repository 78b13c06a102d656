"""One forward pass as a sequence of steps: each with its equation, its code in three dialects, and its arrays.

>>> import minimoe
>>> from minimoe.stepper import Stepper
>>> steps = Stepper(minimoe.load("tiny", backend="numpy"), "x = 1")
>>> len(steps), steps[2].name
(58, 'layers.0.attention_norm')

In Jupyter the object shows itself with Back, Next and a slider where ipywidgets runs, and as static HTML elsewhere.
"""

from minimoe.stepper.stepper import Stepper

__all__ = ["Stepper"]
