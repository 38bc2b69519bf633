//! One token from one row of logits.
