"""The routing atlas: every analysis of section 5 of the Mixtral paper, for any sparse model and any texts.

`routing_page(model, texts)` gives one HTML page; `minimoe route --html PAGE` does it from the command line. `gather`
lets the model read and keeps every decision of its routers; `numbers` counts; `plates` are the figures; the sections of
the page, in files of their own, put figures, tables and explanations side by side.
"""

from minimoe.plots.atlas.gather import Atlas, gather
from minimoe.plots.atlas.page import RoutingPage, routing_page

__all__ = ["Atlas", "RoutingPage", "gather", "routing_page"]
