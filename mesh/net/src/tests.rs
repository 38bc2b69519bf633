//! Router and nodes over real QUIC on loopback. Nothing here sleeps: every test waits for the event it is about.

mod calls;
mod files;
mod harness;
mod helm;
mod hostile;
mod leaving;
mod probes;
mod trust;
