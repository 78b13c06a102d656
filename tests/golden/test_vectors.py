"""The golden vectors are what their generator makes, hold what they promise to tell apart, and fit our own backends."""

import json

import jsonschema
import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.checkpoint import load_params, load_tensors
from minimoe.config import ModelConfig
from minimoe.golden import clear, make, verify
from minimoe.golden.adapters import OurBackend
from minimoe.golden.calls import CALLS
from minimoe.golden.cases import MODELS, specs
from minimoe.golden.profiles import PROFILES
from minimoe.golden.verify.kit import is_routing
from minimoe.params import named

SIXTEEN_BIT = {name for name, profile in PROFILES.items() if profile.round_off}
MANIFEST, CASES = verify.read_kit(make.FOLDER)
BY_ID = {case.id: case for case in CASES}
SPECS = {spec.id: spec for spec in specs()}
CONFIGS = {name: ModelConfig(**entry["config"]) for name, entry in MANIFEST["models"].items()}


@pytest.fixture(scope="module")
def rebuilt():
    return {name: make.build(spec) for name, spec in SPECS.items()}


def validator():
    schema = json.loads((make.FOLDER / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def margins(manifest):
    """Take out the margins of routing, which other processors may compute with other last bits."""
    outputs = [output for case in manifest["cases"] for output in case["outputs"]]
    return np.array([output["routing"].pop("margin") for output in outputs if "routing" in output], np.float64)


# ---- the files are what the generator makes


def test_the_manifest_fits_its_schema():
    validator().validate(MANIFEST)


@pytest.mark.parametrize("damage", ["no why", "unknown kind", "no bounds", "both tags", "version", "extra key"])
def test_the_schema_refuses_what_is_no_manifest(damage):
    manifest = json.loads(json.dumps(MANIFEST))
    case = manifest["cases"][0]
    {
        "no why": lambda: case.pop("why"),
        "unknown kind": lambda: case["outputs"][0].update(kind="integer"),
        "no bounds": lambda: case["outputs"][0].pop("bounds"),
        "both tags": lambda: case["tags"].extend(["inference", "training"]),
        "version": lambda: manifest.update(version="1"),
        "extra key": lambda: case.update(wyh="a slip"),
    }[damage]()
    assert not validator().is_valid(manifest)


def test_the_manifest_is_what_its_generator_writes(rebuilt):
    made, stored = make.manifest(rebuilt.values(), make.known_bounds(make.FOLDER)), json.loads(json.dumps(MANIFEST))
    np.testing.assert_allclose(margins(made), margins(stored), rtol=1e-9)
    made["made"]["numpy"] = stored["made"]["numpy"]
    assert json.loads(json.dumps(made)) == stored


@pytest.mark.parametrize("name", ["linear/wide", "attention/grouped", "gating/top-2", "experts/main", "block/padding"])
def test_bounds_are_those_that_would_be_made_today(rebuilt, name):
    """Of all cases it would take minutes."""
    made = make.entry(rebuilt[name], None)["outputs"]
    for output, stored in zip(made, BY_ID[name].outputs, strict=True):
        for profile, numbers in output.get("bounds", {}).items():
            np.testing.assert_allclose(
                numbers, stored.bounds[profile], rtol=0.02, err_msg=f"{output['name']} {profile}"
            )


def test_files_and_manifest_name_the_same_cases_and_models():
    files = {str(path.relative_to(make.FOLDER / "cases"))[: -len(".safetensors")]
             for path in (make.FOLDER / "cases").rglob("*.safetensors")}  # fmt: skip
    assert files == set(BY_ID) == set(SPECS)
    assert {path.name for path in (make.FOLDER / "models").iterdir()} == set(MANIFEST["models"]) == set(MODELS)


def test_inputs_are_rebuilt_bit_for_bit(rebuilt):
    for name, built in rebuilt.items():
        stored = BY_ID[name].inputs
        assert stored.keys() == built.inputs.keys(), name
        for key, x in built.inputs.items():
            assert stored[key].dtype == x.dtype and stored[key].shape == x.shape, (name, key)
            assert stored[key].tobytes() == x.tobytes(), (name, key)


def test_weights_are_rebuilt_bit_for_bit():
    for name, spec in MODELS.items():
        config, params = load_params(make.FOLDER / "models" / name)
        assert config == spec.config
        made = dict(named(make.stored(name)))
        for tensor, w in named(params):
            assert w.dtype == spec.dtype and w.tobytes() == made.pop(tensor).tobytes(), (name, tensor)
        assert not made


def test_outputs_are_rebuilt_within_1e13_of_each_norm(rebuilt):
    for name, built in rebuilt.items():
        stored = BY_ID[name].truth
        assert stored.keys() == built.truth.keys(), name
        for key, x in built.truth.items():
            assert stored[key].shape == x.shape and stored[key].dtype == x.dtype, (name, key)
            finite = np.isfinite(x)
            np.testing.assert_array_equal(np.where(finite, 0, stored[key]), np.where(finite, 0, x), f"{name} {key}")
            distance = np.linalg.norm(stored[key][finite] - x[finite].astype(np.float64))
            assert distance <= 1e-13 * np.linalg.norm(x[finite].astype(np.float64)), (name, key)


def test_truth32_is_the_rounding_of_the_truth():
    for case in CASES:
        tensors = load_tensors(make.FOLDER / "cases" / f"{case.id}.safetensors")
        rounded = {key.removeprefix("truth32/"): x for key, x in tensors.items() if key.startswith("truth32/")}
        floats = {key: x for key, x in case.truth.items() if x.dtype == np.float64}
        assert rounded.keys() == floats.keys()
        for key, x in floats.items():
            np.testing.assert_array_equal(rounded[key], x.astype(np.float32))


def test_outputs_are_listed_as_they_are():
    for case in CASES:
        for output in case.outputs:
            truth = case.truth[output.name]
            assert truth.shape == output.shape and len(output.letters.split()) == truth.ndim, (case.id, output.name)
            assert (output.kind == "float") == bool(output.bounds)
            assert not output.bounds or set(output.bounds) == set(case.profiles)


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in make.FOLDER.rglob("*") if path.is_file()) <= 4_500_000


def sixteen_bits_hold(x):
    """Whether bfloat16 and float16 both hold every number, none of them subnormal."""
    fits = (x == x.astype(BFLOAT16).astype(x.dtype)) & (x == x.astype(np.float16).astype(x.dtype))
    return bool((fits & ((x == 0) | (np.abs(x) >= np.finfo(np.float16).tiny))).all())


def test_inputs_and_weights_of_16_bit_profiles_are_numbers_of_those_formats():
    for case in CASES:
        if SIXTEEN_BIT & set(case.profiles):
            arrays = [x for x in case.inputs.values() if x.dtype.kind == "f"]
            if case.model is not None:
                arrays += [w.astype(np.float32) for _, w in named(make.stored(case.model))]
            assert all(map(sixteen_bits_hold, arrays)), case.id


def test_some_cases_and_one_model_have_all_of_float32s_digits():
    digits = [case.id for case in CASES if any(x.dtype == np.float32 and not sixteen_bits_hold(x)
                                               for name, x in case.inputs.items() if name != "uniform")]  # fmt: skip
    assert {"rmsnorm/digits", "linear/digits", "attention/digits", "gating/digits", "experts/digits"} <= set(digits)
    models = {name for name in MODELS for _, w in named(make.stored(name)) if not sixteen_bits_hold(w.astype("f4"))}
    assert models == {"digits"}


# ---- no decision hangs in the balance


def widest(case, name):
    """The largest bound that an output has in any profile of `case`: in the case, or in those with its model."""
    alike = [c for c in CASES if c.model == case.model and c.level == "model"] if case.level != "op" else [case]
    bounds = [o.bounds[p][0] for c in [case, *alike] for o in c.outputs for p in case.profiles
              if o.name == name or o.name.endswith(f".{name}") if p in o.bounds]  # fmt: skip
    return max(bounds, default=1e-5)


ROUTED = [
    s for s in SPECS if SPECS[s].call in ("gating", "block", "model", "model.chunks", "model.generate", "training")
]


@pytest.mark.parametrize("name", [name for name in ROUTED if "ties" not in SPECS[name].tags])
def test_routing_is_three_times_clearer_than_bounds_demand(name):
    routing, _, _ = clear.decisions(SPECS[name])
    assert routing >= 3 * 2 * widest(BY_ID[name], "logits" if BY_ID[name].level == "op" else "gating.logits")


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].call == "model.generate"])
def test_choices_of_tokens_are_clearer_than_bounds_demand(name):
    _, tokens, _ = clear.decisions(SPECS[name])
    assert tokens >= 3 * max(widest(case, "logits") for case in CASES if case.id in ("model/main", "model/window"))


def test_the_draws_are_the_first_that_are_clear():
    assert all(clear.is_clear(spec) for spec in SPECS.values() if spec.text is not None)
    for draw in range(clear.DRAWS["base/greedy"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(clear.DRAWS, "base/greedy", draw)
            assert not all(clear.is_clear(spec) for spec in clear.reading("base/greedy"))


# ---- what the cases tell apart is there


def cases(*calls):
    return [case for case in CASES if case.call in calls]


def config(case):
    return CONFIGS[case.model]


def window_lengths():
    """T - W of attention over as many keys as queries."""
    found = cases("attention")
    return {c.inputs["q"].shape[1] - c.settings["window"] for c in found
            if c.settings["window"] and c.inputs["q"].shape[1] == c.inputs["k"].shape[1]}  # fmt: skip


PROPERTIES = {
    "k = 1, 2 and E in gating": lambda: (
        {1, 2} <= {c.settings["k"] for c in cases("gating")}
        and any(c.settings["k"] == len(c.inputs["gate"]) for c in cases("gating"))
    ),
    "k = 1, 2 and E in models": lambda: (
        {1, 2} <= {config(c).num_experts_per_token for c in cases("model")}
        and any(config(c).num_experts_per_token == config(c).num_experts > 1 for c in cases("model"))
    ),
    "K = 1, K = H and between, in attention": lambda: (
        {(k == 1, k == h) for c in cases("attention") for h, k in [(c.inputs["q"].shape[2], c.inputs["k"].shape[2])]}
        >= {(True, False), (False, True), (False, False)}
    ),
    "K = 1, K = H and between, in models": lambda: (
        {(config(c).num_kv_heads == 1, config(c).num_kv_heads == config(c).num_heads) for c in cases("model")}
        >= {(True, False), (False, True), (False, False)}
    ),
    "C unlike D / H": lambda: any(config(c).head_dim * config(c).num_heads != config(c).hidden_size
                                  for c in cases("model")),
    "T at W - 1, W, W + 1 in attention": lambda: {-1, 0, 1} <= window_lengths(),
    "T at W - 1, W, W + 1 through a cache, token by token": lambda: {-1, 0, 1} <= {
        len(c.settings["chunks"]) - config(c).sliding_window for c in cases("model.chunks")
        if config(c).sliding_window and set(c.settings["chunks"]) == {1}
    },
    "a chunk longer than the window after a first chunk": lambda: any(
        max(c.settings["chunks"][1:], default=0) > config(c).sliding_window for c in cases("model.chunks")
        if config(c).sliding_window
    ),
    "a cache that wraps twice": lambda: any(
        sum(c.settings["chunks"]) > 2 * config(c).sliding_window for c in cases("model.chunks")
        if config(c).sliding_window
    ),
    "max_length below, at and above W": lambda: {-1, 0, 1} <= {
        int(np.sign(c.settings["max_length"] - config(c).sliding_window)) for c in cases("model.chunks")
        if config(c).sliding_window
    },
    "an expert without tokens": lambda: any(
        0 < len(set(range(len(c.inputs["w1"]))) - set(c.inputs["ids"].ravel())) < len(c.inputs["w1"]) - 1
        for c in cases("experts")
    ),
    "all tokens to one expert": lambda: any(len(set(c.inputs["ids"].ravel())) == 1 and len(c.inputs["ids"]) > 1
                                            for c in cases("experts")),
    "experts that a slot's order is not sorted by": lambda: any(
        (np.diff(c.inputs["ids"], axis=1) < 0).any() and (np.diff(c.inputs["ids"], axis=1) > 0).any()
        for c in cases("experts")
    ),
    "exact ties at the border of the chosen": lambda: any(
        (np.sort(row)[::-1][k - 1] == np.sort(row)[::-1][k]) for c in cases("gating") if "ties" in c.tags
        for k in [c.settings["k"]] for row in c.truth["logits"]
    ),
    "exact ties in a model": lambda: any((c.truth["layers.1.gating.logits"] == 0).all() for c in cases("model")
                                         if config(c).num_layers > 1 and not config(c).dense),
    "layers that choose differently": lambda: all(
        not np.array_equal(c.truth["layers.0.gating.ids"], c.truth["layers.1.gating.ids"])
        for c in cases("model") if config(c).num_layers > 1 and config(c).num_experts > 1
    ),
    "forms of the balance loss that differ on the same tokens": lambda: len({
        round(float(BY_ID[f"training/{form}"].truth["balance_loss"]), 3)
        for form in ("concatenated", "per-layer", "switch")
    }) == 3,
    "a logit gap of 200": lambda: all(
        any(np.nanmax(x) - np.nanmin(x) >= 199 for c in cases(call) for name, x in c.truth.items()
            if name.endswith("gating.logits") or (call == "gating" and name == "logits"))
        for call in ("gating", "model")
    ),
    "theta 1e4 and 1e6": lambda: (
        {1e4, 1e6} <= {c.settings["theta"] for c in cases("rope")} and {1e4, 1e6} <= {
            config(c).rope_theta for c in cases("model")}
    ),
    "positions near 30,000": lambda: all(
        any(c.inputs.get("positions", np.zeros(1)).max() >= 29_990 for c in cases(call))
        for call in ("rope", "block", "model")
    ),
    "weights in bfloat16": lambda: any(MANIFEST["models"][c.model]["dtype"] == "bfloat16" for c in cases("model")),
    "tied and untied embeddings": lambda: {config(c).tie_embeddings for c in cases("model")} == {True, False},
    "a dense model": lambda: any(config(c).dense for c in cases("model")),
    "padding on the left and on the right": lambda: (
        {(bool(row[0]), bool(row[-1])) for c in cases("model") if "mask" in c.inputs for row in c.inputs["mask"]}
        >= {(False, True), (True, False), (True, True), (False, False)}
    ),
    "queries that see no key": lambda: any(
        (c.inputs["q_pos"] >= 0).all() and (c.truth["out"] == 0).all(axis=(2, 3)).any() for c in cases("attention")
    ),
    "an eps that matters": lambda: any(
        (c.inputs["x"] ** 2).mean() < 2 * c.settings["eps"] for c in cases("rmsnorm") if "residual" not in c.inputs
    ) and any(config(c).norm_eps >= 0.1 for c in cases("model")),
    "norm weights unlike one": lambda: all(
        (np.asarray(w) != 1).mean() > 0.8 for name in MODELS for tensor, w in named(make.stored(name)) if w.ndim == 1
    ),
    "square matrices in ops": lambda: any(c.inputs["w2"].shape[1] == c.inputs["w2"].shape[2] for c in cases("experts"))
    and any(len(set(c.inputs["w"].shape)) == 1 for c in cases("linear"))
    and any(len(set(c.inputs["gate"].shape)) == 1 for c in cases("gating"))
    and any(len(set(c.inputs["table"].shape)) == 1 for c in cases("embedding")),
    "F unlike D in experts": lambda: any(c.inputs["w2"].shape[1] != c.inputs["w2"].shape[2] for c in cases("experts")),
    "a model of square matrices": lambda: any(
        len({g.hidden_size, g.intermediate_size, g.vocab_size, g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim})
        == 1 for g in map(config, cases("model"))
    ),
    "forced routing unlike the router's": lambda: all(
        any(differs(c) for c in cases(call) if "ids" in c.inputs) for call in ("gating", "block", "model")
    ),
    "greedy ties": lambda: any(
        (np.sort(c.inputs["logits"])[:, -1] == np.sort(c.inputs["logits"])[:, -2]).any() for c in cases("sampling")
        if c.settings["temperature"] == 0
    ),
    "random numbers 0 and almost 1": lambda: {0.0, 1 - 2.0**-24} <= {
        float(u) for c in cases("sampling") for u in c.inputs["uniform"]
    },
    "sampled tokens that are not the most probable": lambda: any(
        c.settings["temperature"] > 0 and (c.inputs["logits"].argmax(axis=1) != c.truth["ids"]).any()
        for c in cases("sampling")
    ),
    "targets that are not counted": lambda: any((c.inputs["targets"] < 0).any() for c in cases("cross_entropy")),
    "logits of 1000 in the loss": lambda: any(np.abs(c.inputs["logits"]).max() >= 1000 for c in cases("cross_entropy")),
    "all forms of the balance loss, with and without padding": lambda: {
        (c.settings["form"], "active" in c.inputs) for c in cases("balance_loss")
    } == {(form, padded) for form in ("concatenated", "per_layer", "switch") for padded in (True, False)},
    "all forms of the balance loss in training": lambda: {
        config(c).balance_form for c in cases("training")
    } == {"concatenated", "per_layer", "switch"},
    "steps of AdamW": lambda: {c.settings["step"] for c in cases("adamw")} >= {1, 10}
    and any(c.settings["weight_decay"] for c in cases("adamw"))
    and any(c.settings["scale"] != 1 for c in cases("adamw")),
    "clipping and none": lambda: {
        bool(c.truth["gradient_norm"] > c.settings["clip"]) for c in cases("training")
    } == {True, False},
    "scores that overflow float16 without subtracting the maximum": lambda: any(
        np.exp(c.truth["scores"][np.isfinite(c.truth["scores"])].max()) > 65504 and "float16" in c.profiles
        for c in cases("attention")
    ),
    "products that overflow float16 before they are scaled": lambda: any(
        65504 < np.abs(s := c.truth["scores"])[np.isfinite(s)].max() * c.inputs["q"].shape[-1] ** 0.5 < 4 * 65504
        and "float16" in c.profiles for c in cases("attention")
    ),
    "squares that overflow float16": lambda: any((c.inputs["x"] ** 2).max() > 65504 and "float16" in c.profiles
                                                 for c in cases("rmsnorm")),
    "a chunk longer than the cache, and padding, in kv_cache": lambda: (
        any(c.inputs["positions"].shape[1] > c.inputs["k_cache"].shape[1] for c in cases("kv_cache"))
        and any((c.inputs["positions"] < 0).any() for c in cases("kv_cache"))
    ),
    "most scores beyond the cap, and some below": lambda: all(
        0.2 < (np.abs(s := c.truth["scores"])[np.isfinite(s)] < 0.76 * c.settings["cap"]).mean() < 0.8  # tanh 1 = 0.76
        for c in cases("attention") if "cap" in c.settings
    ),
    "a model with scores beyond the cap": lambda: all(
        np.abs(s := c.truth["layers.0.attention.scores"])[np.isfinite(s)].max() > 0.9 * config(c).attention_cap
        for c in cases("model") if config(c).attention_cap
    ),
    "a scale unlike 1/√C, alone and with a cap": lambda: {
        "cap" in c.settings for c in cases("attention")
        if abs(c.settings.get("scale", 0.0) - c.inputs["q"].shape[-1] ** -0.5) > 0.1 and "scale" in c.settings
    } == {True, False},
    "weights that are shares of all experts": lambda: all(
        (c.truth["weights"].sum(axis=1) < 0.99).all() for c in cases("gating") if "renormalise" in c.settings
    ),
    "an expert that would be chosen, were it not switched off": lambda: any(
        (c.truth["logits"].argmax(axis=1) == e).any() and not (c.truth["ids"] == e).any()
        for c in cases("gating") for e in c.settings.get("disabled", ())
    ),
    "an end of text before the last step": lambda: any(
        config(c).eos_id is not None and (c.truth["ids"][:, :-1] == config(c).eos_id).any()
        for c in cases("model.generate")
    ),
}  # fmt: skip


def differs(case):
    """Whether the router, left free, would choose other experts than those given."""
    given = case.inputs["ids"]
    prefix = {"gating": "", "block": "gating.", "model": "layers.0.gating."}[case.call]
    logits = case.truth[prefix + "logits"]
    return not np.array_equal(
        np.argsort(-logits, axis=1)[:, : given.shape[-1]], given.reshape(-1, *given.shape[-2:])[0]
    )


@pytest.mark.parametrize("name", PROPERTIES)
def test_what_discriminates_is_there(name):
    assert PROPERTIES[name]()


def test_every_call_has_cases_that_say_what_they_are_for():
    counts = {call: len(cases(call)) for call in CALLS}
    assert min(counts.values()) >= 2, counts
    assert all(len(case.why) > 40 for case in CASES)
    assert len({case.why for case in CASES if "/cross_entropy" not in case.id}) > 0.9 * len(CASES)


def test_what_is_not_mixtral_is_tagged():
    """So that it can be left out; what is tagged has the profiles of our own code alone."""
    for case in CASES:
        own = bool(set(CALLS[case.call].optional) & set(case.settings))
        if case.model is not None:
            own = own or not make.is_mixtral(config(case))
        assert ("grok" in case.tags) == own, case.id
        if own:
            assert set(case.profiles) <= {"float64", "float32", "bfloat16"}
            assert all(o.renormalised == (not is_routing(case, o.name)) for o in case.outputs), case.id
        else:
            assert all(o.renormalised for o in case.outputs), case.id


def test_the_inference_subset_needs_no_gradients():
    for case in CASES:
        assert ("training" in case.tags, "inference" in case.tags) == (
            CALLS[case.call].gradient,
            not CALLS[case.call].gradient,
        )


def test_the_two_cases_of_repetition_are_the_same():
    first, second = BY_ID["model/repeat-a"], BY_ID["model/repeat-b"]
    assert config(first).router_jitter > 0 and first.model == second.model
    for ours, theirs in ((first.inputs, second.inputs), (first.truth, second.truth)):
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_padding_is_not_compared_and_nothing_else_is_left_out():
    for case in CASES:
        mask = case.inputs.get("mask")
        for name, x in case.truth.items():
            hidden = np.isnan(x).any() if x.dtype.kind == "f" else False
            assert hidden == (case.level in ("block", "model") and mask is not None and x.dtype.kind == "f"), name


# ---- our own backends


@pytest.mark.parametrize("profile", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_our_backends_stay_within_the_bounds(backend, profile):
    adapter, outside = OurBackend(backend, profile), []
    for case in CASES:
        if profile in case.profiles:
            result = verify.compare(case, adapter.run(case), profile)
            if result.status != "pass":
                outside.append(verify.describe(result))
    assert not outside
