//! Decides which nodes are trusted with calls, from answers and misses.
