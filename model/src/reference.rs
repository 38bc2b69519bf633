//! The whole model in one process: the yardstick of every other way of running it.
//!
//! The same stages as the router's, with every expert at home and one sequence. A cluster must reproduce its
//! logits bit for bit.

use std::sync::Arc;

use crate::decoder::workspace::Workspace;
use crate::decoder::{DecodeError, Decoder, LoadError};
use crate::home::{Home, HomeError, Residency};
use crate::kernel::Kernels;
use crate::kernel::native::Native;
use crate::kernel::native::attend::Run;
use crate::kernel::native::kv::{KV_BLOCK, KvCache};
use crate::open::Model;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The router's stages.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The experts.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The sequence is longer than the cache it was given.
    #[error("the sequence would be {needed} tokens long, its cache holds {capacity}")]
    Full {
        /// Tokens needed.
        needed: usize,
        /// Tokens there are.
        capacity: usize,
    },
}

/// Which rows of a step want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// A loaded model and one sequence.
#[derive(Debug)]
pub struct Reference {
    decoder: Decoder,
    home: Home,
    kv: KvCache,
    table: Vec<u32>,
    position: usize,
    work: Workspace,
    sums: Vec<i64>,
    logits: Vec<f32>,
}

impl Reference {
    /// Loads the model for sequences of up to `capacity` tokens.
    pub fn load(
        model: Arc<Model>,
        kernels: Arc<dyn Kernels>,
        native: Arc<Native>,
        capacity: usize,
    ) -> Result<Reference, LoadError> {
        let decoder = Decoder::load(&model, &*kernels, native)?;
        let blocks = capacity.div_ceil(KV_BLOCK);
        Ok(Reference {
            kv: KvCache::new(&model.config, model.format, blocks),
            table: (0..blocks as u32).collect(),
            position: 0,
            work: Workspace::new(model.format),
            sums: Vec::new(),
            logits: Vec::new(),
            home: Home::new(model, kernels, Residency::Resident),
            decoder,
        })
    }

    /// The router's part.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Loads every expert now instead of on first use, so that a measurement does not contain loading.
    pub fn preload(&mut self) -> Result<(), HomeError> {
        self.home.load_all(&mut |_, _| ())
    }

    /// Tokens of the sequence so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets the sequence (or all of it after `position`).
    pub fn rewind(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    /// Feeds tokens in one step and returns the wanted logits, `[1 or tokens.len(), vocab]`.
    pub fn feed(&mut self, tokens: &[u32], want: Want) -> Result<&[f32], ReferenceError> {
        let (needed, capacity) = (self.position + tokens.len(), self.table.len() * KV_BLOCK);
        if needed > capacity {
            return Err(ReferenceError::Full { needed, capacity });
        }
        let run = Run { first_row: 0, len: tokens.len(), position: self.position, table: &self.table };
        let decoder = &self.decoder;
        decoder.begin(tokens, self.position..needed, &mut self.work);
        for layer in 0..decoder.config().layers.len() {
            decoder.attention(layer, &[run], &mut self.kv, &mut self.work)?;
            decoder.route(layer, &mut self.work)?;
            self.sums.clear();
            if decoder.is_moe(layer) {
                self.sums.resize(tokens.len() * decoder.config().hidden, 0);
                self.home.add(layer, self.work.input.view(), &self.work.assignments, &mut self.sums)?;
            }
            decoder.local_ffn(layer, &mut self.work)?;
            decoder.finish(layer, &self.sums, &mut self.work);
        }
        self.position = needed;
        let rows: Vec<usize> = match want {
            Want::Last => vec![tokens.len() - 1],
            Want::All => (0..tokens.len()).collect(),
        };
        decoder.logits(&rows, &mut self.work, &mut self.logits)?;
        Ok(&self.logits)
    }
}
