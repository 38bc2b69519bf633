//! What decides who belongs to a cluster: rosters, join tokens, the exchange of joining, the list of tokens.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use mesh_net::authority::Authority;
use mesh_net::identity::Identity;
use mesh_net::join::{STATEMENT_BYTES, answer, check_statement, decide, read_answer, request, statement};
use mesh_net::keys::SigningKey;
use mesh_net::membership::{Admission, Membership};
use mesh_net::roster::{Machine, NODES_MAX, REVOKED_MAX, ROSTER_BYTES_MAX, Roster, SignedRoster, check_name};
use mesh_net::tickets::{OUTSTANDING_MAX, Refused, Tickets};
use mesh_net::token::{ADDRESSES_MAX, Token};
use mesh_wire::id::NodeId;

use super::{Verdict, says_why};

/// Keying material of the connection that all exchanges here take place on.
pub(super) const EXPORTED: [u8; 32] = [5; 32];

/// Bytes of a signed roster before its epoch: tag and cluster.
pub(super) const ROSTER_HEAD_BYTES: usize = 16 + 32;

/// The cluster of all rosters here.
pub(super) fn cluster() -> SigningKey {
    SigningKey::from_seed([1; 32]).expect("every seed is a key")
}

/// A roster with everything in it.
pub(super) fn roster_with(nodes: &[(&str, u8)], revoked: &[(&str, u8)]) -> SignedRoster {
    let machines = |list: &[(&str, u8)]| {
        list.iter().map(|(name, key)| Machine::node(name, NodeId([*key; 32]))).collect()
    };
    let (nodes, revoked) = (machines(nodes), machines(revoked));
    let roster = Roster { cluster: cluster().public(), epoch: 7, router: NodeId([1; 32]), nodes, revoked };
    SignedRoster::sign(roster, &cluster()).expect("it is unambiguous")
}

/// First byte even: the bytes of a signed roster. Odd: what comes behind tag and cluster; it is signed before it is read.
pub(super) fn roster(bytes: &[u8]) -> Verdict {
    let Some((mode, rest)) = bytes.split_first() else { return Verdict::Refused };
    let key = cluster();
    let signed = if mode % 2 == 0 {
        rest.to_vec()
    } else {
        let message = [&roster_with(&[], &[]).bytes()[..ROSTER_HEAD_BYTES], rest].concat();
        let signature = key.sign(&message);
        [&message[..], &signature].concat()
    };
    let read = match SignedRoster::parse(&signed, key.public()) {
        Ok(read) => read,
        Err(error) => return says_why(&error),
    };
    let roster = read.roster();
    assert!(signed.len() <= ROSTER_BYTES_MAX);
    assert!(roster.nodes.len() <= NODES_MAX && roster.revoked.len() <= REVOKED_MAX);
    assert!((1..u64::MAX).contains(&roster.epoch));
    assert!(roster.nodes.iter().chain(&roster.revoked).all(|machine| check_name(&machine.name).is_ok()));
    let again = SignedRoster::sign(roster.clone(), &key).expect("what is believed can be signed");
    assert_eq!(again.bytes(), signed, "one roster has one form");
    hears(&read);
    Verdict::Taken
}

/// A node believes a roster of its cluster, again, and nothing older than it.
fn hears(roster: &SignedRoster) {
    static IDENTITY: OnceLock<Identity> = OnceLock::new();
    let identity = IDENTITY.get_or_init(|| Identity::from_seed([2; 32]).expect("every seed is an identity"));
    let admission = Admission {
        cluster: roster.roster().cluster,
        router: roster.roster().router,
        name: "a".into(),
        addresses: Vec::new(),
    };
    let membership = Membership::in_memory(identity.clone(), admission);
    let shown = |term: u64| [&term.to_le_bytes()[..], &[0; 8], roster.bytes()].concat();
    membership.hear(&shown(2)).expect("it is the cluster's");
    membership.hear(&shown(2)).expect("it was believed before");
    says_why(&membership.hear(&shown(1)).expect_err("an earlier start of the router"));
    assert_eq!(membership.epoch(), roster.roster().epoch);
}

/// First byte odd: the content of a token, to which checksum and spelling are added. Even: the text of one.
pub(super) fn token(bytes: &[u8]) -> Verdict {
    let Some((mode, rest)) = bytes.split_first() else { return Verdict::Refused };
    let text = if mode % 2 == 1 {
        token_text(rest)
    } else {
        let Ok(text) = std::str::from_utf8(rest) else { return Verdict::Refused };
        text.to_owned()
    };
    let token: Token = match text.parse() {
        Ok(token) => token,
        Err(error) => return says_why(&error),
    };
    let letters = text.chars().filter(|letter| !letter.is_whitespace());
    let written: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
    assert_eq!(token.to_string(), written, "one token has one text");
    assert!((1..=ADDRESSES_MAX).contains(&token.addresses.len()));
    assert_eq!(written.parse(), Ok(token));
    Verdict::Taken
}

/// The text of a token with this content (`mesh_net::token` says which): checksum behind it, in base 32.
pub(super) fn token_text(content: &[u8]) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let checked = [content, &blake3::hash(content).as_bytes()[..4]].concat();
    let bit = |at: usize| checked.get(at / 8).map_or(0, |byte| byte >> (7 - at % 8) & 1);
    let digit = |first: usize| (first..first + 5).fold(0, |digit, at| digit << 1 | bit(at));
    let digits = (0..checked.len() * 8).step_by(5).map(|first| char::from(DIGITS[usize::from(digit(first))]));
    format!("moemesh1.{}", digits.collect::<String>())
}

/// The file of tokens that are out.
pub(super) fn tickets(bytes: &[u8]) -> Verdict {
    let Some(tickets) = Tickets::parse(bytes) else { return Verdict::Refused };
    let text = tickets.to_text();
    assert_eq!(Tickets::parse(text.as_bytes()).as_ref(), Some(&tickets));
    assert!(text.lines().count() <= 1 + 2 * OUTSTANDING_MAX, "{} lines", text.lines().count());
    let digits = |word: &str| word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let keys = std::str::from_utf8(bytes).unwrap_or_default().lines().skip(1);
    assert!(keys.filter_map(|line| line.split(' ').next()).all(digits), "a key is hexadecimal digits");
    Verdict::Taken
}

/// A router, a machine that wants to join, and its token.
struct Exchange {
    authority: Authority,
    joiner: Identity,
    token: Token,
}

impl Exchange {
    fn new() -> Exchange {
        let authority = Authority::in_memory().expect("keys can be made");
        let address = SocketAddr::from(([127, 0, 0, 1], 8621));
        let token = authority.issue(Duration::from_secs(3600), vec![address]).expect("one is out at most");
        Exchange { authority, joiner: joiner(), token }
    }

    fn request(&self, role: u8, name: &str) -> Vec<u8> {
        request(&self.joiner, (&self.token, role, name), &EXPORTED).expect("every token has a key")
    }

    fn decide(&self, request: &[u8]) -> Result<Machine, Refused> {
        decide(&self.authority, request, &EXPORTED, self.joiner.id())
    }
}

fn joiner() -> Identity {
    static JOINER: OnceLock<Identity> = OnceLock::new();
    JOINER.get_or_init(|| Identity::from_seed([3; 32]).expect("every seed is an identity")).clone()
}

/// One of three messages, by the first byte: the router's statement or a machine's request, each genuine with edits (see
/// `edited`), a request that is signed for whatever role and name the bytes give, and an answer.
pub(super) fn join(bytes: &[u8]) -> Verdict {
    let Some((mode, rest)) = bytes.split_first() else { return Verdict::Refused };
    match mode % 4 {
        0 => statement_with_edits(rest),
        1 => request_with_edits(rest),
        2 => signed_request(rest),
        _ => answered(rest),
    }
}

/// Whether anything was changed, and the changed message: its new length (two bytes; none or beyond its end: as it was),
/// then triples of a place and what is flipped there.
fn edited(message: &[u8], edits: &[u8]) -> (bool, Vec<u8>) {
    let mut changed = message.to_vec();
    let (length, edits) = edits.split_at(edits.len().min(2));
    if let [low, high] = *length {
        changed.truncate(u16::from_le_bytes([low, high]).into());
    }
    let (triples, _) = edits.as_chunks::<3>();
    for [low, high, flipped] in triples {
        let at = usize::from(u16::from_le_bytes([*low, *high]));
        if let Some(byte) = changed.get_mut(at) {
            *byte ^= flipped;
        }
    }
    (changed != message, changed)
}

fn statement_with_edits(edits: &[u8]) -> Verdict {
    let exchange = Exchange::new();
    let router = exchange.authority.identity().id();
    let (is_changed, stated) = edited(&statement(&exchange.authority), edits);
    let Ok(stated) = <[u8; STATEMENT_BYTES]>::try_from(stated) else { return Verdict::Refused };
    match check_statement(&stated, &exchange.token, Some(router)) {
        Ok(found) => {
            assert!(!is_changed, "a changed statement is believed");
            assert_eq!(found, (exchange.authority.cluster(), router));
            says_why(&check_statement(&stated, &exchange.token, Some(joiner().id())).expect_err("passed on"));
            Verdict::Taken
        }
        Err(what) => {
            assert!(is_changed, "a genuine statement is refused: {what}");
            says_why(&what)
        }
    }
}

fn request_with_edits(edits: &[u8]) -> Verdict {
    let exchange = Exchange::new();
    let (is_changed, asked) = edited(&exchange.request(1, "pi-4.local"), edits);
    match exchange.decide(&asked) {
        Ok(machine) => {
            assert!(!is_changed, "a changed request is granted");
            assert_eq!(exchange.decide(&asked), Ok(machine), "asked again the answer is the same");
            Verdict::Taken
        }
        Err(refused) => {
            assert!(is_changed, "a genuine request is refused: {refused}");
            assert!(exchange.authority.roster().roster().nodes.is_empty(), "refused and let in");
            says_why(&refused)
        }
    }
}

fn signed_request(rest: &[u8]) -> Verdict {
    let Some((role, name)) = rest.split_first() else { return Verdict::Refused };
    let Ok(name) = std::str::from_utf8(name) else { return Verdict::Refused };
    let exchange = Exchange::new();
    let decided = exchange.decide(&exchange.request(*role, name));
    let heard = read_answer(&answer(&decided));
    match decided {
        Ok(machine) => {
            assert!(*role == 1 && check_name(name).is_ok(), "role {role} as {name:?}");
            assert_eq!((machine.key, heard.as_deref()), (joiner().id(), Ok(machine.name.as_str())));
            assert_eq!(exchange.authority.roster().roster().nodes, [machine]);
            Verdict::Taken
        }
        Err(refused) => {
            assert_eq!(heard, Err(refused));
            assert!(exchange.authority.roster().roster().nodes.is_empty(), "refused and let in");
            says_why(&refused)
        }
    }
}

fn answered(bytes: &[u8]) -> Verdict {
    match read_answer(bytes) {
        Ok(name) => {
            check_name(&name).expect("a name that was given is one");
            Verdict::Taken
        }
        Err(refused) => says_why(&refused),
    }
}
