"""Tables say what the document says; README's is rewritten between its markers, and only there."""

import json

import numpy as np
import pytest

from minimoe import plots
from minimoe.bench import report, tables

SUMMARY = {"median": 0.02, "low": 0.019, "high": 0.021}


def entry(**changes):
    return {
        "what": "decode", "device": "cpu", "backend": "numba", "dtype": "float32", "batch": 1, "context": 512,
        "experts": 8, "parameters": 10, "tokens": 1, "tokens_per_second": 50.0, "seconds": SUMMARY, "spread": 0.1,
        "flops": 4e8, "weight_bytes": 7e8, "cache_bytes": 1e8, "bandwidth": SUMMARY | {"median": 50e9},
        "rate": SUMMARY | {"median": 200e9}, "roof": "memory", "of_roof": SUMMARY | {"median": 0.8},
        "check": {"against": "numpy", "distance": 2e-7, "allowed": 1e-3, "right": True},
    } | changes  # fmt: skip


def peer(**changes):
    return {
        "against": "transformers", "distance": 3e-7, "allowed": 1e-3, "right": True, "experts": "eager",
        "seconds": SUMMARY, "spread": 0.02, "peak_bytes": 5, "ratio": SUMMARY | {"median": 1.25},
    } | changes  # fmt: skip


def document(*results, **changes):
    machine = {"processor": "A chip", "cores": 2, "packages": {"minimoe": "0.1.0", "numpy": "2.4", "gone": None}}
    return {
        "format": "minimoe bench 1", "model": "medium", "rounds": 5, "threads": 2, "command": "minimoe bench --x",
        "machine": machine, "results": list(results), "processes": [], "ops": [], "warnings": [],
    } | changes  # fmt: skip


def test_a_row_of_the_terminal():
    [row] = report.rows(document(entry(peer=peer())))
    assert dict(zip(report.HEAD, row, strict=True)) == {
        "what": "decode", "backend": "numba", "dtype": "float32", "B": "1", "context": "512", "ms": "20",
        "tokens/s": "50", "reached": "40.0 GB/s", "of roof": "80%", "× peer": "1.25", "spread": "10%", "check": "ok",
    }  # fmt: skip
    [row] = report.rows(document(entry(roof="arithmetic", flops=4e9)))
    assert row[7] == "200 GFLOP/s" and row[9] == ""
    [row] = report.rows(document(entry(peer=peer(right=False))))
    assert row[-1] == "WRONG"


def test_what_is_said_below():
    half = entry(dtype="bfloat16", seconds=SUMMARY | {"median": 0.008})
    lines = "\n".join(report.lines(document(entry(), half, warnings=["the sky falls"])))
    assert "cpu: reads 50 GB/s, multiplies float32 weights at 200 GFLOP/s" in lines
    assert "bfloat16 is 2.50 times as fast as float32: decode on numba, batch 1, context 512" in lines
    assert "warning: the sky falls" in lines and "peer" not in lines
    compared = document(entry(peer=peer()), peer_versions={"torch": "9"}, peer_rates={"float32": 150e9})
    lines = "\n".join(report.lines(compared))
    assert "(torch: 150)" in lines and "peer: torch 9" in lines
    assert "logits differ from theirs by at most 3e-07" in lines


def op(name, seconds, flops, size, **changes):
    about = {key: value for key, value in entry().items() if key in ("what", "backend", "dtype", "batch", "context")}
    counts = {"name": name, "calls": 2, "seconds": seconds, "flops": flops, "bytes": size}
    return about | {"experts": 8, "parameters": 10, "bandwidth": 50e9, "rate": 200e9} | counts | changes


def test_ops_show_their_share_and_what_part_of_the_roof_they_reach():
    ops = [op("experts", 0.03, 10**8, 10**9), op("attention", 0.01, 10**9, 10**6), op("embedding", 0.0, 0, 64)]
    found = [dict(zip(report.OPS_HEAD, row, strict=True)) for row in report.op_rows(document(entry(), ops=ops))]
    assert [(f["share"], f["GFLOP/s"], f["GB/s"], f["of roof"]) for f in found[:2]] == [
        ("75%", "3.3", "33.3", "67%"),  # 1 GB at 50 GB/s is 20 ms
        ("25%", "100.0", "0.1", "50%"),  # 1 GFLOP at 200 GFLOP/s is 5 ms
    ]
    assert found[2]["GFLOP/s"] == ""


def test_the_roofline_shows_every_op_that_computes():
    ops = [op("experts", 0.03, 10**8, 10**9), op("embedding", 0.01, 0, 64), op("between ops", 0.01, 0, 0)]
    ops.append(op("rope", 0.0004, 10**3, 10**3))  # less than 1% of the pass
    ops.append(op("experts", 0.01, 10**8, 10**9, what="prefill", bandwidth=40e9))
    points = report.roofline_points(document(entry(), ops=ops))
    assert points["labels"] == ["decode: experts", "prefill: experts"]
    assert points["intensity"] == [0.1, 0.1] and points["speed"] == pytest.approx([1e8 / 0.03, 1e10])
    assert points["bandwidth"] == {"numba, float32": 45e9} and points["peak"] == {"numba, float32": 200e9}
    page = plots.roofline(**points | {name: np.array(points[name]) for name in ("intensity", "speed")})
    shares = {t.get_gid(): t.get_text() for t in page.texts if (t.get_gid() or "").startswith("of-roof")}
    assert shares == {"of-roof-0": "74%", "of-roof-1": "222%"}


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    folder = tmp_path / "figures" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "medium.json").write_text(json.dumps(document(entry(peer=peer()), entry(roof="arithmetic"))))
    return path


def test_the_readme_gets_the_table_and_keeps_the_rest(readme):
    assert tables.main([str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{tables.BEGIN}\n| model |") and text.endswith(f"{tables.END}\n\nafter\n")
    row = "| medium | decode, 1 × 512 | float32 | numba | 20 | 50 | 40.0 GB/s | 80% (memory) | 1.25 |"
    assert row in text.splitlines() and "old" not in text
    assert "`minimoe bench --x`: A chip, 2 cores, 2 threads; minimoe 0.1.0, numpy 2.4; the median of 5 rounds." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(tables.HEAD) + 1}


def test_doing_it_again_changes_nothing(readme):
    tables.main([str(readme)])
    before, when = readme.read_bytes(), readme.stat().st_mtime_ns
    assert tables.main([str(readme), str(readme.parent / "figures" / "benchmarks")]) == 0
    assert readme.read_bytes() == before and readme.stat().st_mtime_ns == when


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda readme, results: readme.write_text("no markers"), "one line <!-- bench: begin -->"),
        (lambda readme, results: readme.write_text(f"{tables.END}\n{tables.BEGIN}"), "and after it"),
        (lambda readme, results: results.write_text("{"), "medium.json: not JSON"),
        (lambda readme, results: results.write_text("[]"), "medium.json: not a result"),
        (lambda readme, results: results.unlink(), "holds no results"),
        (lambda readme, results: readme.unlink(), "No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(readme, spoil, complaint, capsys):
    spoil(readme, readme.parent / "figures" / "benchmarks" / "medium.json")
    before = readme.read_bytes() if readme.exists() else None
    assert tables.main([str(readme)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert before is None or readme.read_bytes() == before


def test_points_upon_each_other_are_numbered_together():
    intensity, speed = np.array([1.0, 50.0, 1.01, 0.99]), np.array([5e9, 100e9, 5.1e9, 5e9])
    page = plots.roofline(
        intensity, speed, list("abcd"), ["x"] * 4, bandwidth={"x": 50e9}, peak={"x": 200e9}
    )  # fmt: skip
    [axes] = [axes for axes in page.axes if axes.lines]
    assert {text.get_text() for text in axes.texts} == {"1, 3, 4", "2"}
    points = {line.get_gid(): line for line in axes.lines if line.get_gid().startswith("point-")}
    assert [points[f"point-{n}"].get_xdata()[0] for n in range(4)] == intensity.tolist()  # none is moved
