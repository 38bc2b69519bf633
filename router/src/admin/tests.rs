//! Questions over a real socket to a real hub.

use std::os::unix::fs::PermissionsExt;

use mesh_net::authority::Authority;
use mesh_net::hub::HubConfig;
use mesh_net::token::Token;
use mesh_proto::facts::ModelFacts;
use mesh_wire::id::NodeId;

use super::*;

struct Served {
    hub: Arc<Hub>,
    state: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

fn served() -> Served {
    let state = tempfile::tempdir().unwrap();
    let authority = Arc::new(Authority::open(state.path()).unwrap());
    let config = HubConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        ..HubConfig::new(authority, ModelFacts { experts: 1, ..ModelFacts::default() })
    };
    let hub = Arc::new(Hub::start(config).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let admin = {
        let _entered = runtime.enter();
        Admin::bind(state.path()).unwrap()
    };
    runtime.spawn(admin.serve(Arc::clone(&hub)));
    Served { hub, state, _runtime: runtime }
}

#[test]
fn the_operator_gets_tokens_and_shuts_nodes_out() {
    let served = served();
    let state = served.state.path();
    let mode = std::fs::metadata(state.join(SOCKET)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let question = Question::Token { ttl_s: 60, addresses: vec![] };
    let Answer::Token { token, addresses, .. } = ask(state, &question).unwrap() else { panic!("no token") };
    assert_eq!(addresses, [served.hub.local_addr()]);
    assert_eq!(token.parse::<Token>().unwrap().addresses, addresses);
    let elsewhere = vec!["10.0.0.1:7".parse().unwrap()];
    let question = Question::Token { ttl_s: 60, addresses: elsewhere.clone() };
    let Answer::Token { addresses, .. } = ask(state, &question).unwrap() else { panic!("no token") };
    assert_eq!(addresses, elsewhere);
    served.hub.authority().admit("pi", NodeId([5; 32])).unwrap();
    let revoke = Question::Revoke { node: "pi".to_owned() };
    assert_eq!(ask(state, &revoke).unwrap(), Answer::Done { node: "pi".to_owned(), epoch: 3 });
    let again = ask(state, &revoke).unwrap_err().to_string();
    assert!(again.contains("no node is called `pi`"), "{again}");
    let pardon = Question::Pardon { node: "nobody".to_owned() };
    assert!(ask(state, &pardon).unwrap_err().to_string().contains("nobody"));
    let forever = Question::Token { ttl_s: u64::MAX, addresses: vec![] };
    assert!(ask(state, &forever).unwrap_err().to_string().contains("30 days"));
}

#[test]
fn nonsense_is_refused_and_bounded_and_others_are_served() {
    let served = served();
    let state = served.state.path();
    for line in ["", "{}", "x\n", "{\"do\":\"token\"}\n", "{\"do\":\"revoke\",\"node\":\"a\",\"more\":1}\n"] {
        let mut stream = UnixStream::connect(state.join(SOCKET)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("not a question"), "{line}: {text}");
    }
    // Longer than any question: it is answered without being read to its end.
    let mut stream = UnixStream::connect(state.join(SOCKET)).unwrap();
    let mut flooded = stream.try_clone().unwrap();
    let flood = std::thread::spawn(move || while flooded.write_all(&[b'x'; 4096]).is_ok() {});
    let mut text = [0; 16];
    stream.read_exact(&mut text).unwrap();
    assert!(text.starts_with(b"{\"error\""), "{text:?}");
    drop(stream.shutdown(std::net::Shutdown::Both));
    flood.join().unwrap();
    let _silent: Vec<_> =
        (1..QUESTIONS_MAX).map(|_| UnixStream::connect(state.join(SOCKET)).unwrap()).collect();
    assert!(ask(state, &Question::Token { ttl_s: 60, addresses: vec![] }).is_ok());
}

#[test]
fn a_router_that_is_not_there_is_said_to_be_so() {
    let state = tempfile::tempdir().unwrap();
    let question = Question::Token { ttl_s: 60, addresses: vec![] };
    let error = ask(state.path(), &question).unwrap_err().to_string();
    assert!(error.contains("no router runs") && error.contains("moemesh router --state"), "{error}");
    // One that was killed leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(state.path().join(SOCKET)).unwrap());
    assert!(matches!(ask(state.path(), &question).unwrap_err(), AdminError::NoRouter { .. }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    drop(Admin::bind(state.path()).unwrap());
    assert!(!state.path().join(SOCKET).exists());
    let long = state.path().join("x".repeat(200));
    std::fs::create_dir(&long).unwrap();
    assert!(Admin::bind(&long).unwrap_err().to_string().contains("--state"));
}
