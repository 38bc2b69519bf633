//! Seeds of what is said about weights.

use std::net::SocketAddr;

use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::frame::FrameError;
use mesh_wire::id::{ExpertKey, NodeId, Slice};
use mesh_wire::weights::{Catalogue, Chunk, Fetch, Holder, Holders, Reason, Weights};

use super::Seed;

pub(super) fn seeds() -> Vec<Seed> {
    let pool = Pool::new(8 << 20);
    let encode =
        |(name, said): (&'static str, Weights)| (name, said.encode(&pool).expect("it is within its limits"));
    let mut frames: Vec<(&str, Buffer)> = said().into_iter().map(encode).collect();
    let fill = |out: &mut [u8]| {
        out.fill(0xab);
        Ok::<(), FrameError>(())
    };
    frames.push(("chunk", Chunk::write(&pool, (1 << 40, 70), fill).expect("it is within its limits")));
    let mut seeds = Vec::new();
    for (name, frame) in &frames {
        let body = [&[frame.op() as u8][..], frame.body()].concat();
        // The last number of an archive is where something is: as far away as can be.
        if let Some(at) = body.len().checked_sub(8) {
            let mut far = body.clone();
            far[at..at + 4].fill(0xff);
            seeds.push(Seed::new("control", &format!("weights-{name}-far"), far));
        }
        seeds.push(Seed::new("control", &format!("weights-{name}"), body));
        seeds.push(Seed::new("frame", &format!("weights-{name}"), frame.frame()));
    }
    seeds
}

fn said() -> Vec<(&'static str, Weights)> {
    let slice = |layer, expert, from, to| Slice { key: ExpertKey { layer, expert }, from, to };
    let slices = vec![slice(0, 3, 0, 6), slice(1, 0, 2, 6), slice(1023, 7, 0, 1)];
    let catalogue = Catalogue {
        fingerprint: [7; 32],
        name: "m\u{f6}e".into(),
        format: 2,
        hidden: 64,
        inter: 320,
        experts: 3,
        layers: vec![(1, -12), (4, 3)],
    };
    let wide = Catalogue { format: 0, hidden: 33, inter: 262_144, experts: 128, ..catalogue.clone() };
    let at = |address: &str, key| {
        let address: SocketAddr = address.parse().expect("it is an address");
        Holder { id: NodeId([key; 32]), address }
    };
    let holders = Holders {
        machines: vec![at("10.0.0.1:8623", 1), at("[fd00::2]:1", 2)],
        of: vec![vec![0, 1], Vec::new(), vec![1]],
    };
    vec![
        ("ask-catalogue", Weights::AskCatalogue { port: 8623 }),
        ("catalogue", Weights::Catalogue(catalogue.clone())),
        ("catalogue-wide", Weights::Catalogue(wide)),
        ("catalogue-format", Weights::Catalogue(Catalogue { format: 9, ..catalogue.clone() })),
        ("catalogue-huge", Weights::Catalogue(Catalogue { inter: u32::MAX, experts: u16::MAX, ..catalogue })),
        ("ask-hashes", Weights::AskHashes(slices.clone())),
        ("hashes", Weights::Hashes(vec![[1; 32], [2; 32]])),
        ("ask-holders", Weights::AskHolders(slices.clone())),
        ("holders", Weights::Holders(holders)),
        ("fetch", Weights::Fetch(Fetch { slice: slices[1], hash: [9; 32], from: 1 << 33 })),
        ("refused", Weights::Refused(Reason::Busy, "as many experts as may be are being sent".into())),
    ]
}
