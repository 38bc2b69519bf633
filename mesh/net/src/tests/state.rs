//! What router and node keep: restarts, half-made clusters, full disks, spent tokens, replays and forks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_wire::id::NodeId;

use crate::authority::{Authority, AuthorityError, TTL_MAX};
use crate::disk::Folder;
use crate::keys::SigningKey;
use crate::members::Standing;
use crate::membership::{Admission, Distrust, Membership, MembershipError, Opened, shown};
use crate::roster::{Machine, REVOKED_MAX, Role, Roster, SignedRoster};
use crate::tickets::{Now, OUTSTANDING_MAX, Refused, Ticket, Tickets, TicketsError};
use crate::token::{ADDRESSES_MAX, Token, TokenError};

const HOUR: Duration = Duration::from_secs(3600);

fn address() -> SocketAddr {
    "127.0.0.1:8621".parse().unwrap()
}

fn later(now: Now, by: Duration) -> Now {
    Now { monotonic: now.monotonic + by, unix: now.unix + by.as_secs() }
}

/// Redeems a token for a machine with this key.
fn redeem(authority: &Authority, token: &Token, key: u8, now: Now) -> Result<Machine, Refused> {
    let ticket = token.key().unwrap().public();
    authority.redeem(ticket, Role::Node as u8, ("pi", NodeId([key; 32])), now)
}

#[test]
fn a_router_makes_a_cluster_once_and_counts_its_starts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("router");
    let first = Authority::open(&path).unwrap();
    assert!(first.is_new() && first.term().0 == 1);
    assert!(Authority::open(&path).unwrap_err().to_string().contains("in use"));
    first.admit("pi", NodeId([5; 32])).unwrap();
    let (cluster, id, roster) = (first.cluster(), first.identity().id(), first.roster());
    let first_term = first.term();
    drop(first);
    let second = Authority::open(&path).unwrap();
    assert!(!second.is_new());
    assert_eq!((second.cluster(), second.identity().id(), second.roster()), (cluster, id, roster));
    assert_eq!(second.term().0, 2);
    assert_ne!(second.term().1, first_term.1);
    assert_eq!(second.members().standing(NodeId([5; 32])), Standing::Member);
}

#[test]
fn a_start_that_was_cut_short_is_made_whole_and_a_lost_file_is_not_made_up() {
    let files = ["machine.key", "cluster.key", "roster", "term"];
    for kept in 0..=files.len() {
        let folder = tempfile::tempdir().unwrap();
        let before = Authority::open(folder.path()).unwrap();
        let (id, cluster) = (before.identity().id(), before.cluster());
        drop(before);
        // They are made in this order.
        for name in &files[kept..] {
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        let after = Authority::open(folder.path()).unwrap();
        assert_eq!(after.identity().id() == id, kept > 0);
        assert_eq!(after.cluster() == cluster, kept > 1);
    }
    for lost in &files[..3] {
        let folder = tempfile::tempdir().unwrap();
        drop(Authority::open(folder.path()).unwrap());
        std::fs::remove_file(folder.path().join(lost)).unwrap();
        let error = Authority::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains("restore"), "{lost}: {error}");
        assert!(!folder.path().join(lost).exists(), "{lost} was made up");
    }
    for broken in ["cluster.key", "roster", "tokens", "term"] {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path()).unwrap();
        drop(authority.issue(HOUR, vec![address()]).unwrap());
        drop(authority);
        Folder::open(folder.path()).unwrap().write(broken, b"x").unwrap();
        let error = Authority::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains(broken), "{broken}: {error}");
    }
    // The roster of another cluster.
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    drop((Authority::open(one.path()).unwrap(), Authority::open(other.path()).unwrap()));
    std::fs::copy(other.path().join("roster"), one.path().join("roster")).unwrap();
    let error = Authority::open(one.path()).unwrap_err();
    assert!(matches!(error, AuthorityError::RosterFile { .. }), "{error}");
}

#[test]
fn a_token_lets_one_machine_in_whoever_asks_how_often() {
    let authority = Authority::in_memory().unwrap();
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    let now = Now::read();
    let admitted = redeem(&authority, &token, 1, now).unwrap();
    assert_eq!(admitted, Machine::node("pi", NodeId([1; 32])));
    assert_eq!(redeem(&authority, &token, 2, now), Err(Refused::Used));
    // It did not get its answer and asks again.
    assert_eq!(redeem(&authority, &token, 1, now), Ok(admitted));
    assert_eq!(authority.roster().roster().nodes.len(), 1);
    // After it was revoked, neither that token nor another one helps.
    authority.revoke("pi").unwrap();
    assert_eq!(redeem(&authority, &token, 1, now), Err(Refused::Used));
    let another = authority.issue(HOUR, vec![address()]).unwrap();
    assert_eq!(redeem(&authority, &another, 1, now), Err(Refused::Revoked));
    // Which does not use it up.
    assert_eq!(redeem(&authority, &another, 3, now).unwrap().name, "pi");
    // A machine that is in and lost its membership file keeps its name.
    let third = authority.issue(HOUR, vec![address()]).unwrap();
    let ticket = third.key().unwrap().public();
    let again = authority.redeem(ticket, 1, ("other-name", NodeId([3; 32])), now).unwrap();
    assert_eq!(again.name, "pi");
    assert_eq!(redeem(&authority, &third, 4, now), Err(Refused::Used));
    assert_eq!(authority.roster().roster().epoch, 4);
}

#[test]
fn a_hundred_machines_with_one_token_have_one_winner() {
    let authority = Arc::new(Authority::in_memory().unwrap());
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    let threads: Vec<_> = (1..=100)
        .map(|key| {
            let (authority, token) = (Arc::clone(&authority), token.clone());
            std::thread::spawn(move || redeem(&authority, &token, key, Now::read()))
        })
        .collect();
    let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(Refused::Used)).count(), 99);
    assert_eq!(authority.roster().roster().nodes.len(), 1);
}

#[test]
fn tokens_expire_by_the_clock_that_does_not_jump() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    let now = Now::read();
    // The calendar jumps ten years: no matter, while the process lives.
    let jumped = Now { unix: now.unix + 10 * 365 * 24 * 3600, ..now };
    let expired = later(now, HOUR);
    assert_eq!(redeem(&authority, &token, 1, expired), Err(Refused::Expired));
    assert!(redeem(&authority, &token, 1, jumped).is_ok());
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    let unused = authority.issue(HOUR, vec![address()]).unwrap();
    assert!(redeem(&authority, &token, 2, now).is_ok());
    drop(authority);
    // After a restart the calendar is all there is; what was used stays used.
    let authority = Authority::open(folder.path()).unwrap();
    assert_eq!(redeem(&authority, &token, 3, now), Err(Refused::Used));
    let early = Now { unix: unused.expires_unix - 1, ..later(now, 9 * HOUR) };
    let late = Now { unix: unused.expires_unix, ..now };
    assert_eq!(redeem(&authority, &unused, 3, late), Err(Refused::Expired));
    assert!(redeem(&authority, &unused, 3, early).is_ok());
}

#[test]
fn tokens_that_nobody_issued_here_or_for_this_are_refused() {
    let (authority, other) = (Authority::in_memory().unwrap(), Authority::in_memory().unwrap());
    let foreign = other.issue(HOUR, vec![address()]).unwrap();
    assert_eq!(redeem(&authority, &foreign, 1, Now::read()), Err(Refused::Unknown));
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    let ticket = token.key().unwrap().public();
    let ask = |role, name| authority.redeem(ticket, role, (name, NodeId([1; 32])), Now::read());
    assert_eq!(ask(2, "pi"), Err(Refused::Role));
    assert_eq!(ask(1, "a b"), Err(Refused::Name));
    assert_eq!(ask(1, ""), Err(Refused::Name));
    // None of which used it up.
    assert!(ask(1, "pi").is_ok());
    for ttl in [Duration::ZERO, TTL_MAX + Duration::from_secs(1)] {
        assert!(matches!(authority.issue(ttl, vec![address()]), Err(AuthorityError::Ttl)));
    }
    for addresses in [vec![], vec![address(); ADDRESSES_MAX + 1]] {
        let error = authority.issue(HOUR, addresses).unwrap_err();
        assert!(matches!(error, AuthorityError::Token(TokenError::Addresses)));
    }
}

#[test]
fn tokens_that_are_out_are_bounded_and_old_ones_forgotten() {
    let now = Now::read();
    let ticket = |number: u8, ttl: u64| {
        let token = Token::generate(NodeId([0; 32]), Role::Node, now.unix + ttl, vec![address()]).unwrap();
        Ticket::new(&token, NodeId([number; 32]), now.monotonic + Duration::from_secs(ttl))
    };
    let mut tickets = Tickets::default();
    for number in 0..OUTSTANDING_MAX as u8 {
        tickets = tickets.with(ticket(number, 10 + u64::from(number)), now).unwrap();
    }
    assert_eq!(tickets.with(ticket(200, 10), now), Err(TicketsError::TooMany));
    assert_eq!(Tickets::parse(tickets.to_text().as_bytes()).unwrap().to_text(), tickets.to_text());
    // One was used: there is room for one.
    let spent = tickets.spent(NodeId([7; 32]), NodeId([9; 32]));
    let more = spent.with(ticket(200, 10), now).unwrap();
    assert_eq!(more.with(ticket(201, 10), now), Err(TicketsError::TooMany));
    assert_eq!(more.check(NodeId([7; 32]), 1, now), Err(Refused::Used));
    // All expired, twice over: what is remembered is bounded.
    let (mut now, mut list) = (now, more);
    for number in 0..200 {
        now = later(now, Duration::from_secs(1000));
        let token = Token::generate(NodeId([0; 32]), Role::Node, now.unix + 1, vec![address()]).unwrap();
        let ticket = Ticket::new(&token, NodeId([number; 32]), now.monotonic + Duration::from_secs(1));
        list = list.with(ticket, now).unwrap();
    }
    assert!(list.to_text().lines().count() <= 1 + 2 * OUTSTANDING_MAX);
    for bad in ["", "moemesh-tokens-1\nx", "moemesh-tokens-2\n", "moemesh-tokens-1\n\n"] {
        assert!(Tickets::parse(bad.as_bytes()).is_none(), "{bad}");
    }
}

#[test]
fn on_a_full_disk_nothing_is_lost_and_nothing_half_done() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    authority.admit("kept", NodeId([8; 32])).unwrap();
    let before = authority.roster();
    for full in ["tokens", "roster"] {
        // Nothing can be written where a folder is in the way.
        let obstacle = folder.path().join(format!("{full}.new"));
        std::fs::create_dir(&obstacle).unwrap();
        assert_eq!(redeem(&authority, &token, 1, Now::read()), Err(Refused::Failed), "{full}");
        assert_eq!(authority.roster(), before);
        assert_eq!(authority.members().standing(NodeId([1; 32])), Standing::Stranger);
        if full == "roster" {
            let error = authority.revoke("kept").unwrap_err();
            assert!(error.to_string().contains("roster"), "{error}");
            assert_eq!(authority.members().standing(NodeId([8; 32])), Standing::Member);
        } else {
            let error = authority.issue(HOUR, vec![address()]).unwrap_err();
            assert!(error.to_string().contains("tokens"), "{error}");
        }
        std::fs::remove_dir(&obstacle).unwrap();
    }
    drop(authority);
    // As on disk: the token is still good.
    let authority = Authority::open(folder.path()).unwrap();
    assert_eq!(authority.roster(), before);
    assert!(redeem(&authority, &token, 1, Now::read()).is_ok());
    authority.revoke("kept").unwrap();
}

#[test]
fn names_are_made_unique_and_machines_found_by_name_or_key() {
    let authority = Authority::in_memory().unwrap();
    let long = "x".repeat(63);
    for (key, name, given) in [
        (1, "pi", "pi"),
        (2, "pi", "pi-2"),
        (3, "pi", "pi-3"),
        (4, &*long, &*long),
        (5, &*long, &*format!("{}-2", "x".repeat(61))),
    ] {
        assert_eq!(authority.admit(name, NodeId([key; 32])).unwrap().name, given);
    }
    assert!(matches!(authority.revoke("nobody"), Err(AuthorityError::NoSuchNode(_))));
    assert!(matches!(authority.revoke(""), Err(AuthorityError::NoSuchNode(_))));
    assert!(matches!(authority.revoke("0"), Err(AuthorityError::Ambiguous(_))));
    assert_eq!(authority.revoke("0202").unwrap().name, "pi-2");
    assert_eq!(authority.revoke("pi").unwrap().key, NodeId([1; 32]));
    assert!(matches!(authority.revoke("pi"), Err(AuthorityError::NoSuchNode(_))));
    assert_eq!(authority.members().standing(NodeId([1; 32])), Standing::Revoked);
    // A name that is free again is given again, to another key.
    assert_eq!(authority.admit("pi", NodeId([6; 32])).unwrap().name, "pi");
}

#[test]
fn revoked_keys_are_forgotten_in_the_order_they_came() {
    let authority = Authority::in_memory().unwrap();
    let key = |at: usize| NodeId(std::array::from_fn(|place| (at >> (8 * place.min(2))) as u8));
    for at in 1..=REVOKED_MAX + 1 {
        authority.admit("pi", key(at)).unwrap();
        authority.revoke("pi").unwrap();
    }
    // Forgotten is not forgiven: it is a stranger.
    assert_eq!(authority.members().standing(key(1)), Standing::Stranger);
    assert_eq!(authority.members().standing(key(2)), Standing::Revoked);
    assert_eq!(authority.roster().roster().revoked.len(), REVOKED_MAX);
}

#[test]
fn a_cluster_has_room_for_so_many_nodes() {
    let authority = Authority::in_memory().unwrap();
    let key = |at: usize| NodeId(std::array::from_fn(|place| (at >> (8 * place.min(2))) as u8));
    for at in 0..crate::roster::NODES_MAX {
        authority.admit(&format!("n{at}"), key(at + 1)).unwrap();
    }
    let token = authority.issue(HOUR, vec![address()]).unwrap();
    assert_eq!(redeem(&authority, &token, 255, Now::read()), Err(Refused::Full));
    authority.revoke("n3").unwrap();
    assert!(redeem(&authority, &token, 255, Now::read()).is_ok());
}

/// A cluster's key, and what its router would show of this epoch.
struct Signer(SigningKey);

impl Signer {
    fn roster(&self, epoch: u64, names: &[&str]) -> SignedRoster {
        let nodes = (10..).zip(names).map(|(key, name)| Machine::node(name, NodeId([key; 32]))).collect();
        let router = NodeId([1; 32]);
        let roster = Roster { cluster: self.0.public(), epoch, router, nodes, revoked: vec![] };
        SignedRoster::sign(roster, &self.0).unwrap()
    }

    fn shown(&self, term: (u64, u64), epoch: u64, names: &[&str]) -> Vec<u8> {
        shown(term, &self.roster(epoch, names))
    }

    fn admission(&self) -> Admission {
        let (cluster, router) = (self.0.public(), NodeId([1; 32]));
        Admission { cluster, router, name: "pi".to_owned(), addresses: vec![address()] }
    }
}

fn reopen(path: &std::path::Path) -> Membership {
    match Membership::open(path).unwrap() {
        Opened::Member(membership) => *membership,
        Opened::Stranger(..) => panic!("the membership is lost"),
    }
}

#[test]
fn a_node_believes_the_newest_roster_and_the_first_router_of_the_highest_term() {
    let folder = tempfile::tempdir().unwrap();
    let signer = Signer(SigningKey::generate().unwrap());
    let Opened::Stranger(locked, identity) = Membership::open(folder.path()).unwrap() else {
        panic!("empty")
    };
    let id = identity.id();
    let mut node = Membership::enter(locked, identity, signer.admission()).unwrap();
    assert_eq!(node.epoch(), 0);
    node.hear(&signer.shown((3, 77), 5, &["a"])).unwrap();
    // Gaps are fine, and hearing the same twice is.
    node.hear(&signer.shown((3, 77), 9, &["a", "b"])).unwrap();
    node.hear(&signer.shown((3, 77), 9, &["a", "b"])).unwrap();
    for restarted in [false, true] {
        if restarted {
            drop(node);
            node = reopen(folder.path());
            assert_eq!((node.identity().id(), node.admission()), (id, &signer.admission()));
        }
        let refuse = |bytes: Vec<u8>| node.hear(&bytes).unwrap_err();
        assert!(matches!(refuse(signer.shown((3, 77), 8, &["a"])), Distrust::Replay { shown: 8, seen: 9 }));
        assert!(matches!(refuse(signer.shown((4, 1), 8, &["a"])), Distrust::Replay { .. }));
        assert!(matches!(refuse(signer.shown((3, 77), 9, &["a", "c"])), Distrust::Fork(9)));
        assert!(refuse(signer.shown((4, 1), 9, &["a", "c"])).to_string().contains("ALARM"));
        assert!(matches!(refuse(signer.shown((2, 77), 10, &["a"])), Distrust::Term { shown: 2, seen: 3 }));
        assert!(matches!(refuse(signer.shown((3, 78), 10, &["a"])), Distrust::Twin(3)));
        let stranger = Signer(SigningKey::generate().unwrap());
        assert!(matches!(refuse(stranger.shown((3, 77), 10, &["a"])), Distrust::Roster(_)));
        assert!(matches!(refuse(vec![0; 15]), Distrust::Cut));
        assert!(matches!(refuse(vec![0; 16]), Distrust::Roster(_)));
        assert_eq!(node.epoch(), 9);
    }
    // The next start of the router, with a newer roster.
    node.hear(&signer.shown((4, 1), 10, &["a"])).unwrap();
    assert!(matches!(node.hear(&signer.shown((3, 77), 11, &["a"])), Err(Distrust::Term { .. })));
}

#[test]
fn what_a_node_cannot_save_it_does_not_believe() {
    let folder = tempfile::tempdir().unwrap();
    let signer = Signer(SigningKey::generate().unwrap());
    let Opened::Stranger(locked, identity) = Membership::open(folder.path()).unwrap() else {
        panic!("empty")
    };
    let node = Membership::enter(locked, identity, signer.admission()).unwrap();
    node.hear(&signer.shown((1, 1), 1, &[])).unwrap();
    std::fs::create_dir(folder.path().join("membership.new")).unwrap();
    let error = node.hear(&signer.shown((1, 1), 2, &[])).unwrap_err();
    assert!(error.to_string().contains("membership"), "{error}");
    assert_eq!(node.epoch(), 1);
    std::fs::remove_dir(folder.path().join("membership.new")).unwrap();
    node.hear(&signer.shown((1, 1), 2, &[])).unwrap();
    drop(node);
    assert_eq!(reopen(folder.path()).epoch(), 2);
}

#[test]
fn a_membership_file_with_other_content_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let signer = Signer(SigningKey::generate().unwrap());
    let Opened::Stranger(locked, identity) = Membership::open(folder.path()).unwrap() else {
        panic!("empty")
    };
    drop(Membership::enter(locked, identity, signer.admission()).unwrap());
    let good = std::fs::read_to_string(folder.path().join("membership")).unwrap();
    let spoil = |from: &str, to: &str| {
        assert!(good.contains(from), "{good}");
        good.replacen(from, to, 1)
    };
    for bad in [
        String::new(),
        spoil("moemesh-membership-1", "moemesh-membership-2"),
        spoil("cluster ", "cluster 0"),
        spoil("name pi", "name p i"),
        spoil("8621", "98621"),
        spoil("term 0", "term -1"),
        spoil("roster ", "roster 00"),
        spoil("roster ", "roster 0"),
        format!("{good}more\n"),
        good[..good.len() / 2].to_owned(),
    ] {
        Folder::open(folder.path()).unwrap().write("membership", bad.as_bytes()).unwrap();
        let error = Membership::open(folder.path()).unwrap_err();
        assert!(
            matches!(&error, MembershipError::Content(path) if path.contains("membership")),
            "{bad}: {error}"
        );
    }
    Folder::open(folder.path()).unwrap().write("membership", good.as_bytes()).unwrap();
    assert_eq!(reopen(folder.path()).admission(), &signer.admission());
    // And a router's folder is no node's, nor the other way round.
    assert!(matches!(Authority::open(folder.path()).unwrap_err(), AuthorityError::NodesFolder(_)));
    let router = tempfile::tempdir().unwrap();
    drop(Authority::open(router.path()).unwrap());
    let error = Membership::open(router.path()).unwrap_err();
    assert!(error.to_string().contains("another --state"), "{error}");
}
