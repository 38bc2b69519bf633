//! Questions about weights and their answers: honest ones come out as they went in, all others are refused.

use super::*;
use crate::frame::{HEADER_BYTES, Header};
use crate::id::ExpertKey;

fn pool() -> Pool {
    Pool::new(16 << 20)
}

fn slice(layer: u16, expert: u16) -> Slice {
    Slice { key: ExpertKey { layer, expert }, from: 1, to: 4 }
}

fn catalogue() -> Catalogue {
    Catalogue {
        fingerprint: [5; 32],
        name: "köln-moe".into(),
        format: 2,
        hidden: 2048,
        inter: 768,
        experts: 128,
        layers: vec![(0, -9), (1, 3), (47, -100)],
    }
}

fn holders() -> Holders {
    let machine = |id, address: &str| Holder { id: NodeId([id; 32]), address: address.parse().unwrap() };
    let machines =
        vec![machine(1, "192.168.1.7:4433"), machine(2, "[fe80::1]:1"), machine(3, "10.0.0.1:65535")];
    Holders { machines, of: vec![vec![], vec![2], vec![0, 1, 2, 0]] }
}

fn all() -> Vec<Weights> {
    vec![
        Weights::AskCatalogue { port: 8621 },
        Weights::Catalogue(catalogue()),
        Weights::AskHashes(vec![slice(3, 1), slice(0, 511)]),
        Weights::Hashes(vec![[1; 32], [2; 32]]),
        Weights::AskHolders((0..ASKED_SLICES_MAX as u16).map(|expert| slice(9, expert)).collect()),
        Weights::Holders(holders()),
        Weights::Fetch(Fetch { slice: slice(60, 3), hash: [7; 32], from: u64::MAX }),
        Weights::Refused(Reason::Busy, "sixteen are being sent".into()),
    ]
}

/// The same frame with another body, as if it had come over the network.
fn received(op: Op, body: &[u8]) -> Buffer {
    let mut buffer = pool().take(Header::new(op, body.len()).unwrap()).unwrap();
    buffer.body_mut().copy_from_slice(body);
    buffer
}

fn chunk(from: u64, bytes: &[u8]) -> Result<Buffer, FrameError> {
    Chunk::write(&pool(), (from, bytes.len()), |out| {
        out.copy_from_slice(bytes);
        Ok(())
    })
}

#[test]
fn what_is_said_of_weights_comes_out_as_it_went_in() {
    for said in all() {
        let frame = said.encode(&pool()).unwrap();
        assert_eq!(Weights::decode(&received(frame.op(), frame.body())).unwrap(), said);
        assert!(Header::new(frame.op(), frame.body().len()).is_ok());
    }
    let named: Vec<_> = holders().holders_of(2).map(|holder| holder.address.port()).collect();
    assert_eq!(named, [4433, 1, 65535, 4433]);
    assert_eq!(holders().holders_of(7).count(), 0);
}

#[test]
fn a_chunk_comes_out_as_it_went_in_and_fits_a_quarter_of_a_mebibyte() {
    let bytes: Vec<u8> = (0..CHUNK_BYTES_MAX).map(|at| (at % 251) as u8).collect();
    let quarter = Pool::new(256 << 10);
    let frame = Chunk::write(&quarter, (11, bytes.len()), |out| {
        out.copy_from_slice(&bytes);
        Ok::<(), FrameError>(())
    });
    let frame = frame.unwrap();
    assert!(frame.frame().len() + HEADER_BYTES <= 256 << 10);
    let read = Chunk::parse(received(Op::Chunk, frame.body())).unwrap();
    assert_eq!((read.from(), read.bytes()), (11, &bytes[..]));
    assert_eq!(chunk(0, &[]).unwrap_err(), CHUNK);
    assert_eq!(chunk(0, &vec![0; CHUNK_BYTES_MAX + 1]).unwrap_err(), CHUNK);
    assert!(Chunk::parse(all()[0].encode(&pool()).unwrap()).is_err());
}

#[test]
fn frames_about_weights_that_are_cut_anywhere_are_refused() {
    for said in all().iter().filter(|said| !matches!(said, Weights::AskHolders(_))) {
        let frame = said.encode(&pool()).unwrap();
        for length in 0..frame.body().len() {
            let cut = received(frame.op(), &frame.body()[..length]);
            assert!(Weights::decode(&cut).is_err(), "{said:?} cut to {length}");
        }
    }
    let frame = chunk(3, &[9; 40]).unwrap();
    for length in 0..frame.body().len() {
        assert!(Chunk::parse(received(Op::Chunk, &frame.body()[..length])).is_err(), "cut to {length}");
    }
}

#[test]
fn flipped_bits_are_refused_or_keep_every_promise() {
    for said in all().into_iter().filter(|said| !matches!(said, Weights::AskHolders(_))) {
        let frame = said.encode(&pool()).unwrap();
        let mut body = received(frame.op(), frame.body());
        for bit in 0..frame.body().len() * 8 {
            body.body_mut()[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = Weights::decode(&body) {
                // What was accepted is within the limits of what may be sent.
                read.encode(&pool()).unwrap();
            }
            body.body_mut()[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn lists_beyond_their_limits_are_refused_by_both_sides() {
    let refused = |said: Weights| said.encode(&pool()).map(drop).unwrap_err();
    let many: Vec<_> = (0..=ASKED_SLICES_MAX as u16).map(|expert| slice(0, expert)).collect();
    for slices in [vec![], many, vec![Slice { to: 1, ..slice(0, 0) }]] {
        assert_eq!(refused(Weights::AskHashes(slices.clone())), SLICES);
        assert_eq!(refused(Weights::AskHolders(slices)), SLICES);
    }
    assert_eq!(refused(Weights::Hashes(vec![[0; 32]; ASKED_SLICES_MAX + 1])), HASHES);
    let layers = (0..=CATALOGUE_LAYERS_MAX as u16).map(|layer| (layer, 0)).collect();
    for layers in [layers, vec![(1, 0), (1, 0)], vec![(2, 0), (1, 0)]] {
        let wrong = Weights::Catalogue(Catalogue { layers, ..catalogue() });
        assert!(matches!(refused(wrong), FrameError::Weights(_)));
    }
    let mut without_port = holders();
    without_port.machines[0].address.set_port(0);
    let mut nobody = holders();
    nobody.of[1] = vec![3];
    let mut crowd = holders();
    crowd.of[0] = vec![0; HOLDERS_EACH_MAX + 1];
    for wrong in [without_port, nobody, crowd] {
        assert_eq!(refused(Weights::Holders(wrong)), HOLDERS);
    }
}

#[test]
fn catalogues_of_no_model_are_refused() {
    let sizes = [(0, 768, 128), (HIDDEN_MAX as u32 + 1, 768, 128), (2048, 0, 128), (2048, 768, 0)];
    for (hidden, inter, experts) in sizes {
        let said = Weights::Catalogue(Catalogue { hidden, inter, experts, ..catalogue() });
        let frame = said.encode(&pool()).unwrap();
        assert!(Weights::decode(&frame).is_err(), "{said:?}");
    }
}
