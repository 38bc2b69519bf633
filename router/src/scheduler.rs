//! Which sequences take part in the next step, and which KV blocks they own.
