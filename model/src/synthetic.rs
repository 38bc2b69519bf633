//! Models of real shapes with seeded random weights.
