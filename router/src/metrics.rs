//! What the router counts.
