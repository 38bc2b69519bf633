//! The file in which a router keeps its plan, so that after a restart its nodes keep their shards.
//!
//! Losing it costs a reload of experts and nothing else, so nothing about it is an error: what cannot be read is
//! ignored with a warning, what cannot be written is said. It is written beside itself, synced and renamed: after a
//! crash there is the old plan or the new one. Refuses to be written in another order than plans were made.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::stored::Stored;

use crate::disk;

/// Longest file that is read: every expert of the largest models cut into eight parts with four holders each is a
/// quarter of it.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The file.
#[derive(Debug)]
pub(crate) struct PlanFile {
    path: PathBuf,
    /// Epoch of what is in it.
    written: Mutex<u64>,
}

impl PlanFile {
    pub(crate) fn new(path: PathBuf) -> PlanFile {
        PlanFile { path, written: Mutex::new(0) }
    }

    /// What is in it, if that is a plan for this model.
    pub(crate) fn read(&self, facts: &ModelFacts, members: &[Member]) -> Option<Stored> {
        let path = self.path.display();
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%path, %error, "the last plan cannot be read; nodes may have to load anew");
                return None;
            }
        };
        let mut text = String::new();
        if let Err(error) = file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
            tracing::warn!(%path, %error, "the last plan cannot be read; nodes may have to load anew");
            return None;
        }
        match Stored::parse(&text, facts, members) {
            Ok(stored) => {
                *self.written.lock().unwrap_or_else(PoisonError::into_inner) = stored.epoch;
                Some(stored)
            }
            Err(error) => {
                tracing::warn!(%path, %error, "the last plan is ignored; nodes may have to load anew");
                None
            }
        }
    }

    /// Replaces what is in it, unless that is as new.
    pub(crate) fn write(&self, epoch: u64, text: &str) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch <= *written {
            return;
        }
        *written = epoch;
        if let Err(error) = disk::replace(&self.path, text.as_bytes()) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "the plan is not saved; after a restart nodes may have to load anew");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::placement::{Capacity, Wishes, plan};
    use mesh_wire::id::NodeId;

    #[test]
    fn the_newest_plan_is_read_back_and_nonsense_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("placement");
        let facts = ModelFacts { moe_layers: vec![0], experts: 4, expert_bytes: 10, ..ModelFacts::default() };
        let facts = ModelFacts { blocks: 1, top_k: 2, ..facts };
        let members = [Member { id: NodeId([1; 32]), name: "a".into() }];
        let node = Capacity { node: 0, memory_bytes: 100, machine: Default::default() };
        let stored = |epoch| Stored { epoch, plan: plan(&facts, &[node], &Wishes::default(), None) };
        let file = PlanFile::new(path.clone());
        assert_eq!(file.read(&facts, &members), None, "there is none yet");
        file.write(3, &stored(3).to_text(&facts, &members));
        file.write(2, &stored(2).to_text(&facts, &members));
        assert_eq!(PlanFile::new(path.clone()).read(&facts, &members), Some(stored(3)));
        std::fs::write(&path, [0xff; 20]).unwrap();
        assert_eq!(file.read(&facts, &members), None);
        std::fs::write(&path, "moemesh placement 1\nmodel x\n").unwrap();
        assert_eq!(file.read(&facts, &members), None);
        // A folder that is gone is said, and that is all.
        PlanFile::new(directory.path().join("no/placement")).write(1, "");
    }
}
