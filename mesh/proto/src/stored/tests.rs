//! Plans come back as they were, and nothing else is believed.

use super::*;
use crate::placement::plan;

fn facts() -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        moe_layers: vec![1, 4],
        experts: 6,
        expert_bytes: 60_000_000,
        blocks: 6,
        block_bytes: 10_000_000,
        top_k: 2,
        hidden: 64,
        ..ModelFacts::default()
    }
}

fn members(keys: &[u8]) -> Vec<Member> {
    keys.iter().map(|key| Member { id: NodeId([*key; 32]), name: format!("n{key}") }).collect()
}

fn stored() -> Stored {
    let machine =
        |mb_s| Machine { weight_mb_s: [mb_s; 5], link: LinkSpeed { round_trip_us: 200, mb_s: 117 } };
    let nodes: Vec<_> = [(0, 8000), (1, 4000), (2, 4000)]
        .map(|(node, mb_s)| Capacity { node, memory_bytes: 1 << 40, machine: machine(mb_s) })
        .to_vec();
    let wishes = Wishes { copies: Copies::Auto, slices: true, router_experts: 2, router: machine(9000) };
    Stored { epoch: 41, plan: plan(&facts(), &nodes, &wishes, None) }
}

#[test]
fn a_plan_comes_back_as_it_was() {
    let (facts, stored) = (facts(), stored());
    assert!(stored.plan.cuts > 1, "the test is about slices too");
    let text = stored.to_text(&facts, &members(&[1, 2, 3]));
    assert_eq!(Stored::parse(&text, &facts, &members(&[1, 2, 3])), Ok(stored.clone()));
    // With the roster in another order everyone keeps what is theirs.
    let again = Stored::parse(&text, &facts, &members(&[9, 3, 2, 1])).unwrap();
    for (then, now) in [(0, 3), (1, 2), (2, 1)] {
        assert_eq!(again.plan.experts(now), stored.plan.experts(then));
    }
    assert_eq!(again.plan.experts(0), []);
    // What a machine held that is gone is the router's.
    let less = Stored::parse(&text, &facts, &members(&[1, 3])).unwrap();
    assert_eq!(
        (less.plan.experts(0), less.plan.experts(1)),
        (stored.plan.experts(0), stored.plan.experts(2))
    );
    assert_eq!(less.plan.capacities.len(), 2);
}

#[test]
fn what_is_damaged_or_about_something_else_is_refused() {
    let facts = facts();
    let members = members(&[1, 2, 3]);
    let text = stored().to_text(&facts, &members);
    let parse = |text: &str| Stored::parse(text, &facts, &members).map(|_| ());
    assert_eq!(parse(""), Err(StoredError::Title));
    assert_eq!(parse(&text.replace("placement 1", "placement 2")), Err(StoredError::Title));
    let other = ModelFacts { fingerprint: [8; 32], ..facts.clone() };
    assert_eq!(Stored::parse(&text, &other, &members), Err(StoredError::Model));
    let lines: Vec<&str> = text.lines().collect();
    for line in 1..lines.len() {
        let without: Vec<_> = [&lines[..line], &lines[line + 1..]].concat();
        assert!(
            parse(&without.join("\n")).is_err() || lines[line].starts_with("node "),
            "without '{}'",
            lines[line]
        );
        assert!(parse(&lines[..line].join("\n")).is_err(), "cut off before line {line}");
        let mut wrong = lines.clone();
        wrong[line] = "3:0 3:1";
        assert!(parse(&wrong.join("\n")).is_err(), "line {line} replaced");
    }
    let read = |line| parts(line, 6, &[Some(4), None]).is_some();
    assert!(read("6:0") && read("2:r 6:0") && read("6:") && read("6:1"));
    for wrong in ["", "5:0", "7:0", "3:0", "3:0 3:1", "3:0 6:0", "6:0,0", "6:2", "6:x", "x:0", "6"] {
        assert!(!read(wrong), "{wrong}");
    }
    assert!(parse(&format!("{text}6:0\n")).is_err());
}
