//! Membership, placement and health as pure state machines: no IO, no clock, no chance.
//!
//! The caller feeds events with the time they happened and carries out the actions that come back. So the whole
//! of it runs in a simulation, and a failing seed replays (`clippy.toml` of this crate bans clocks and maps whose
//! order differs between runs).
//!
//! A module imports only modules listed after it (tests: tidy).

pub mod cluster;

pub mod stored;

pub mod claims;

pub mod planner;

pub mod tune;

pub mod standin;

pub mod placement;

pub mod layout;

pub mod cost;

pub mod draws;

pub mod popularity;

pub mod machine;

pub mod attempts;

pub mod health;

pub mod changes;

pub mod heat;

pub mod routes;

pub mod status;

pub mod facts;
