"""Pictures of routing: each function returns a Matplotlib figure, and no global state is touched.

A text, token by token: `token_colours`, `token_html`, `token_grid`, `gate_steps`, `attention_maps`.
A model on several domains: `expert_shares`, `domain_shares`, `repeated_assignments`, `token_type_specialisation`,
`switched_off`, `routing_overview`.
Routers: `router_distributions`, `choice_information`, `expert_pairs`, `token_paths`, `routing_differences`.
Training and machine: `balance_over_training`, `shares_over_training`, `cache_ring`, `roofline`,
`cost_growth`, `expert_cache`.
All of routing on one HTML page: `routing_page`, as `minimoe route --html` writes it.
"""

from minimoe.plots.ablation import switched_off
from minimoe.plots.atlas import RoutingPage, routing_page
from minimoe.plots.attention import attention_maps
from minimoe.plots.coactivation import expert_pairs
from minimoe.plots.differences import routing_differences
from minimoe.plots.domains import domain_shares
from minimoe.plots.expert_cache import expert_cache
from minimoe.plots.gate import gate_steps
from minimoe.plots.grid import token_grid
from minimoe.plots.growth import cost_growth
from minimoe.plots.html import TokenHtml, token_html
from minimoe.plots.information import choice_information
from minimoe.plots.overview import routing_overview
from minimoe.plots.paths import token_paths
from minimoe.plots.repeats import repeated_assignments
from minimoe.plots.ring import cache_ring
from minimoe.plots.roofline import roofline
from minimoe.plots.router import router_distributions
from minimoe.plots.shares import expert_shares
from minimoe.plots.specialisation import token_type_specialisation
from minimoe.plots.tokens import token_colours
from minimoe.plots.training import balance_over_training, shares_over_training

__all__ = [
    "RoutingPage", "TokenHtml", "attention_maps", "balance_over_training", "cache_ring", "choice_information",
    "cost_growth", "domain_shares", "expert_cache", "expert_pairs", "expert_shares", "gate_steps",
    "repeated_assignments", "roofline", "router_distributions", "routing_differences", "routing_overview",
    "routing_page", "shares_over_training", "switched_off", "token_colours", "token_grid", "token_html", "token_paths",
    "token_type_specialisation",
]  # fmt: skip
