//! What the router runs of a model: everything but the routed experts.
