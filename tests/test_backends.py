import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minimoe.backends import ROOMS, BackendError, make_backend
from tests.conftest import ROOMS as FOLDERS
from tests.conftest import launchers, module_of


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_every_cell_is_the_dialects_own_or_the_references_and_the_table_says_which(name):
    ops = make_backend(name)
    assert sorted(ROOMS) == FOLDERS
    assert set(ops.dialects) == {(room, function) for room in ROOMS for function in launchers(room)}
    dialect = {"numpy": "reference", "numba": "numba_cpu"}[name]
    for (room, function), cell in ops.dialects.items():
        own = module_of(room, dialect)
        assert cell == (dialect if own is not None and hasattr(own, function) else "reference")
        assert getattr(getattr(ops, room), function) is getattr(module_of(room, cell), function)


def test_numba_has_a_dialect_of_its_own_for_every_op():
    """Sampling's backward does not exist; every other cell of the column is written."""
    assert {room for (room, _), cell in make_backend("numba").dialects.items() if cell != "reference"} == set(ROOMS)


def test_a_missing_cell_is_filled_by_the_reference(monkeypatch):
    monkeypatch.delattr("minimoe.ops.rmsnorm.numba_cpu.backward")
    ops = make_backend("numba")
    assert ops.dialects["rmsnorm", "forward"] == "numba_cpu"
    assert ops.dialects["rmsnorm", "backward"] == "reference"
    assert ops.rmsnorm.backward is module_of("rmsnorm", "reference").backward


def test_auto_is_the_fastest_that_runs_everywhere():
    assert make_backend().name == make_backend("auto").name == "numba"


@pytest.mark.parametrize("name", ["torch", "NumPy", "", "gpu"])
def test_an_unknown_backend_is_an_error_that_lists_those_there_are(name):
    with pytest.raises(BackendError, match=f"unknown backend '{name}'; there are numpy, numba, cuda and auto"):
        make_backend(name)


def test_errors_are_value_errors():
    assert issubclass(BackendError, ValueError)


def test_cuda_without_cupy_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it fails
    with pytest.raises(BackendError, match=r"needs CuPy, which is not installed: pip install 'minimoe\[cuda12\]' or"):
        make_backend("cuda")


def _cupy(count):
    runtime = SimpleNamespace(getDeviceCount=count)
    device = SimpleNamespace(compute_capability="90")
    return SimpleNamespace(__version__="14.0.1", cuda=SimpleNamespace(runtime=runtime, Device=lambda: device))


def test_cuda_without_a_device_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", _cupy(lambda: 0))
    with pytest.raises(BackendError, match=r"found CuPy but no CUDA device .*CUDA_VISIBLE_DEVICES"):
        make_backend("cuda")


def test_cuda_without_a_driver_passes_on_what_cuda_says(monkeypatch):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver: driver version is insufficient")

    monkeypatch.setitem(sys.modules, "cupy", _cupy(fail))
    with pytest.raises(BackendError, match="no usable CUDA driver or device: cudaErrorInsufficientDriver"):
        make_backend("cuda")


def test_cuda_with_too_old_a_driver_names_both_versions(monkeypatch):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    cupy = _cupy(fail)
    cupy.cuda.runtime.driverGetVersion, cupy.cuda.runtime.runtimeGetVersion = lambda: 11080, lambda: 13020
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(
        BackendError, match=r"the driver is too old: it serves CUDA 11\.8, this CuPy is built for 13\.2"
    ):
        make_backend("cuda")
    cupy.cuda.runtime.driverGetVersion = lambda: 0
    with pytest.raises(BackendError, match=r"found CuPy but no CUDA driver: .*nvidia-smi"):
        make_backend("cuda")


def test_cuda_without_its_libraries_says_how_to_get_them(monkeypatch):
    def fail():
        raise RuntimeError("libnvrtc.so.13: no such file")

    cupy = _cupy(lambda: 1)  # without cuBLAS
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(BackendError, match=r"does not find CUDA's libraries .*: pip install 'minimoe\[cuda12\]'"):
        make_backend("cuda")
    cupy.cuda.cublas, cupy.cuda.nvrtc = SimpleNamespace(gemmEx=None), SimpleNamespace(getVersion=fail)
    with pytest.raises(BackendError, match=r"does not find CUDA's libraries \(libnvrtc.so.13: no such file\)"):
        make_backend("cuda")


def test_cuda_with_too_old_a_cupy_names_it(monkeypatch):
    cupy = _cupy(lambda: 1)
    cupy.__version__ = "13.6.0"
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(BackendError, match=r"found CuPy 13\.6\.0; it needs 14 or later: pip install"):
        make_backend("cuda")


def test_cuda_with_too_old_a_device_says_what_it_lacks(monkeypatch):
    cupy = _cupy(lambda: 1)
    cupy.cuda.Device = lambda: SimpleNamespace(compute_capability="75")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(BackendError, match=r"a device of compute capability 7\.5; it needs 8\.0 .*bfloat16"):
        make_backend("cuda")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcuda.so.1: cannot open shared object file"),
        ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
    ],
)
def test_a_cupy_that_cannot_be_imported_is_told_from_one_that_is_not_there(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise error

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(BackendError, match=rf"found CuPy, but it cannot be imported \({error}\): pip install"):
        make_backend("cuda")


def test_a_missing_cell_is_the_reference_over_cupy(cupy):
    ops = make_backend("cuda")
    assert ops.name == "cuda" and ops.xp is cupy
    assert ops.dialects["rmsnorm", "forward"] == "cupy_gpu"
    missing = {cell for cell, dialect in ops.dialects.items() if dialect == "reference"}
    for room, function in missing:
        assert not hasattr(importlib.import_module(f"minimoe.ops.{room}"), "cupy_gpu") or not hasattr(
            importlib.import_module(f"minimoe.ops.{room}.cupy_gpu"), function
        )


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_host_arrays_are_taken_as_they_are(name):
    ops, x = make_backend(name), np.arange(3)
    assert ops.xp is np and ops.asarray(x) is x


def test_a_backend_is_a_value():
    ops = make_backend("numpy")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ops.linear = None
    wrapped = dataclasses.replace(ops, linear=SimpleNamespace(forward=None))
    assert wrapped.linear.forward is None and ops.linear.forward is not None
