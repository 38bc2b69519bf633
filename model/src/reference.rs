//! The whole model in one process: the yardstick.
