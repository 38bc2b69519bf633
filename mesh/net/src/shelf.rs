//! What a machine lends weights from, and who knows where more of them are.
//!
//! `lender` moves bytes and knows nothing of models or disks; these are the two things it asks. A shelf is read on
//! threads that may wait, a directory answers at once.

use std::net::SocketAddr;

use mesh_wire::frame::FrameError;
use mesh_wire::id::{NodeId, Slice};
use mesh_wire::weights::{Catalogue, Hash, Holders, Reason};

/// Why something is not lent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotLent {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub detail: String,
}

impl NotLent {
    /// With this text.
    pub fn new(reason: Reason, detail: impl Into<String>) -> NotLent {
        NotLent { reason, detail: detail.into() }
    }
}

impl From<FrameError> for NotLent {
    fn from(error: FrameError) -> NotLent {
        match error {
            FrameError::PoolExhausted(_) => NotLent::new(Reason::Busy, "too much is under way"),
            error => NotLent::new(Reason::Failed, error.to_string()),
        }
    }
}

/// One expert or slice, opened.
pub trait Blob: Send {
    /// Its length.
    fn bytes(&self) -> u64;

    /// Fills `out` with the bytes from `from` on, which are all within it.
    ///
    /// # Errors
    /// What the disk says.
    fn read(&mut self, from: u64, out: &mut [u8]) -> std::io::Result<()>;
}

/// The experts a machine can lend. Methods are called on threads that may wait.
pub trait Shelf: Send + Sync + std::fmt::Debug + 'static {
    /// The model; `None` where this is for another machine to say (a node's shelf).
    fn catalogue(&self) -> Option<Catalogue>;

    /// BLAKE3 of each of these, in their order.
    ///
    /// # Errors
    /// `NotLent`: there is no such expert, or this is for another machine to say.
    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, NotLent>;

    /// Opens one for reading. Whoever asked compares the hash of what it got, so the router may go by `slice` alone
    /// and a node by `hash` alone.
    ///
    /// # Errors
    /// `NotLent`.
    fn open(&self, slice: Slice, hash: Hash) -> Result<Box<dyn Blob>, NotLent>;
}

/// Who lends what, as the router knows it. Called on the network thread: every method returns at once.
pub(crate) trait Directory: Send + Sync + 'static {
    /// This machine lends what it has at this address; `None`: no longer.
    fn announce(&self, machine: NodeId, address: Option<SocketAddr>);

    /// Who else has these, as far as the machine at `asker` can reach them.
    fn holders(&self, asker: (NodeId, SocketAddr), slices: &[Slice]) -> Holders;

    /// So many bytes went to this machine.
    fn lent(&self, machine: NodeId, bytes: u64);
}
