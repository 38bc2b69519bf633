//! The OpenAI-compatible API.
