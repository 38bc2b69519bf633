//! Router and nodes over real QUIC on loopback. Nothing here sleeps: every test waits for the event it is about.

mod calls;
mod files;
mod guard;
mod harness;
mod helm;
mod hostile;
mod join;
mod leaving;
mod look;
mod places;
mod probes;
mod roster;
mod state;
mod trust;
mod weights;
