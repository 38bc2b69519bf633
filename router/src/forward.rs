//! One step of the model over the mesh: the walk of a batch of rows through all layers.
//!
//! Per layer: attention, gate, one call per node with the rows it must process, the router's own work while the
//! calls are out (experts that no node holds, dense and shared blocks), then the replies are added up. The sum
//! over experts is an integer sum, so it does not matter who computed what or who answered first; an expert
//! whose node fails is computed here instead, and the step goes on with the same bits.

use std::sync::Arc;
use std::time::Instant;

use mesh_net::hub::Hub;
use model::decoder::workspace::Workspace;
use model::decoder::{DecodeError, Decoder, LoadError};
use model::format::Format;
use model::home::{Home, HomeError, Residency};
use model::kernel::Kernels;
use model::kernel::native::Native;
use model::kernel::native::attend::Run;
use model::kernel::native::kv::KvCache;
use model::open::Model;

use crate::cost::{StepCost, lap};
use crate::dispatch::Dispatch;
use crate::metrics::Metrics;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The router's own stages; `DecodeError::NotFinite` names the row whose request must end.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// An expert that no node answers for cannot be computed here either.
    #[error(transparent)]
    Home(#[from] HomeError),
}

/// The rows of one step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Tokens, those of `runs` in order.
    pub tokens: &'a [u32],
    /// Which sequences they belong to, and where.
    pub runs: &'a [Run<'a>],
    /// Rows whose logits are needed.
    pub wanted: &'a [usize],
}

/// The model as the router runs it.
#[derive(Debug)]
pub struct Forward {
    format: Format,
    decoder: Decoder,
    home: Home,
    kv: KvCache,
    work: Workspace,
    dispatch: Dispatch,
    sums: Vec<i64>,
}

impl Forward {
    /// Loads the router's weights; `kv_blocks` blocks of cache.
    pub fn load(
        model: Arc<Model>,
        kernels: Arc<dyn Kernels>,
        native: Arc<Native>,
        kv_blocks: usize,
        hub: Option<Arc<Hub>>,
    ) -> Result<Forward, LoadError> {
        let decoder = Decoder::load(&model, &*kernels, native)?;
        // With no mesh every expert is used all the time; with one, only those of a node that fails.
        let residency = if hub.is_some() { Residency::Mapped } else { Residency::Resident };
        Ok(Forward {
            format: model.format,
            kv: KvCache::new(&model.config, model.format, kv_blocks),
            work: Workspace::new(model.format),
            dispatch: Dispatch::new(hub, model.format),
            sums: Vec::new(),
            home: Home::new(model, kernels, residency),
            decoder,
        })
    }

    /// The router's part of the model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Loads every expert now, in a router without a mesh.
    pub fn preload(&mut self) -> Result<(), HomeError> {
        let (layers, experts): (Vec<_>, _) =
            (self.decoder.config().moe_layers().collect(), self.decoder.config().moe.experts as u16);
        layers.into_iter().try_for_each(|layer| self.home.load(layer, 0..experts))
    }

    /// Counts calls in `metrics`.
    pub fn count_in(&mut self, metrics: Arc<Metrics>) {
        self.dispatch.count_in(metrics);
    }

    /// Bytes of one block of KV cache.
    pub fn kv_block_bytes(&self) -> u64 {
        KvCache::block_bytes(self.decoder.config(), self.format) as u64
    }

    /// Bytes of experts the router has computed with itself so far.
    pub fn home_bytes(&self) -> u64 {
        self.home.weight_bytes()
    }

    /// Runs a step through the model: into `logits` the logits of its wanted rows, `[wanted.len(), vocab]`.
    pub fn step(
        &mut self,
        step: &Step<'_>,
        logits: &mut Vec<f32>,
        cost: &mut StepCost,
    ) -> Result<(), ForwardError> {
        let Step { tokens, runs, wanted } = *step;
        let Forward { decoder, home, kv, work, dispatch, sums, .. } = self;
        let mut clock = Instant::now();
        let positions = runs.iter().flat_map(|run| run.position..run.position + run.len);
        decoder.begin(tokens, positions, work);
        dispatch.begin_step();
        for layer in 0..decoder.config().layers.len() {
            decoder.attention(layer, runs, kv, work)?;
            lap(&mut clock, &mut cost.attention);
            decoder.route(layer, work)?;
            lap(&mut clock, &mut cost.gate);
            sums.clear();
            if decoder.is_moe(layer) {
                sums.resize(tokens.len() * decoder.config().hidden, 0);
                dispatch.send(layer, work, cost);
                lap(&mut clock, &mut cost.send);
                home.add(layer, work.input.view(), dispatch.at_home(), sums)?;
            }
            decoder.local_ffn(layer, work)?;
            lap(&mut clock, &mut cost.local);
            if decoder.is_moe(layer) {
                dispatch.collect(layer, work, (home, sums), cost)?;
                clock = Instant::now();
            }
            decoder.finish(layer, sums, work);
            lap(&mut clock, &mut cost.combine);
        }
        logits.clear();
        if !wanted.is_empty() {
            decoder.logits(wanted, work, logits)?;
        }
        lap(&mut clock, &mut cost.head);
        Ok(())
    }
}
