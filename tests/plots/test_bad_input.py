"""What cannot be drawn is refused in one line that says what is wrong."""

import numpy as np
import pytest

from minimoe import plots
from minimoe.ablation import Ablation
from minimoe.shapes import Routing
from tests.plots.pictures import random_routing

ROUTING = random_routing(2, 5, 4)
OF_ROUTING = {
    "grid": lambda r: plots.token_grid(["x"] * 5, r),
    "html": lambda r: plots.token_html(["x"] * 5, r),
    "router": plots.router_distributions,
    "differences": lambda r: plots.routing_differences(r, ROUTING),
    "differences from": lambda r: plots.routing_differences(ROUTING, r),
}
OF_IDS = {
    "pairs": lambda ids: plots.expert_pairs(ids, 4),
    "paths": lambda ids: plots.token_paths(ids, 4),
    "types": lambda ids: plots.token_type_specialisation(ids, np.zeros(5, int), 4),
}


def refused(draw, *given):
    with pytest.raises(ValueError, match=r"^.+\Z") as caught:  # one line
        draw(*given)
    return str(caught.value)


@pytest.mark.parametrize("name", [*OF_ROUTING, *OF_IDS])
def test_a_dense_model_has_nothing_to_route(name):
    message = refused({**OF_ROUTING, **OF_IDS}[name], None)
    assert message == "a dense model has no router: there is nothing to route"


@pytest.mark.parametrize("name", [*OF_ROUTING, *OF_IDS])
def test_nothing_routed_is_said(name):
    ids = np.full((2, 5, 2), -1)
    nothing = Routing(ids, np.zeros((2, 5, 2)), np.zeros((2, 5, 4))) if name in OF_ROUTING else ids
    assert "none of the 5 tokens was routed" in refused({**OF_ROUTING, **OF_IDS}[name], nothing)


@pytest.mark.parametrize("name", OF_ROUTING)
def test_what_is_no_routing_is_said(name):
    assert "must be a minimoe.Routing" in refused(OF_ROUTING[name], ROUTING.ids)


def test_parts_that_a_routing_does_not_carry_are_named():
    bare = Routing(ROUTING.ids)
    assert "the router's weights" in refused(plots.token_grid, ["x"] * 5, bare)
    assert "the router's logits" in refused(plots.router_distributions, bare)
    assert "5 tokens, beside 1 pieces" in refused(plots.token_html, ["x"], bare)


@pytest.mark.parametrize("draw", [plots.token_grid, plots.token_html])
def test_layers_that_are_not_there_are_refused(draw):
    with pytest.raises(ValueError, match="layers must name some of the 2 layers"):
        draw(["x"] * 5, ROUTING, layers=[2])
    with pytest.raises(ValueError, match="layers must name"):
        draw(["x"] * 5, ROUTING, layers=[])


def test_nan_is_named_not_drawn():
    logits = ROUTING.logits.copy()
    logits[1, 3, 2] = np.nan
    broken = Routing(ROUTING.ids, ROUTING.weights, logits)
    assert "NaN" in refused(plots.router_distributions, broken)
    assert "NaN" in refused(plots.routing_differences, Routing(ROUTING.ids, None, np.full((2, 5, 4), np.nan)), ROUTING)
    assert "NaN" in refused(plots.gate_steps, np.array([1, np.nan]), np.array([0]), np.array([1.0]))
    assert "NaN" in refused(plots.attention_maps, np.full((1, 2, 2), np.nan))
    nothing = Ablation(("a",), np.ones(1), *[np.full((1, 1, 2), np.nan)] * 3)
    assert "no expert was switched off" in refused(plots.switched_off, nothing)
    assert "no token was routed" in refused(plots.domain_shares, np.full((1, 1, 2), np.nan), ["a"])


def test_one_expert_a_token_has_no_pairs_and_all_experts_no_margin():
    assert "there are no pairs" in refused(plots.expert_pairs, ROUTING.ids[..., :1], 4)
    assert "there is no margin" in refused(plots.router_distributions, random_routing(1, 5, 2, k=2))


def test_gates_that_do_not_fit_are_refused():
    assert "one token has logits (E,)" in refused(
        plots.gate_steps, ROUTING.logits[0], ROUTING.ids[0], ROUTING.weights[0]
    )
    assert "was not routed" in refused(plots.gate_steps, np.ones(4), np.array([-1]), np.zeros(1))
    assert "do not name experts of 4" in refused(plots.gate_steps, np.ones(4), np.array([4]), np.ones(1))


def test_caches_that_break_the_rule_are_refused():
    assert "position p must be in slot p mod 3" in refused(plots.cache_ring, np.array([0, 2, 1]), 3)
    assert "those of one sequence" in refused(plots.cache_ring, np.zeros((2, 3), int), 3)
    assert "at least 0" in refused(plots.cache_ring, np.array([-1]), -1)


def test_training_and_roofs_that_do_not_fit_are_refused():
    assert "nothing to draw" in refused(plots.balance_over_training, {})
    assert "of one length" in refused(plots.balance_over_training, {"a": {"step": np.arange(3), "loss": np.arange(2)}})
    assert "at least 2 steps" in refused(plots.shares_over_training, np.arange(1), np.ones((1, 2, 4)))

    def roof(x, y, backend="a"):
        return plots.roofline([x], [y], ["op"], [backend], bandwidth={"a": 1.0}, peak={"a": 1.0})

    assert "must be positive" in refused(roof, 0.0, 1.0) and "must be positive" in refused(roof, 1.0, np.nan)
    assert "b is missing" in refused(roof, 1.0, 1.0, "b")


def test_a_picture_of_one_token_can_be_drawn():
    one = random_routing(1, 1, 8)
    for page in (plots.token_grid(["x"], one), plots.router_distributions(one), plots.token_paths(one.ids, 8)):
        assert page._repr_png_().startswith(b"\x89PNG")
    assert "expert" in str(plots.token_html(["x"], one))
