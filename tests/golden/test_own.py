"""Kits of a checkpoint of one's own: `minimoe golden make`."""

import json
from contextlib import nullcontext

import jsonschema
import numpy as np
import pytest

from minimoe import checkpoint, params, schedule
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.checkpoint import NotEnoughMemoryError, memory
from minimoe.cli import main
from minimoe.golden import bounds, exact, make, own_kit, report, verify
from minimoe.golden.adapters import OurBackend
from minimoe.golden.calls import GoldenModel, run
from minimoe.golden.own_kit import KIT, digest, keep
from minimoe.params import map_leaves
from tests import small
from tests.small import DENSE, SPARSE

TOKENS = "5,17,900,3,3,250"


@pytest.fixture(scope="module", params=["sparse-bfloat16", "dense-float32"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("own") / "checkpoint"
    sparse = request.param.startswith("sparse")
    return small.save(place, SPARSE if sparse else DENSE, dtype=BFLOAT16 if sparse else np.float32)


@pytest.fixture(scope="module")
def kit(folder):
    out = folder.parent / "kit"
    assert main(["golden", "make", str(out), "--model", str(folder), "--tokens", TOKENS]) == 0
    return out


def stored_in_16_bits(folder):
    return checkpoint.load_params(folder)[1].dtype == BFLOAT16


# ---- what is made


def test_the_manifest_fits_the_schema_and_the_kit_says_where_it_comes_from(kit, folder):
    manifest = json.loads((kit / "manifest.json").read_text())
    schema = json.loads((make.FOLDER / "manifest.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert manifest["kit"] == KIT and (kit / "README.md").read_bytes() == (make.FOLDER / "README.md").read_bytes()
    model = manifest["models"][str(folder)]
    assert model["folder"] == str(folder) and model["digest"] == digest(folder)
    assert {case.id for case in verify.read_kit(kit)[1]} == {"model/own", "model.chunks/own"}


def test_every_intermediate_is_kept_and_is_that_of_float64(kit, folder):
    config, weights = checkpoint.load_params(folder)
    wide = GoldenModel(config, map_leaves(weights, lambda w: w.astype(np.float64)))
    case = next(case for case in verify.read_kit(kit)[1] if case.call == "model")
    expected = run("model", make_backend("numpy"), case.inputs, {}, wide)
    assert [output.name for output in case.outputs] == schedule.names(config) == list(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(
            case.truth[name], x, rtol=0, atol=1e-12 * max(np.abs(x[np.isfinite(x)]).max(), 1e-300)
        )


def test_routing_margins_are_in_the_manifest(kit, folder):
    outputs = json.loads((kit / "manifest.json").read_text())["cases"][0]["outputs"]
    margins = {o["name"]: o["routing"]["margin"] for o in outputs if "routing" in o}
    config = checkpoint.read_config(folder)
    assert list(margins) == ([] if config.dense else [f"layers.{i}.gating.ids" for i in range(config.num_layers)])
    assert all(margin > 0 for margin in margins.values())


def test_our_backends_pass_it_in_every_profile_that_they_have(kit, folder):
    profiles = ["float32", "bfloat16"] if stored_in_16_bits(folder) else ["float32"]
    for profile in profiles:
        for backend in ("numpy", "numba"):
            found = report.check_adapter(OurBackend(backend, profile), kit)
            assert {r.id: verify.describe(r) for r in found.results} == {
                "model/own": "pass",
                "model.chunks/own": "pass",
            }
            assert max(result.ratio for result in found.results) > 0.02  # bounds that nothing comes near prove nothing


def test_sixteen_bit_profiles_are_offered_where_the_weights_have_sixteen_bits(kit, folder, capsys):
    profiles = verify.read_kit(kit)[1][0].profiles
    if stored_in_16_bits(folder):
        assert profiles == ("float32", "bfloat16", "hf_bfloat16")
    else:
        assert profiles == ("float32",)
        assert (
            main(["golden", "make", str(kit), "--model", str(folder), "--tokens", "1", "--profiles", "hf_bfloat16"])
            == 2
        )
        assert "profile hf_bfloat16: these weights are stored in float32" in capsys.readouterr().err


def test_a_kit_of_a_grok_1_says_so(tmp_path):
    """So that it is left out with --mixtral, and a near tie's weights are held against shares of all experts."""
    folder = make.FOLDER / "models" / "grok"
    assert (
        main(["golden", "make", str(tmp_path / "kit"), "--model", str(folder), "--tokens", "1,7,3", "--samples", "3"])
        == 0
    )
    manifest, cases = verify.read_kit(tmp_path / "kit")
    jsonschema.validate(manifest, json.loads((make.FOLDER / "manifest.schema.json").read_text()))
    for case in cases:
        assert "grok" in case.tags
        result = verify.compare(case, OurBackend("numba").run(case), "float32")
        assert result.status == "pass", verify.describe(result)
        assert [o.renormalised for o in case.outputs if o.name.endswith("gating.ids")] == [False, False]


def test_a_wrong_output_is_found_in_it(kit, folder, tmp_path):
    case = next(case for case in verify.read_kit(kit)[1] if case.call == "model")
    outputs = dict(OurBackend("numpy").run(case))
    assert verify.compare(case, outputs).status == "pass"
    outputs["layers.1.attention.v"] = outputs["layers.1.attention.v"] * 1.001
    assert verify.compare(case, outputs).first_failure.name == "layers.1.attention.v"


def test_its_bounds_are_those_of_bounds_make(tmp_path, capsys):
    place = small.save(tmp_path / "m", SPARSE.replace(num_layers=1), dtype=np.float32)
    config, weights = checkpoint.load_params(place)
    tokens = np.array([[5, 17, 900]])
    names = schedule.names(config)
    truth = exact.truth(config, weights, tokens, names)
    ours = exact.limits(config, weights, tokens, truth, "float32", 24)
    theirs = bounds.make("model", {"tokens": tokens}, {}, GoldenModel(config, weights), truth, "float32")
    assert ours.keys() == theirs.keys()
    for name, (relative, absolute) in ours.items():
        assert absolute == theirs[name][1] == 0
        assert 0.6 < relative / theirs[name][0] < 1.6, name


def test_a_tie_that_roundings_decide_does_not_widen_the_bounds(tmp_path):
    def tie(tree):
        for layer in tree.layers:
            layer.feed_forward.gate[...] = layer.feed_forward.gate[:1]

    place = small.save(tmp_path / "m", dtype=np.float32, change=tie)
    config, weights = checkpoint.load_params(place)
    tokens, names = np.array([[5, 17, 900]]), schedule.names(config)
    truth = exact.truth(config, weights, tokens, names)
    assert (truth["layers.0.gating.ids"] == [0, 1]).all()
    limits = exact.limits(config, weights, tokens, truth, "float32", 4)
    assert max(relative for relative, _ in limits.values()) < 1e-4


def test_it_takes_the_bundled_model_and_a_text_by_default(tmp_path, capsys):
    assert main(["golden", "make", str(tmp_path / "kit"), "--samples", "3", "--profiles", "float32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cases"] == ["model/own", "model.chunks/own"] and said["left_out"] == ""
    assert said["tensors"] == 117 and said["closest"]["name"].endswith("gating.ids")
    assert "def add(a, b)" in verify.read_kit(tmp_path / "kit")[1][0].why


# ---- limited by name and size


def test_names_choose_and_the_routing_is_always_kept():
    kept = keep(SPARSE, 6, ["layers.0.*norm", "logits"], 1 << 30)
    routing = [f"layers.{i}.gating.{name}" for i in range(3) for name in ("logits", "ids", "weights")]
    assert set(kept.names) == {"layers.0.attention_norm", "layers.0.ffn_norm", "logits", *routing}
    assert kept.names == [name for name in schedule.names(SPARSE) if name in kept.names] and not kept.left_out


def test_the_largest_kinds_are_left_out_as_a_whole_and_said():
    every = keep(SPARSE, 64, [], 1 << 30)
    assert every.names == schedule.names(SPARSE)
    sizes = sum(12 * np.prod(schedule.shape(SPARSE, f"layers.{i}.attention.scores", 1, 64)) for i in range(3))
    budget = sum(own_kit._bytes(SPARSE, name, 64) for name in every.names) - 1
    kept = keep(SPARSE, 64, [], budget)
    assert kept.left_out == {"attention.probs": sizes} or kept.left_out == {"attention.scores": sizes}
    assert sum(own_kit._bytes(SPARSE, name, 64) for name in kept.names) <= budget
    assert "logits" in kept.names and f"{sizes:,} bytes" in kept.left_out_text


def test_a_kit_without_logits_asks_for_what_comes_last(tmp_path):
    place = small.save(tmp_path / "m")
    arguments = ["golden", "make", str(tmp_path / "kit"), "--model", str(place), "--tokens", "1,2", "--samples", "3"]
    assert main([*arguments, "--names", "layers.0.attention.*"]) == 0
    [case] = verify.read_kit(tmp_path / "kit")[1]
    assert [output.name for output in case.outputs if output.required] == [case.outputs[-1].name]
    assert verify.compare(case, {}).status == "fail"


# ---- weights that float64 would not fit into memory


def test_no_more_than_one_matrix_is_widened_at_a_time(tmp_path, monkeypatch):
    place = small.save(tmp_path / "m", SPARSE)
    config, weights = checkpoint.load_params(place)
    alive, most, total = 0, 0, 0
    original = exact.Weight.T.fget

    class Counted(np.ndarray):
        def __array_finalize__(self, parent):
            self.counted = False

        def __del__(self):
            nonlocal alive
            if self.counted:
                alive -= self.nbytes

    def counting(self):
        nonlocal alive, most, total
        found = original(self).view(Counted)
        found.counted = True
        alive, total = alive + found.nbytes, total + found.nbytes
        most = max(most, alive)
        return found

    monkeypatch.setattr(exact.Weight, "T", property(counting))
    exact.truth(config, weights, np.array([[1, 2, 3]]), schedule.names(config))
    largest = 8 * config.vocab_size * config.hidden_size
    assert total > 3 * largest / 2 and most <= largest


def test_mapped_weights_are_not_copied(tmp_path):
    place = small.save(tmp_path / "m", SPARSE)
    _, weights = checkpoint.load_params(place)
    held = exact.held(weights, True)
    assert held.layers[0].attention.wq.stored is weights.layers[0].attention.wq
    assert held.layers[0].feed_forward.w1[1].stored is weights.layers[0].feed_forward.w1[1]
    assert held.tok_embeddings.dtype == np.float64 and held.tok_embeddings.stored.dtype == BFLOAT16


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    config, weights = SPARSE, params.random(SPARSE, 0)
    with pytest.raises(NotEnoughMemoryError, match="the largest matrix in float64"):
        exact.truth(config, weights, np.array([[1]]), ["logits"])


# ---- the checkpoint


def test_a_kit_whose_checkpoint_changed_is_refused(tmp_path, capsys):
    place = small.save(tmp_path / "m")
    out = tmp_path / "kit"
    assert main(["golden", "make", str(out), "--model", str(place), "--tokens", "1,2", "--samples", "3"]) == 0
    assert main(["golden", "check", str(out), "--backend", "numpy"]) == 0
    tree = params.map_leaves(params.random(SPARSE, 1, np.float32), lambda w: w.astype(BFLOAT16))
    checkpoint.save(place, SPARSE, tree)
    capsys.readouterr()
    assert main(["golden", "check", str(out), "--backend", "numpy"]) == 2
    assert "is not the checkpoint any more that this kit was made of" in capsys.readouterr().err
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(verify.KitError, match="is not there any more"):
        own_kit.check_models(verify.read_kit(out)[0])


def test_weights_that_make_nan_are_named(tmp_path, capsys):
    def damage(tree):
        tree.layers[1].attention.wv[0, 0] = np.nan

    place = small.save(tmp_path / "m", change=damage)
    assert main(["golden", "make", str(tmp_path / "kit"), "--model", str(place), "--tokens", "1,2"]) == 2
    assert "layers.1.attention.v: holds NaN or Inf" in capsys.readouterr().err
    assert not (tmp_path / "kit").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "--tokens must be numbers like 1,2,3, not '1,x'"),
        (["--tokens", "1,1024"], "token 1024 is not in the vocabulary of 1024"),
        (["--tokens", ","], "the prompt must have 1 to 512 tokens, not 0"),
        (["--prompt", "a", "--tokens", "1"], "not allowed with argument"),
        (["--tokens", "1", "--names", "layers.0.gatin.ids"], "'layers.0.gatin.ids'; is 'layers.0.gating.ids' meant?"),
        (["--tokens", "1", "--max-bytes", "10"], "--max-bytes 10 leaves nothing; the smallest of the tensors take"),
        (["--tokens", "1", "--profiles", "float8"], "there is no profile 'float8'"),
        (["--tokens", "1", "--samples", "2"], "--samples must be at least 3, not 2"),
        (["--tokens", "1", "--model", "nowhere"], "there is no such folder"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, arguments, message):
    place = small.save(tmp_path / "m")
    with pytest.raises(SystemExit) if "not allowed" in message else nullcontext():
        assert main(["golden", "make", str(tmp_path / "kit"), "--model", str(place), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "kit").exists()


def test_a_text_needs_a_tokenizer(tmp_path, capsys):
    place = small.save(tmp_path / "m", tokenizer=False)
    assert main(["golden", "make", str(tmp_path / "kit"), "--model", str(place), "--prompt", "a"]) == 2
    assert "holds no tokenizer.model, so it cannot read a text: give --tokens 1,2,3" in capsys.readouterr().err


def test_only_an_older_kit_of_this_kind_is_replaced(tmp_path, capsys):
    place = small.save(tmp_path / "m")
    arguments = ["--model", str(place), "--tokens", "1,2", "--samples", "3", "--profiles", "float32"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    assert main(["golden", "make", str(other), *arguments]) == 2
    assert "is there already, and is no kit that this command made" in capsys.readouterr().err
    assert (other / "precious.txt").read_text() == "mine"
    for _ in range(2):
        assert main(["golden", "make", str(tmp_path / "kit"), *arguments]) == 0
