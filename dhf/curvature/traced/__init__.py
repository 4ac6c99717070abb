"""Products from a recording: a product is recorded once, cut by what depends on its vector, and replayed without autograd."""

from dhf.curvature.traced.builders import PRODUCTS, graph_builder

__all__ = ["PRODUCTS", "graph_builder"]
