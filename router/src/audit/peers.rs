//! The nodes of the mesh as those whom a judge may ask.
//!
//! What is asked is a call like any other: of the same epoch, with a number out of the same sequence, on a lane that no
//! decode call waits behind. A node may guess by its size that it is an audit; lying there would only give away itself,
//! or whoever it lies with. An audit has time: it waits `PATIENCE` times what a call may take, so that being slow to
//! answer one is hardly ever held against a node that serves others meanwhile.

use std::sync::Arc;

use mesh_net::hub::{Hub, Lane};
use mesh_proto::routes::NodeIndex;
use mesh_wire::call::{Assignment, CallDraft, CallHead};
use mesh_wire::frame::BUDGET_US_MAX;
use mesh_wire::payload::RowFormat;

use super::judge::Others;
use super::sample::{Answer, Piece, Sample};

/// Times the budget of a call that an audit waits for its answer.
const PATIENCE: u32 = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Peers(pub(super) Arc<Hub>);

impl Others for Peers {
    fn can_be_asked(&self, sample: &Sample, node: NodeIndex) -> bool {
        sample.exact.get(usize::from(node)).copied().unwrap_or(false)
    }

    fn ask(&mut self, sample: &Sample, node: NodeIndex, pieces: &[Piece], number: usize) -> Option<Answer> {
        let Peers(hub) = self;
        let call = sample.numbers.clone().nth(number)?;
        let wire: Vec<Assignment> = pieces
            .iter()
            .map(|Piece { assignment, .. }| {
                Assignment::new(assignment.row, assignment.expert, assignment.weight)
            })
            .collect();
        let budget = hub.budget(node, wire.len() as u32).total.saturating_mul(PATIENCE);
        let head = CallHead {
            call,
            step: sample.step,
            epoch: sample.routes.epoch,
            budget_us: budget.as_micros().min(u128::from(BUDGET_US_MAX)) as u32,
            layer: sample.layer,
            format: if sample.format().is_quantized() { RowFormat::Int8 } else { RowFormat::F32 },
            hidden: sample.hidden() as u32,
            rows: sample.row_count() as u32,
        };
        let mut draft = CallDraft::new(hub.pool(), head, &wire).ok()?;
        draft.copy_rows(sample.row_bytes()).ok()?;
        let reply = hub.send(node, Lane::Prefill, draft.finish()).wait().ok()?;
        let all: Vec<usize> = (0..sample.row_count()).collect();
        Some(Answer::of(&reply.view(), &all))
    }
}
