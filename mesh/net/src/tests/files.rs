//! Key files and rosters: what is right is read back as written, everything else is refused with a remedy.

use std::time::{Duration, Instant};

use mesh_wire::buffer::Pool;
use mesh_wire::id::NodeId;
use proptest::prelude::*;

use crate::identity::{Identity, IdentityError};
use crate::roster::{Machine, Roster, RosterError};
use crate::tls::key_of;

#[test]
fn a_key_file_is_made_once_and_read_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let made = Identity::load_or_create(&path).unwrap();
    let read = Identity::load_or_create(&path).unwrap();
    assert_eq!(made.id(), read.id());
    assert_eq!(made.reset_key(), read.reset_key());
    assert_eq!(key_of(&made.certificate()), Some(made.id()));
    assert!(matches!(Identity::create(&path), Err(IdentityError::File { .. })), "a key was overwritten");
    let other = Identity::generate().unwrap();
    assert!(other.id() != made.id() && other.reset_key() != made.reset_key());
    assert!(!format!("{made:?}").contains(&std::fs::read_to_string(&path).unwrap()[18..40]));
}

#[cfg(unix)]
#[test]
fn a_key_file_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    Identity::create(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    for mode in [0o644, 0o640, 0o604, 0o660, 0o610] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let error = Identity::load_or_create(&path).unwrap_err();
        assert!(matches!(error, IdentityError::Exposed { mode: found, .. } if found == mode));
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}

#[test]
fn key_files_with_other_content_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    Identity::create(&path).unwrap();
    let good = std::fs::read_to_string(&path).unwrap();
    let bad: [&[u8]; 6] = [
        b"",
        b"moemesh-ed25519-1",
        &good.as_bytes()[..80],
        b"\xff\xfe",
        &good.as_bytes()[18..],
        &[b'x'; 4096],
    ];
    for content in bad {
        std::fs::write(&path, content).unwrap();
        let error = Identity::load(&path).unwrap_err();
        assert!(matches!(error, IdentityError::Content { .. }), "{error}");
    }
    std::fs::write(&path, good.repeat(2)).unwrap();
    assert!(matches!(Identity::load(&path).unwrap_err(), IdentityError::Content { .. }));
    assert!(matches!(
        Identity::load(folder.path()).unwrap_err(),
        IdentityError::File { .. } | IdentityError::Exposed { .. }
    ));
}

/// The key of RFC 8032 section 7.1, test 1.
#[test]
fn keys_are_ed25519_as_the_rfc_has_it() {
    let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
    let key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let identity = Identity::from_seed(NodeId::from_hex(seed).unwrap().0).unwrap();
    assert_eq!(identity.id().to_hex(), key);
}

fn roster() -> Roster {
    let machine = |name: &str, byte| Machine { name: name.into(), key: NodeId([byte; 32]) };
    Roster {
        cluster: "home".into(),
        router: machine("attic", 1),
        nodes: vec![machine("küche", 2), machine("pi-4.local", 3)],
    }
}

#[test]
fn a_roster_is_read_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roster.toml");
    roster().save(&path).unwrap();
    assert_eq!(Roster::load(&path).unwrap(), roster());
    assert_eq!(roster().node_index(NodeId([3; 32])), Some(1));
    assert_eq!(roster().node_index(NodeId([1; 32])), None);
}

#[test]
fn rosters_that_are_ambiguous_are_refused() {
    let check = |change: fn(&mut Roster)| {
        let mut roster = roster();
        change(&mut roster);
        roster.to_toml().unwrap_err()
    };
    let duplicate = check(|roster| roster.nodes[1].name = "attic".into());
    assert!(matches!(duplicate, RosterError::DuplicateName(name) if name == "attic"));
    let duplicate = check(|roster| roster.nodes[1].key = roster.router.key);
    assert!(duplicate.to_string().contains("`attic` and `pi-4.local` have the same key"));
    assert!(matches!(check(|roster| roster.nodes[0].name = "a b".into()), RosterError::Name(_)));
    assert!(matches!(check(|roster| roster.cluster = String::new()), RosterError::Name(_)));
    assert!(matches!(check(|roster| roster.router.name = "x".repeat(64)), RosterError::Name(_)));
    let crowd = check(|roster| {
        let machine = |at: u16| Machine { name: format!("n{at}"), key: NodeId([at as u8; 32]) };
        roster.nodes = (0..257).map(machine).collect();
    });
    assert!(matches!(crowd, RosterError::TooMany(257)));
}

#[test]
fn rosters_that_do_not_parse_say_where() {
    let good = roster().to_toml().unwrap();
    for (from, to, part) in [
        ("0202", "02", "64 hexadecimal digits"),
        ("0202", "zz02", "64 hexadecimal digits"),
        ("cluster", "clutser", "clutser"),
        ("[router]", "[ruter]", "ruter"),
        ("[router]", "router = 1\n[other]", "router"),
        ("name = \"pi-4.local\"", "", "name"),
        ("[[nodes]]", "[[nodes]", "line"),
    ] {
        assert!(good.contains(from), "{good}");
        let error = Roster::parse(&good.replacen(from, to, 1)).unwrap_err();
        assert!(matches!(error, RosterError::Syntax(_)), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let missing = Roster::load(&folder.path().join("none.toml")).unwrap_err();
    assert!(missing.to_string().contains("none.toml"));
    let long = folder.path().join("long.toml");
    std::fs::write(&long, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(matches!(Roster::load(&long).unwrap_err(), RosterError::TooLong { .. }));
}

#[test]
fn pauses_grow_to_their_limit_and_differ_between_nodes() {
    let pause = crate::station::pause;
    let (one, other) = (NodeId([1; 32]), NodeId([2; 32]));
    for attempt in 0..40 {
        let length = pause(one, attempt);
        assert_eq!(length, pause(one, attempt));
        assert!(length >= Duration::from_millis(75) && length <= Duration::from_millis(3750), "{length:?}");
    }
    assert!((0..40).any(|attempt| pause(one, attempt) != pause(other, attempt)));
    assert!(pause(one, 39) >= Duration::from_millis(2250));
}

#[test]
fn a_sink_knows_when_its_answer_is_wanted() {
    use mesh_wire::control::Refusal;
    use mesh_wire::message::Message;
    let refusal = |frame| match Message::decode(&frame).unwrap() {
        Message::CallRefused(refused) => (refused.call, refused.refusal),
        other => panic!("{other:?}"),
    };
    let pool = Pool::new(1 << 20);
    let soon = Instant::now() + Duration::from_secs(60);
    let (sink, mut answer) = crate::station::sink(5, soon, &pool);
    assert!(sink.is_wanted());
    drop(sink);
    assert_eq!(refusal(answer.try_recv().unwrap()), (5, Refusal::Failed));
    let (sink, mut answer) = crate::station::sink(6, Instant::now(), &pool);
    assert!(!sink.is_wanted());
    drop(sink);
    assert_eq!(refusal(answer.try_recv().unwrap()), (6, Refusal::Expired));
    let (sink, answer) = crate::station::sink(7, soon, &pool);
    drop(answer);
    assert!(!sink.is_wanted());
    let (sink, mut answer) = crate::station::sink(8, soon, &pool);
    sink.complete(
        Message::Goodbye(mesh_wire::control::Goodbye { reason: String::new() }).encode(&pool).unwrap(),
    );
    assert_eq!(refusal(answer.try_recv().unwrap()), (8, Refusal::Failed));
}

proptest! {
    #[test]
    fn no_text_makes_the_roster_panic(text in "\\PC{0,200}") {
        drop(Roster::parse(&text));
    }

    #[test]
    fn no_file_makes_the_identity_panic(content in proptest::collection::vec(any::<u8>(), 0..300)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        Identity::create(&path).unwrap();
        std::fs::write(&path, content).unwrap();
        prop_assert!(Identity::load(&path).is_err());
    }
}
