"""The rooms: one folder per component of the model, one file per dialect.

``__init__.py`` is the contract (a Protocol and the equation), ``reference.py`` the definition in array code over
NumPy or CuPy, ``numba_cpu.py`` the same as jitted CPU loops. Rooms never import each other.
"""
