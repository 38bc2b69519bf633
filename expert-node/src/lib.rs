//! An expert node: holds experts and runs them.
