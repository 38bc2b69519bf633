//! One layer's rows to the nodes and back: who gets which rows, in one call per node.
//!
//! `send` splits the assignments of a layer by the routing table, builds and sends every call before anything is
//! waited for, and leaves those without a node to the router. `collect` adds the replies to the sums. A call that
//! fails, for whatever reason, is not repeated elsewhere here: its assignments are computed by `Home` with the
//! same bits. What a node reports as overflowed is computed by `Home` too, in i64.
//!
//! A row travels once per node, however many of its experts are there; a call carries at most
//! `CALL_PAYLOAD_BYTES_MAX` of rows, more rows make more calls on the prefill lane.

use std::sync::Arc;
use std::time::Instant;

use mesh_net::hub::{Hub, Lane};
use mesh_net::pending::{CallError, PendingCall};
use mesh_proto::routes::{NodeIndex, Routes};
use mesh_wire::call::{Assignment as WireAssignment, CallDraft, CallHead};
use mesh_wire::frame::BUDGET_US_MAX;
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::Row;
use model::decoder::workspace::Workspace;
use model::format::Format;
use model::home::{Home, HomeError};
use model::kernel::Assignment;

use crate::cost::{StepCost, lap};
use crate::metrics::{Metrics, NodeCall};

/// Rows up to which a call takes the decode lane: a prefill reply of megabytes must never be before a decode
/// reply in a stream, and 16 rows of a model 2048 wide are 64 KB, half a millisecond on a gigabit link.
const DECODE_LANE_ROWS: usize = 16;

/// Calls of one layer.
#[derive(Debug)]
pub struct Dispatch {
    hub: Option<Arc<Hub>>,
    format: Format,
    routes: Arc<Routes>,
    step: u64,
    calls: u64,
    metrics: Option<Arc<Metrics>>,
    names: Vec<String>,
    home: Vec<Assignment>,
    batches: Vec<Batch>,
    out: Vec<Outstanding>,
}

/// What one node gets in one call, while it is being gathered.
#[derive(Debug, Default)]
struct Batch {
    node: NodeIndex,
    /// Rows of the step, ascending; a call's row is an index into this.
    rows: Vec<u32>,
    /// Rows as in the step.
    assignments: Vec<Assignment>,
}

#[derive(Debug)]
struct Outstanding {
    node: NodeIndex,
    sent: Instant,
    sent_bytes: u64,
    pending: Option<PendingCall>,
    rows: Vec<u32>,
    assignments: Vec<Assignment>,
}

impl Dispatch {
    /// A dispatcher over `hub`; without one everything is the router's own.
    pub fn new(hub: Option<Arc<Hub>>, format: Format) -> Dispatch {
        let routes = Arc::new(Routes { epoch: 0, nodes: Vec::new() });
        Dispatch {
            hub,
            format,
            routes,
            step: 0,
            calls: 0,
            metrics: None,
            names: Vec::new(),
            home: Vec::new(),
            batches: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Counts calls in `metrics`, by the nodes' names.
    pub fn count_in(&mut self, metrics: Arc<Metrics>) {
        self.names = self.hub.iter().flat_map(|hub| hub.nodes()).map(|node| node.name).collect();
        self.metrics = Some(metrics);
    }

    /// Counts a step.
    pub fn begin_step(&mut self) {
        self.step += 1;
    }

    /// Assignments of the current layer that are the router's own.
    pub fn at_home(&self) -> &[Assignment] {
        &self.home
    }

    /// Sends the calls of a layer. `work` is as `Decoder::route` left it.
    pub fn send(&mut self, layer: usize, work: &Workspace, cost: &mut StepCost) {
        self.home.clear();
        self.out.clear();
        let Some(hub) = self.hub.clone() else {
            self.home.extend_from_slice(&work.assignments);
            return;
        };
        // Read for every layer: after a miss the rest of the step must not wait for the same node again.
        self.routes = hub.routes();
        self.gather(layer as u16, work);
        // The largest batch first: it takes longest, at equal nodes.
        self.batches.sort_by_key(|batch| std::cmp::Reverse(batch.assignments.len()));
        for batch in std::mem::take(&mut self.batches) {
            let (sent, before) = (Instant::now(), cost.bytes_out);
            let pending = self.call(&hub, (layer as u16, &batch), work, cost);
            let Batch { node, rows, assignments } = batch;
            let sent_bytes = cost.bytes_out - before;
            self.out.push(Outstanding { node, sent, sent_bytes, pending, rows, assignments });
        }
    }

    /// Splits the layer's assignments by node, in calls of at most the rows that fit in one.
    fn gather(&mut self, layer: u16, work: &Workspace) {
        let rows_max = CallHead::rows_max(row_format(self.format), hidden(work) as u32) as usize;
        self.batches.clear();
        for assignment in &work.assignments {
            let Some(node) = self.routes.node(layer, assignment.expert) else {
                self.home.push(*assignment);
                continue;
            };
            // The last batch of a node is the open one; rows come in ascending order.
            let open = self.batches.iter_mut().rev().find(|batch| batch.node == node);
            let fits =
                |batch: &Batch| batch.rows.last() == Some(&assignment.row) || batch.rows.len() < rows_max;
            let batch = match open.filter(|batch| fits(batch)) {
                Some(batch) => batch,
                None => {
                    self.batches.push(Batch { node, ..Batch::default() });
                    let last = self.batches.len() - 1;
                    &mut self.batches[last]
                }
            };
            if batch.rows.last() != Some(&assignment.row) {
                batch.rows.push(assignment.row);
            }
            batch.assignments.push(*assignment);
        }
    }

    /// Builds and sends one call; `None` if it cannot be sent.
    fn call(
        &mut self,
        hub: &Hub,
        (layer, batch): (u16, &Batch),
        work: &Workspace,
        cost: &mut StepCost,
    ) -> Option<PendingCall> {
        let mut local = 0;
        let assignments: Vec<WireAssignment> = batch
            .assignments
            .iter()
            .map(|assignment| {
                while batch.rows[local] != assignment.row {
                    local += 1;
                }
                WireAssignment::new(local as u32, assignment.expert, assignment.weight)
            })
            .collect();
        self.calls += 1;
        let budget = hub.budget(batch.node, assignments.len() as u32);
        let head = CallHead {
            call: self.calls,
            step: self.step,
            epoch: self.routes.epoch,
            budget_us: budget.as_micros().min(u128::from(BUDGET_US_MAX)) as u32,
            layer,
            format: row_format(self.format),
            hidden: hidden(work) as u32,
            rows: batch.rows.len() as u32,
        };
        let sent = CallDraft::new(hub.pool(), head, &assignments).and_then(|mut draft| {
            draft.copy_rows(batch.rows.iter().map(|row| work.input.row(*row as usize)))?;
            Ok(draft.finish())
        });
        match sent {
            Ok(call) => {
                let lane = if batch.rows.len() <= DECODE_LANE_ROWS { Lane::Decode } else { Lane::Prefill };
                cost.calls += 1;
                cost.bytes_out += call.frame_bytes() as u64;
                Some(hub.send(batch.node, lane, call))
            }
            Err(error) => {
                tracing::warn!(%error, layer, "a call cannot be built; its experts are computed here");
                None
            }
        }
    }

    /// Waits for the replies of `send` and adds them to `sums` (`[rows, hidden]`).
    pub fn collect(
        &mut self,
        layer: usize,
        work: &Workspace,
        (home, sums): (&mut Home, &mut [i64]),
        cost: &mut StepCost,
    ) -> Result<(), HomeError> {
        let mut clock = Instant::now();
        let hidden = hidden(work);
        for mut call in std::mem::take(&mut self.out) {
            let reply = call.pending.take().map(PendingCall::wait);
            lap(&mut clock, &mut cost.wait);
            match reply {
                Some(Ok(reply)) => {
                    cost.bytes_in += reply.frame_bytes() as u64;
                    self.count(&call, Ok(reply.frame_bytes() as u64));
                    let mut overflowed = Vec::new();
                    for (row, sent) in reply.view().rows().zip(&call.rows) {
                        let sums = &mut sums[*sent as usize * hidden..][..hidden];
                        match row {
                            Row::I16(part) => {
                                sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p))
                            }
                            Row::I32(part) => {
                                sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p))
                            }
                            Row::Overflow => overflowed.push(*sent),
                        }
                    }
                    call.assignments.retain(|assignment| overflowed.contains(&assignment.row));
                }
                failed => {
                    cost.fallbacks += 1;
                    if let Some(Err(error)) = failed {
                        self.count(&call, Err(&error));
                        tracing::info!(%error, layer, "a node did not answer; its experts are computed here");
                    }
                }
            }
            home.add(layer, work.input.view(), &call.assignments, sums)?;
            lap(&mut clock, &mut cost.combine);
        }
        Ok(())
    }
}

impl Dispatch {
    fn count(&self, call: &Outstanding, outcome: Result<u64, &CallError>) {
        let (Some(metrics), Some(name)) = (&self.metrics, self.names.get(usize::from(call.node))) else {
            return;
        };
        match outcome {
            Ok(received_bytes) => {
                let (sent_bytes, duration) = (call.sent_bytes, call.sent.elapsed());
                metrics.node_call(
                    name,
                    NodeCall { rows: call.rows.len(), sent_bytes, received_bytes, duration },
                );
            }
            Err(error) => {
                let reason = match error {
                    CallError::Gone => "gone",
                    CallError::Late => "late",
                    CallError::Refused { .. } => "refused",
                    CallError::Rejected { .. } => "rejected",
                    CallError::Full => "full",
                };
                metrics.node_failed(name, reason);
                metrics.fallback(call.rows.len());
            }
        }
    }
}

fn hidden(work: &Workspace) -> usize {
    work.input.view().inputs()
}

fn row_format(format: Format) -> RowFormat {
    if format.is_quantized() { RowFormat::Int8 } else { RowFormat::F32 }
}
