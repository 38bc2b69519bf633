//! Signed rosters and tokens: one form for one meaning, and every other byte string is refused by name.

use mesh_wire::id::NodeId;
use proptest::prelude::*;

use crate::keys::SigningKey;
use crate::roster::{
    Machine, NODES_MAX, REVOKED_MAX, ROSTER_BYTES_MAX, Role, Roster, RosterError, SignedRoster,
};
use crate::token::{ADDRESSES_MAX, TEXT_BYTES_MAX, Token, TokenError, cluster_hash};

fn cluster() -> SigningKey {
    SigningKey::from_seed([1; 32]).unwrap()
}

fn roster() -> Roster {
    Roster {
        cluster: cluster().public(),
        epoch: 7,
        router: NodeId([1; 32]),
        nodes: vec![Machine::node("küche", NodeId([2; 32])), Machine::node("pi-4.local", NodeId([3; 32]))],
        revoked: vec![Machine::node("attic", NodeId([4; 32]))],
    }
}

fn sign(roster: Roster) -> Result<SignedRoster, RosterError> {
    SignedRoster::sign(roster, &cluster())
}

/// What the cluster's key signs, whatever it says.
fn signed_bytes(message: &[u8]) -> Vec<u8> {
    [message, &cluster().sign(message)].concat()
}

fn message() -> Vec<u8> {
    let signed = sign(roster()).unwrap();
    signed.bytes()[..signed.bytes().len() - 64].to_vec()
}

fn parse(bytes: &[u8]) -> Result<SignedRoster, RosterError> {
    SignedRoster::parse(bytes, cluster().public())
}

#[test]
fn a_roster_is_read_back_as_it_was_signed() {
    let signed = sign(roster()).unwrap();
    let read = parse(signed.bytes()).unwrap();
    assert_eq!((read.roster(), read.bytes(), read.hash()), (&roster(), signed.bytes(), signed.hash()));
    let other = sign(Roster { epoch: 8, ..roster() }).unwrap();
    assert_ne!(other.hash(), signed.hash());
    let empty = Roster { nodes: vec![], revoked: vec![], ..roster() };
    assert_eq!(parse(sign(empty.clone()).unwrap().bytes()).unwrap().roster(), &empty);
}

#[test]
fn one_flipped_bit_or_one_byte_more_or_less_is_no_roster() {
    let good = sign(roster()).unwrap().bytes().to_vec();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            parse(&bad).unwrap_err();
        }
        parse(&good[..at]).unwrap_err();
    }
    assert_eq!(parse(&[&good[..], &[0]].concat()), Err(RosterError::Signature));
    // Signed by the right key, and still with something behind it.
    assert_eq!(parse(&signed_bytes(&[&message()[..], &[0]].concat())), Err(RosterError::Form));
    assert_eq!(parse(&vec![0; ROSTER_BYTES_MAX + 1]), Err(RosterError::Form));
}

#[test]
fn another_clusters_roster_is_refused_also_with_this_clusters_name_on_it() {
    let stranger = SigningKey::from_seed([9; 32]).unwrap();
    let theirs = Roster { cluster: stranger.public(), ..roster() };
    let signed = SignedRoster::sign(theirs, &stranger).unwrap();
    assert!(
        matches!(parse(signed.bytes()), Err(RosterError::Cluster { found, .. }) if found == stranger.public())
    );
    assert!(matches!(SignedRoster::sign(roster(), &stranger), Err(RosterError::Cluster { .. })));
    let forged = [&message()[..], &stranger.sign(&message())].concat();
    assert_eq!(parse(&forged), Err(RosterError::Signature));
}

#[test]
fn rosters_that_are_ambiguous_are_neither_signed_nor_believed() {
    let check = |change: fn(&mut Roster)| {
        let mut roster = roster();
        change(&mut roster);
        sign(roster).unwrap_err()
    };
    assert_eq!(check(|roster| roster.epoch = 0), RosterError::Epoch(0));
    assert_eq!(check(|roster| roster.epoch = u64::MAX), RosterError::Epoch(u64::MAX));
    let duplicate = check(|roster| roster.nodes[1].name = "küche".into());
    assert_eq!(duplicate, RosterError::DuplicateName("küche".into()));
    for change in [
        |roster: &mut Roster| roster.nodes[1].key = roster.router,
        |roster: &mut Roster| roster.nodes[1].key = roster.nodes[0].key,
        |roster: &mut Roster| roster.revoked[0].key = roster.nodes[0].key,
    ] {
        assert!(matches!(check(change), RosterError::DuplicateKey(_)));
    }
    for name in ["", "a b", "a\nb", "a/b", &"x".repeat(64)] {
        let mut bad = roster();
        bad.nodes[0].name = name.to_owned();
        assert_eq!(sign(bad).unwrap_err(), RosterError::Name(name.to_owned()));
    }
    // The cluster's key can sign what this program would not; it is refused all the same.
    let epoch_at = 16 + 32;
    for epoch in [0, u64::MAX] {
        let mut bad = message();
        bad[epoch_at..epoch_at + 8].copy_from_slice(&epoch.to_le_bytes());
        assert_eq!(parse(&signed_bytes(&bad)), Err(RosterError::Epoch(epoch)));
    }
    let role_at = epoch_at + 8 + 32 + 2 + 32;
    let mut bad = message();
    assert_eq!(bad[role_at], Role::Node as u8);
    bad[role_at] = 2;
    assert_eq!(parse(&signed_bytes(&bad)), Err(RosterError::Role(2)));
}

#[test]
fn a_roster_has_room_for_every_machine_and_no_more() {
    let machine = |at: usize, byte: u8| {
        let key =
            NodeId(std::array::from_fn(|place| if place < 2 { (at >> (8 * place)) as u8 } else { byte }));
        Machine::node(&format!("{at:063}"), key)
    };
    let mut full = roster();
    full.nodes = (0..NODES_MAX).map(|at| machine(at, 50)).collect();
    full.revoked = (0..REVOKED_MAX).map(|at| machine(at, 51)).collect();
    let signed = sign(full.clone()).unwrap();
    assert_eq!(signed.bytes().len(), ROSTER_BYTES_MAX);
    const { assert!(ROSTER_BYTES_MAX + 16 <= mesh_wire::frame::ROSTER_BYTES_MAX) };
    assert_eq!(parse(signed.bytes()).unwrap().roster(), &full);
    full.nodes.push(machine(NODES_MAX, 50));
    assert_eq!(sign(full.clone()), Err(RosterError::TooMany(NODES_MAX + 1)));
    full.nodes.pop();
    full.revoked.push(machine(REVOKED_MAX, 51));
    assert_eq!(sign(full), Err(RosterError::Form));
}

fn token() -> Token {
    let addresses = ["192.168.1.10:8621", "[fd00::1]:8621", "127.0.0.1:1"];
    let addresses = addresses.map(|address| address.parse().unwrap()).to_vec();
    Token::generate(cluster().public(), Role::Node, 1_800_000_000, addresses).unwrap()
}

#[test]
fn a_token_survives_what_chats_and_terminals_do_to_it() {
    let token = token();
    let text = token.to_string();
    assert!(text.starts_with("moemesh1.") && text.len() < 200, "{text}");
    assert!(text.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '.'), "{text}");
    let wrapped: String = text.chars().flat_map(|letter| [letter, '\n', ' ', '\t']).collect();
    for same in [text.clone(), format!("  {text}\r\n"), text.to_uppercase(), wrapped] {
        assert_eq!(same.parse(), Ok(token.clone()));
    }
    assert_eq!(token.cluster, cluster_hash(cluster().public()));
    assert_eq!((token.expires_unix, token.addresses.len()), (1_800_000_000, 3));
    assert_ne!(Token::generate(cluster().public(), Role::Node, 0, vec![]).unwrap(), token);
    assert!(!text.contains(&format!("{token:?}")) && format!("{token:?}").len() < 20);
}

#[test]
fn a_damaged_token_is_told_from_one_that_is_none() {
    let text = token().to_string();
    for at in 9..text.len() {
        for other in ['a', '7', '1', 'é'] {
            let mut letters: Vec<char> = text.chars().collect();
            if std::mem::replace(&mut letters[at], other) != other {
                let changed: String = letters.into_iter().collect();
                assert_eq!(changed.parse::<Token>(), Err(TokenError::Damaged), "{at} {other}");
            }
        }
        assert_eq!(text[..at].parse::<Token>(), Err(TokenError::Damaged), "{at}");
        let longer = format!("{}a{}", &text[..at], &text[at..]);
        assert_eq!(longer.parse::<Token>(), Err(TokenError::Damaged), "{at}");
    }
    for none in ["", "x", "hello there", "moemes", &"x".repeat(TEXT_BYTES_MAX + 1)] {
        assert_eq!(none.parse::<Token>(), Err(TokenError::NotAToken), "{none}");
    }
    assert_eq!("moemesh23.abc".parse::<Token>(), Err(TokenError::Version("23".into())));
    for error in [TokenError::Damaged, TokenError::NotAToken, TokenError::Version("2".into())] {
        let text = error.to_string();
        assert!(
            text.contains("again") || text.contains("moemesh token") || text.contains("update"),
            "{text}"
        );
    }
    let many = vec!["[fd00::1]:8621".parse().unwrap(); ADDRESSES_MAX];
    let longest = Token::generate(cluster().public(), Role::Node, u64::MAX, many).unwrap().to_string();
    assert!(2 * longest.len() <= TEXT_BYTES_MAX, "{}", longest.len());
    assert!(longest.parse::<Token>().is_ok());
}

proptest! {
    #[test]
    fn no_text_makes_the_token_panic(text in "(moemesh1\\.)?[a-z2-7]{0,200}") {
        drop(text.parse::<Token>());
    }

    #[test]
    fn any_signed_bytes_are_refused_or_have_one_form(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        // With the right head, so that the parser gets to the lists.
        let bytes = signed_bytes(&[&message()[..16 + 32 + 8 + 32], &tail].concat());
        if let Ok(read) = parse(&bytes) {
            let again = sign(read.roster().clone()).unwrap();
            prop_assert_eq!(again.bytes(), &bytes[..]);
        }
    }
}
