"""Pictures of routing: each function returns a Matplotlib figure, and no global state is touched."""

from minimoe.plots.overview import routing_overview
from minimoe.plots.shares import expert_shares
from minimoe.plots.tokens import token_colours

__all__ = ["expert_shares", "routing_overview", "token_colours"]
