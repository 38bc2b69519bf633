//! The manifest of a packed model.
