import builtins
import html
import inspect
import re

import numpy as np
import pytest

import minimoe
from minimoe.config import ModelConfig
from minimoe.ops.gating import numba_cpu, reference
from minimoe.ops.rmsnorm import cupy_gpu
from minimoe.plots.thumbnail import thumbnail
from minimoe.stepper import Stepper
from minimoe.stepper.arrays import array_html, numbers
from minimoe.stepper.code import kernels, sources
from minimoe.stepper.network import network_svg
from minimoe.stepper.page import tokens
from tests.conftest import ROOMS, launchers, module_of

TEXT = "def f(x):\n    return <x>"
SHOWN = ["<s>", "def", "f"]  # its first tokens


@pytest.fixture(scope="module")
def steps():
    return Stepper(minimoe.load("tiny", backend="numpy"), TEXT)


def pixels(png):
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(png))


def test_there_is_a_step_for_every_call_of_the_schedule(steps):
    assert [step.name for step in steps] == [step.name for step in steps.trace.steps]
    for i, step in enumerate(steps):
        page = steps.html(i)
        assert re.search(rf"{i + 1} of {len(steps)}: <code[^>]*>{re.escape(step.name)}</code>", page)
        for name in (*step.writes, *step.weights):
            assert f"<code>{name}</code>" in page


def test_the_numbers_are_those_of_the_trace_headed_by_their_tokens(steps):
    i = next(i for i, step in enumerate(steps) if step.name == "layers.2.gating")
    logits = steps.trace["layers.2.gating.logits"]
    lines = re.search(r"layers\.2\.gating\.logits</code>.*?<pre[^>]*>(.*?)</pre>", steps.html(i), re.S)[1].splitlines()
    assert lines[0].startswith("&lt;s&gt;")
    for line, row in zip(lines[: len(logits)], logits.tolist(), strict=False):
        assert [float(x) for x in line.rpartition("|")[2].split()] == [float(f"{x:.4g}") for x in row]


def test_text_of_tokens_is_escaped(steps):
    for page in (steps.html(1), steps.static()):
        assert "<x>" not in page and ">&lt;</code>" in page and "&lt;s&gt;" in page


def test_every_step_shows_the_tokens_and_long_texts_say_how_many_are_left_out(steps):
    for i in range(len(steps)):
        assert [html.unescape(t) for t in re.findall(r'title="token \d+">([^<]*)<', steps.html(i))][:3] == SHOWN
    shown = tokens(["a "] * 100)
    assert shown.count("<code") == 60 and "and 40 more" in shown


def test_the_first_step_shows_the_angles_that_every_layer_rotates_by(steps):
    page, first = steps.html(0), steps[0]
    assert first.name == "rope" and "floating-point" not in page  # the schedule counts no work for it
    config, N = steps.trace.config, steps.trace.tokens.size
    angle = np.arange(N)[:, None] * config.rope_theta ** (-2 * np.arange(config.head_dim // 2) / config.head_dim)
    for name, truth in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
        lines = re.search(rf"<code>{name}</code>.*?<pre[^>]*>(.*?)</pre>", page, re.S)[1].splitlines()
        for line, row in zip(lines[:N], truth, strict=True):
            assert [float(x) for x in line.rpartition("|")[2].split()] == pytest.approx(row[:10], abs=1e-3)


def test_an_index_counts_as_in_any_sequence(steps):
    assert steps.html(-1) == steps.html(len(steps) - 1)
    with pytest.raises(IndexError):
        steps.html(len(steps))


def test_numbers_and_code_unfold_where_they_are_asked_for(steps):
    i = next(i for i, step in enumerate(steps) if step.name == "layers.1.attention.qkv")
    folded = steps.html(i)
    assert "<details open" not in folded
    assert steps.html(i, numbers=True).count("<details open><summary>numbers") == folded.count("<summary>numbers") == 7
    assert steps.html(i, code=True).count("<details open><summary>code") == 1


def test_rows_that_are_read_at_a_glance_stand_open(steps):
    i = next(i for i, step in enumerate(steps) if step.name == "layers.1.gating")
    opened = re.findall(r"<code>([^<]*)</code></div>(?:(?!<code>).)*?<details open><summary>numbers", steps.html(i))
    assert opened == ["layers.1.gating.ids", "layers.1.gating.weights"]


def test_the_code_is_that_of_the_op_with_what_it_calls():
    found = sources("gating", "forward")
    assert list(found) == ["numpy", "numba", "cuda"]
    assert inspect.getsource(reference.forward).rstrip() in found["numpy"]
    assert inspect.getsource(numba_cpu.forward).rstrip() in found["numba"]
    assert inspect.getsource(numba_cpu._choose_rows.py_func).rstrip() in found["numba"]
    assert "def backward" not in found["numba"]
    where = [found["numba"].index(f"def {name}(") for name in ("forward", "_choose_all", "_choose_rows", "choose")]
    assert where == sorted(where)


def test_the_cuda_code_is_the_launcher_and_the_kernels_it_names():
    found = sources("rmsnorm", "forward")["cuda"]
    assert inspect.getsource(cupy_gpu.forward).rstrip() in found
    assert "// Block n -> row n; its threads" in found and "__global__ void rmsnorm_forward(" in found
    assert found.rstrip().endswith("}") and "rmsnorm_backward" not in found


@pytest.mark.parametrize("room", ROOMS)
def test_every_kernel_of_a_room_is_found_and_says_what_a_thread_computes(room):
    module = module_of(room, "cupy_gpu")
    if module is None or not hasattr(module, "KERNELS"):
        pytest.skip("this room has no kernels")
    found = kernels(room)
    assert len(found) == module.KERNELS.read_text().count("__global__")
    assert {name.partition("<")[0] for name in module.INSTANCES} == set(found)
    shown = "".join(sources(room, function)["cuda"] for function in launchers(room))
    for name, text in found.items():
        assert text.startswith("// ") and text.endswith("\n}") and re.search(rf"\b{name}\(", text), name
        assert text in shown, name


def test_a_dialect_that_is_not_written_says_what_runs_instead(monkeypatch):
    monkeypatch.delattr(cupy_gpu, "backward")
    sources.cache_clear()
    assert sources("rmsnorm", "backward")["cuda"] == "# not written: the array code runs in its place over CuPy"
    sources.cache_clear()


@pytest.mark.parametrize("layers", [1, 2, 40])
def test_the_map_marks_the_present_step_alone(layers):
    config = ModelConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=layers, num_heads=1, num_kv_heads=1, head_dim=4
    )
    for step in minimoe.schedule.schedule(config):
        svg = network_svg(config, step)
        here = re.findall(r'font-weight="bold"[^>]*>([^<]*)<', svg)
        assert len(here) == (1 if step.layer is None else 2)
        if step.layer is not None:
            assert here[0] == f"layer {step.layer}"


def test_the_static_page_holds_the_first_layer_and_the_ends_and_says_how_many_are_left(steps):
    page = steps.static()
    shown = [steps[int(number) - 1] for number in re.findall(r"<summary[^>]*><b>(\d+)</b>", page)]
    assert shown == [step for step in steps if step.layer in (None, 0)] and shown[-1].name == "logits"
    assert "<script" not in page and f"{len(steps) - len(shown)} further steps" in page
    assert "further steps" not in steps.static(range(len(steps)))


def test_next_and_back_move_the_slider_and_the_page(steps):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed: pip install 'minimoe[notebooks]'")
    box = steps.widget()
    (back, forth, slider, numbers, code), page = box.children[0].children, box.children[1]
    assert back.disabled and not forth.disabled and f"1 of {len(steps)}" in page.value
    forth.click()
    assert slider.value == 2 and "2 of" in page.value and "<code>tok_embeddings</code>" in page.value
    back.click()
    assert slider.value == 1 and "1 of" in page.value
    slider.value = len(steps)
    assert forth.disabled and "<code>logits</code>" in page.value
    forth.click()
    assert slider.value == len(steps)
    assert page.value == steps.html(-1)
    numbers.value = code.value = True
    assert page.value == steps.html(-1, numbers=True, code=True)
    back.click()  # what is unfolded stays so from step to step
    assert page.value == steps.html(-2, numbers=True, code=True)


def test_without_widgets_the_static_page_is_what_is_shown(steps, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    bundle = steps._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and bundle["text/html"] == steps.static()


def test_a_heat_map_has_a_pixel_a_number_coloured_by_sign():
    image = pixels(thumbnail(np.array([[1.0, -1.0, 0.0], [np.nan, np.inf, 0.5]])))
    assert image.shape[:2] == (2, 3)
    orange, blue, white, nan, inf, half = image[:, :, :3].reshape(-1, 3)
    assert orange[0] > orange[2] and blue[2] > blue[0] and (white > 0.98).all()
    assert np.allclose(nan, inf) and np.ptp(nan) < 0.01
    assert half[0] > half[2] and half.sum() > orange.sum()


def test_a_large_array_is_averaged_over_tiles():
    x = np.zeros((7, 9))
    x[0, :3], x[6, 8] = [3.0, -3.0, 3.0], -1.0
    image = pixels(thumbnail(x, most=(3, 7)))
    assert image.shape[:2] == (7, 3)
    assert image[0, 0, 0] > image[0, 0, 2]  # the mean of 3, -3 and 3 is positive
    assert image[6, 2, 2] > image[6, 2, 0]


@pytest.mark.parametrize("array", [np.zeros(0), np.zeros((0, 3)), np.float64(2.5), np.full((2, 2), -np.inf)])
def test_arrays_with_nothing_to_see_are_shown_all_the_same(array):
    page = array_html("x", array, "N D")
    assert "<img" in page and "nan" not in page.split("<pre")[0]


def test_what_is_left_out_of_the_numbers_is_said():
    lines = numbers(np.arange(90).reshape(30, 3), [f"t{i}" for i in range(30)]).splitlines()
    assert lines[-1] == "the first 8 and the last 4 of 30 rows, 3 of 3 columns"
    assert [line.split()[0] for line in lines[:-1]] == [*(f"t{i}" for i in range(8)), "⋮", "t26", "t27", "t28", "t29"]
    assert lines[9].split()[2:] == ["78", "79", "80"]
    assert numbers(np.zeros((3, 30))).endswith("all of 3 rows, 10 of 30 columns")
    assert " of " not in numbers(np.zeros((12, 10)))


def test_a_dense_model_steps_without_a_gate():
    config = ModelConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4,
        num_experts=1, num_experts_per_token=1, dense=True, bos_id=None, eos_id=None,
    )  # fmt: skip
    steps = Stepper(minimoe.random(config, backend="numpy"), [1, 2, 3])
    assert all("gating" not in step.name for step in steps)
    assert all(steps.html(i) for i in range(len(steps)))
