//! Machines of one cluster find each other's addresses on the LAN.
//!
//! Where a router is, a node knows from its join token; addresses that people write down are the way that is tested
//! first. This crate is for the day the router gets another address: mDNS says that somebody claims to be the router
//! there, the node asks whoever that is, over libp2p (TCP, Noise, Yamux), to prove the router's key and to say at which
//! UDP port QUIC is served, and what was proven becomes a suggestion (`mesh_net::suggestions`) that the station dials after
//! the addresses it was given. Trust stays where it was: in the roster, and in QUIC's mutual TLS at the place suggested.
//!
//! Read in this order: `discovery` is the thread and its rests, `session` what is done with what is heard, `swarm` the
//! protocols and their limits. Leaves: `question` is the only message, `address` says what is dialed at all, `candidates`
//! decides whom to ask when, `budget` how much of a core all of this may take, `tally` what was seen, `circle` who
//! belongs.
//!
//! The price: some 130 crates of dependencies, one thread, a packet per machine every half minute. Refused on purpose:
//! gossip, DHT, relays, strangers (the allow-list is asked before any protocol is), and anything that has to stay secret:
//! neither rosters nor epochs nor keys travel here. A module imports only modules listed after it (tests: tidy).

pub mod discovery;

mod session;

mod swarm;

pub mod question;

pub mod address;

pub mod candidates;

mod budget;

mod tally;

pub mod circle;

#[cfg(test)]
mod tests;
