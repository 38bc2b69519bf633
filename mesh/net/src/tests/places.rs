//! Where a node looks for its router: where it was told first, then where discovery found it.

use std::net::UdpSocket;
use std::sync::Arc;

use super::harness::{LONG, Running, call_and_check, hub, hub_config, keys, listen_anywhere};
use crate::hub::Hub;
use crate::membership::Membership;

#[test]
fn a_router_that_moved_is_found_where_it_is_suggested() {
    let keys = keys(1);
    // A port that nobody answers at, held so that nobody else gets it.
    let old = UdpSocket::bind(listen_anywhere()).unwrap();
    let moved = hub(&keys);
    let membership = keys.membership(&keys.nodes[0]);
    let _node = Running::of(Arc::clone(&membership), vec![old.local_addr().unwrap()]);
    // What nobody proved leads nowhere: another cluster's router does not serve this node.
    let other = super::harness::keys(0);
    let wrong = hub(&other);
    membership.suggestions().suggest(keys.router(), moved.local_addr());
    // The newest is tried first.
    membership.suggestions().suggest(keys.router(), wrong.local_addr());
    assert!(moved.wait_ready(1, LONG));
    call_and_check(&moved, 1);
    assert_eq!(moved.counters().connections, 1);
    assert_eq!(wrong.counters().connections, 0);
}

#[test]
fn a_place_that_was_given_is_tried_before_one_that_is_suggested() {
    let keys = keys(1);
    let given = hub(&keys);
    // The same router once more, as after a move: one of them is enough.
    let suggested = Hub::start(hub_config(&keys, listen_anywhere())).unwrap();
    let membership = keys.membership(&keys.nodes[0]);
    membership.suggestions().suggest(keys.router(), suggested.local_addr());
    let _node = Running::of(membership, vec![given.local_addr()]);
    assert!(given.wait_ready(1, LONG));
    call_and_check(&given, 1);
    assert_eq!(suggested.counters().connections, 0);
}

#[test]
fn a_state_folder_is_looked_at_beside_its_owner_and_never_changed() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    assert!(Membership::peek(&state).unwrap().is_none() && !state.exists(), "nothing is made");
    let keys = keys(1);
    let crate::membership::Opened::Stranger(opened, identity) = Membership::open(&state).unwrap() else {
        panic!("a new folder");
    };
    let admission = keys.membership(&identity).admission().clone();
    let owner = Membership::enter(opened, identity, admission.clone()).unwrap();
    // The owner has it locked.
    let seen = Membership::peek(&state).unwrap().unwrap();
    assert_eq!((seen.admission(), seen.identity().id()), (&admission, owner.identity().id()));
    let before = std::fs::read(state.join("membership")).unwrap();
    let shown = crate::membership::shown(keys.authority.term(), &keys.authority.roster());
    seen.hear(&shown).unwrap();
    assert_eq!(std::fs::read(state.join("membership")).unwrap(), before);
    owner.hear(&shown).unwrap();
    assert_ne!(std::fs::read(state.join("membership")).unwrap(), before);
    let roster = Membership::peek(&state).unwrap().unwrap().roster().unwrap();
    assert_eq!(roster, *keys.authority.roster());
    crate::disk::Folder::peek(&state).write("x", b"").unwrap_err();
}
