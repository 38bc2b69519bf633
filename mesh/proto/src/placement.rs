//! Splits whole experts over nodes by memory.
