//! QUIC between router and expert nodes.
