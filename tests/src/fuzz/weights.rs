//! What is said about weights: which model, hashes, holders, pieces; and what a node makes of the model it is told of.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use expert_node::fetch::{Chunks, Supply};
use expert_node::remote::Remote;
use expert_node::shard::Source;
use expert_node::store::Store;
use mesh_net::borrower::BorrowError;
use mesh_net::exchange::Origin;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::frame::{
    ASKED_SLICES_MAX, CATALOGUE_LAYERS_MAX, CHUNK_BYTES_MAX, FrameError, NAMED_HOLDERS_MAX, Op,
};
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::weights::{Catalogue, Chunk, Fetch, HOLDERS_EACH_MAX, Hash, Holders, Weights};

use super::files::folder;
use super::says_why;

/// Layers of a catalogue that are looked at one by one.
const LAYERS_MAX: usize = 8;

/// Checks the promises of a frame of weights.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(buffer: Buffer, pool: &Pool) -> Result<(), FrameError> {
    if buffer.op() == Op::Chunk {
        return chunk(Chunk::parse(buffer)?, pool);
    }
    let op = buffer.op();
    let read = Weights::decode(&buffer)?;
    drop(buffer);
    let encoded = read.encode(pool).expect("what was read can be written");
    assert_eq!(encoded.op(), op, "{read:?}");
    assert_eq!(Weights::decode(&encoded), Ok(read.clone()), "out of its encoder another one came");
    match read {
        Weights::Catalogue(catalogue) => is_a_model(&catalogue),
        Weights::Holders(holders) => keeps_promises_of_holders(&holders),
        Weights::AskHashes(slices) | Weights::AskHolders(slices) => {
            assert!((1..=ASKED_SLICES_MAX).contains(&slices.len()));
            assert!(slices.iter().all(|slice| slice.from < slice.to));
        }
        Weights::Hashes(hashes) => assert!(hashes.len() <= ASKED_SLICES_MAX),
        Weights::Fetch(fetch) => assert!(fetch.slice.from < fetch.slice.to),
        Weights::AskCatalogue { .. } | Weights::Refused(..) => {}
    }
    Ok(())
}

fn chunk(chunk: Chunk, pool: &Pool) -> Result<(), FrameError> {
    let (from, len) = (chunk.from(), chunk.bytes().len());
    assert!((1..=CHUNK_BYTES_MAX).contains(&len), "{len} bytes");
    let fill = |out: &mut [u8]| {
        out.copy_from_slice(chunk.bytes());
        Ok::<(), FrameError>(())
    };
    let again = Chunk::parse(Chunk::write(pool, (from, len), fill)?).expect("it was a chunk");
    assert_eq!((again.from(), again.bytes()), (from, chunk.bytes()));
    Ok(())
}

fn keeps_promises_of_holders(holders: &Holders) {
    assert!(holders.machines.len() <= NAMED_HOLDERS_MAX && holders.of.len() <= ASKED_SLICES_MAX);
    for (position, named) in holders.of.iter().enumerate() {
        let found = holders.holders_of(position).collect::<Vec<_>>();
        assert_eq!(found.len(), named.len(), "a holder that is nobody");
        assert!(found.len() <= HOLDERS_EACH_MAX && found.iter().all(|holder| holder.address.port() != 0));
    }
    assert_eq!(holders.holders_of(holders.of.len()).count(), 0);
}

/// A network that is gone.
#[derive(Debug)]
struct Gone;

fn gone<T>() -> Result<T, BorrowError> {
    Err(BorrowError::Gone("the network is gone".to_owned()))
}

impl Supply for Gone {
    fn hashes(&self, _: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
        gone()
    }

    fn holders(&self, _: &[Slice]) -> Result<Holders, BorrowError> {
        gone()
    }

    fn order(&self, _: Origin, _: Fetch, _: u64) -> Result<Box<dyn Chunks>, BorrowError> {
        gone()
    }

    fn pause(&self, _: Duration) {}

    fn rest(&self) {}
}

/// What a node does with a catalogue: a model of bounded size, whose parts are parts of it; or a refusal.
fn is_a_model(catalogue: &Catalogue) {
    thread_local! {
        static STORE: Arc<Store> = Arc::new(opened());
    }
    assert!(catalogue.layers.len() <= CATALOGUE_LAYERS_MAX);
    assert!(catalogue.layers.is_sorted_by(|a, b| a.0 < b.0));
    let remote = match Remote::new(catalogue.clone(), Arc::new(Gone), STORE.with(Arc::clone)) {
        Ok(remote) => remote,
        Err(error) => {
            says_why(&error);
            return;
        }
    };
    let shape = remote.shape();
    assert!(shape.expert_bytes > 0);
    let blocks = model::format::blocks(shape.inter) as u16;
    for (layer, step_log2) in catalogue.layers.iter().take(LAYERS_MAX) {
        let slice =
            |from, to| Slice { key: ExpertKey { layer: *layer, expert: catalogue.experts - 1 }, from, to };
        assert_eq!(shape.width(&slice(0, blocks)), Some(shape.inter));
        let first = shape.width(&slice(0, 1)).expect("an expert has a block");
        let rest = shape.width(&slice(1, blocks)).unwrap_or(0);
        assert_eq!(first + rest, shape.inter);
        assert!(shape.bytes(first) <= shape.expert_bytes);
        assert_eq!(shape.width(&slice(0, blocks + 1)), None);
        assert_eq!(remote.step_log2(*layer), *step_log2);
        let ending = AtomicBool::new(false);
        says_why(&remote.prepare(&[slice(0, blocks)], &[slice(0, 1)], &ending).expect_err("nobody is there"));
        says_why(&remote.read(slice(0, 1), &mut [0]).expect_err("nobody is there"));
    }
    let beyond = Slice { key: ExpertKey { layer: 0, expert: catalogue.experts }, from: 0, to: 1 };
    assert_eq!(shape.width(&beyond), None);
    assert_eq!(remote.fetching(), None);
}

fn opened() -> Store {
    Store::open(&folder("catalogue"), Some(0)).expect("the folder is ours")
}
