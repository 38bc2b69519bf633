//! Files of a state folder: what is right is read back as written, everything else is refused with a remedy.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mesh_wire::buffer::Pool;
use mesh_wire::id::NodeId;
use proptest::prelude::*;

use crate::disk::{DiskError, FILE_BYTES_MAX, Folder};
use crate::identity::{self, Identity};
use crate::keys::{KeyError, SigningKey, verify};
use crate::tls::key_of;

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_state_folder_is_its_owners_and_one_process_has_it() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("a").join("b");
    let folder = Folder::open(&path).unwrap();
    assert_eq!(mode(&path), 0o700);
    let error = Folder::open(&path).unwrap_err();
    assert!(matches!(error, DiskError::InUse(_)) && error.to_string().contains("--state"), "{error}");
    drop(folder);
    drop(Folder::open(&path).unwrap());
    for open in [0o777, 0o720, 0o702] {
        set_mode(&path, open);
        let error = Folder::open(&path).unwrap_err();
        assert!(matches!(error, DiskError::Writable { mode, .. } if mode == open), "{error}");
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }
    // A file where a folder should be, as its parent or itself.
    let file = parent.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for path in [&file, &file.join("state")] {
        let error = Folder::open(path).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn a_file_is_written_whole_or_stays_as_it_was() {
    let parent = tempfile::tempdir().unwrap();
    let folder = Folder::open(parent.path()).unwrap();
    assert!(folder.read("x").unwrap().is_none());
    folder.write("x", b"one").unwrap();
    assert_eq!(mode(&folder.file("x")), 0o600);
    folder.write("x", b"two").unwrap();
    assert_eq!(folder.read("x").unwrap().unwrap(), b"two");
    // What an interrupted write leaves is no obstacle, whatever its mode.
    std::fs::write(folder.file("x.new"), "half").unwrap();
    folder.write("x", b"three").unwrap();
    assert!(!folder.file("x.new").exists());
    assert_eq!(mode(&folder.file("x")), 0o600);
    // A disk that takes nothing: the old content stays, and the message names the file.
    std::fs::create_dir(folder.file("x.new")).unwrap();
    let error = folder.write("x", b"four").unwrap_err();
    assert!(error.to_string().contains(&folder.file("x").display().to_string()), "{error}");
    assert_eq!(folder.read("x").unwrap().unwrap(), b"three");
    std::fs::write(folder.file("long"), vec![0; FILE_BYTES_MAX as usize + 1]).unwrap();
    set_mode(&folder.file("long"), 0o600);
    assert!(matches!(folder.read("long").unwrap_err(), DiskError::TooLong(_)));
    std::fs::create_dir(folder.file("folder")).unwrap();
    set_mode(&folder.file("folder"), 0o700);
    assert!(matches!(folder.read("folder").unwrap_err(), DiskError::Io { .. }));
}

#[test]
fn a_key_file_is_made_once_and_read_from_then_on() {
    let parent = tempfile::tempdir().unwrap();
    let folder = Folder::open(parent.path()).unwrap();
    let made = Identity::open(&folder).unwrap();
    let read = Identity::open(&folder).unwrap();
    assert_eq!(made.id(), read.id());
    assert_eq!(made.reset_key(), read.reset_key());
    assert_eq!(key_of(&made.certificate()), Some(made.id()));
    let other = Identity::generate().unwrap();
    assert!(other.id() != made.id() && other.reset_key() != made.reset_key());
    let text = std::fs::read_to_string(folder.file(identity::FILE)).unwrap();
    assert!(!format!("{made:?}").contains(&text[18..40]));
}

#[test]
fn a_key_file_others_can_read_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let folder = Folder::open(parent.path()).unwrap();
    Identity::open(&folder).unwrap();
    let path = folder.file(identity::FILE);
    assert_eq!(mode(&path), 0o600);
    for open in [0o644, 0o640, 0o604, 0o660, 0o610] {
        set_mode(&path, open);
        let error = Identity::open(&folder).unwrap_err();
        assert!(matches!(error, KeyError::Disk(DiskError::Exposed { mode, .. }) if mode == open), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}

#[test]
fn key_files_with_other_content_are_refused_and_never_replaced() {
    let parent = tempfile::tempdir().unwrap();
    let folder = Folder::open(parent.path()).unwrap();
    Identity::open(&folder).unwrap();
    let good = folder.read(identity::FILE).unwrap().unwrap();
    let cluster = [b"moemesh-cluster-ed25519-1", &good[17..]].concat();
    let bad: [&[u8]; 8] = [
        b"",
        b"moemesh-ed25519-1",
        &good[..80],
        b"\xff\xfe",
        &good[18..],
        &[b'x'; 4096],
        &good.repeat(2),
        // A cluster's key in the place of a machine's.
        &cluster,
    ];
    for content in bad {
        folder.write(identity::FILE, content).unwrap();
        let error = Identity::open(&folder).unwrap_err();
        assert!(matches!(error, KeyError::Content(_)), "{error}");
        assert_eq!(folder.read(identity::FILE).unwrap().unwrap(), content);
    }
}

/// The key of RFC 8032 section 7.1, test 1, and its signature of the empty message.
#[test]
fn keys_are_ed25519_as_the_rfc_has_it() {
    let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
    let key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let seed = NodeId::from_hex(seed).unwrap().0;
    assert_eq!(Identity::from_seed(seed).unwrap().id().to_hex(), key);
    let signing = SigningKey::from_seed(seed).unwrap();
    let signature = signing.sign(b"");
    assert_eq!(
        NodeId(signature[..32].try_into().unwrap()).to_hex(),
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    );
    assert!(verify(signing.public(), b"", &signature));
    assert!(!verify(signing.public(), b"x", &signature) && !verify(NodeId([1; 32]), b"", &signature));
    assert!(!verify(signing.public(), b"", &signature[..63]));
}

#[test]
fn pauses_grow_to_their_limit_and_differ_between_nodes() {
    use crate::station::{PAUSE_MAX, REFUSED_PAUSE_MAX};
    let pause = |id, attempt| crate::station::pause(id, attempt, PAUSE_MAX);
    let (one, other) = (NodeId([1; 32]), NodeId([2; 32]));
    for attempt in 0..40 {
        let length = pause(one, attempt);
        assert_eq!(length, pause(one, attempt));
        assert!(length >= Duration::from_millis(75) && length <= Duration::from_millis(3750), "{length:?}");
    }
    assert!((0..40).any(|attempt| pause(one, attempt) != pause(other, attempt)));
    assert!(pause(one, 39) >= Duration::from_millis(2250));
    let refused = crate::station::pause(one, 39, REFUSED_PAUSE_MAX);
    assert!((22..=38).contains(&refused.as_secs()), "{refused:?}");
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
    fn no_file_makes_the_identity_panic(content in proptest::collection::vec(any::<u8>(), 0..300)) {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::open(parent.path()).unwrap();
        folder.write(identity::FILE, &content).unwrap();
        prop_assert!(Identity::open(&folder).is_err());
    }
}
