//! One layer's rows to the nodes and back: who gets which rows, in one call per node.
//!
//! `send` divides the assignments of a layer (`share`) over the router and the nodes that the routing table names,
//! builds and sends every call before anything is waited for, the one that is expected to take longest first, and
//! leaves the rest to the router. `collect` adds the replies to the sums. A call that fails, for whatever reason, is
//! not repeated elsewhere here: its assignments are computed by `Home` with the same bits. What a node reports as
//! overflowed is computed by `Home` too, in i64.
//!
//! A row travels once per node, however many of its experts are there; a call carries at most
//! `CALL_PAYLOAD_BYTES_MAX` of rows, more rows make more calls on the prefill lane. What is out for one part of a
//! step is a `Flight`, so that several parts can be under way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_net::hub::{Hub, Lane};
use mesh_net::pending::{CallError, PendingCall};
use mesh_proto::routes::{NodeIndex, Routes};
use mesh_wire::call::{Assignment as WireAssignment, CallDraft, CallHead};
use mesh_wire::frame::BUDGET_US_MAX;
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::{Reply, Row};
use model::decoder::workspace::Workspace;
use model::format::Format;
use model::home::{Home, HomeError};
use model::kernel::Assignment;
use model::kernel::measure::ROWS;

use crate::cost::{StepCost, lap};
use crate::metrics::{Metrics, NodeCall};
use crate::share::{self, Curve, Learned, Mode, Place, PlaceIndex, Predicted, ROUTER, Share, node_place};

/// Rows up to which a call takes the decode lane: a prefill reply of megabytes must never be before a decode
/// reply in a stream, and 16 rows of a model 2048 wide are 64 KB, half a millisecond on a gigabit link.
const DECODE_LANE_ROWS: usize = 16;

/// MB/s assumed of a place that has measured nothing, at every count of rows: any number does, what calls take
/// corrects it.
const UNMEASURED_MB_S: u32 = 10_000;

/// What other threads may see of the places: the router first, then the nodes in the order of the roster.
#[derive(Clone, Debug, Default)]
pub struct PlacesView(Arc<Mutex<Vec<Place>>>);

impl PlacesView {
    /// As of the last step.
    pub fn read(&self) -> Vec<Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write(&self, places: &[Place]) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clear();
        seen.extend_from_slice(places);
    }
}

/// The model, as far as calls care.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Format of the weights.
    pub format: Format,
    /// Bytes of one expert.
    pub expert_bytes: u64,
}

/// The division of layers, and how calls are made.
#[derive(Debug)]
pub struct Dispatch {
    hub: Option<Arc<Hub>>,
    shape: Shape,
    /// Whether the router holds every expert, too.
    replicated: bool,
    routes: Arc<Routes>,
    /// Whether `routes` names any node.
    served: bool,
    /// The router, then the nodes.
    places: Vec<Place>,
    view: PlacesView,
    share: Share,
    step: u64,
    calls: u64,
    metrics: Option<Arc<Metrics>>,
    names: Vec<String>,
    /// Batch that a place's next row may join, by place, while gathering.
    open: Vec<Option<usize>>,
    batches: Vec<Batch>,
    spare: Vec<Batch>,
    wire: Vec<WireAssignment>,
    overflowed: Vec<u32>,
}

/// What one node gets in one call.
#[derive(Debug, Default)]
struct Batch {
    node: NodeIndex,
    /// Rows of the part, ascending; a call's row is an index into this.
    rows: Vec<u32>,
    /// Rows as in the part.
    assignments: Vec<Assignment>,
}

#[derive(Debug)]
struct Outstanding {
    batch: Batch,
    sent: Instant,
    sent_bytes: u64,
    pending: Option<PendingCall>,
    /// What its node's table says; none where the node got more than one call of this layer.
    predicted: Option<Predicted>,
}

/// What is under way of one layer of one part of a step. Dropping or clearing it cancels its calls.
#[derive(Debug, Default)]
pub struct Flight {
    home: Vec<Assignment>,
    predicted: Predicted,
    overlapped: bool,
    out: Vec<Outstanding>,
}

impl Flight {
    /// Assignments of the current layer that are the router's own.
    pub fn at_home(&self) -> &[Assignment] {
        &self.home
    }

    /// Forgets everything; calls that are out are cancelled.
    pub fn clear(&mut self) {
        self.home.clear();
        self.out.clear();
    }
}

/// What the router does beside experts while a layer's calls are out.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    /// How long.
    pub time: Duration,
    /// Whether it turns to another part of the step before it waits for these calls.
    pub overlapped: bool,
}

impl Dispatch {
    /// A dispatcher over `hub`; without one everything is the router's own. `replicated`: the router holds every
    /// expert, and its share of those that nodes hold is chosen layer by layer.
    pub fn new(hub: Option<Arc<Hub>>, shape: Shape, replicated: bool) -> Dispatch {
        let mut dispatch = Dispatch {
            hub,
            shape,
            replicated,
            routes: Arc::new(Routes::default()),
            served: false,
            places: Vec::new(),
            view: PlacesView::default(),
            share: Share::default(),
            step: 0,
            calls: 0,
            metrics: None,
            names: Vec::new(),
            open: Vec::new(),
            batches: Vec::new(),
            spare: Vec::new(),
            wire: Vec::new(),
            overflowed: Vec::new(),
        };
        dispatch.places.push(dispatch.place(&[0; ROWS.len()]));
        dispatch
    }

    /// Says what the router itself measured (`Home::weight_mb_s`).
    pub fn set_own_speed(&mut self, weight_mb_s: &[u32; ROWS.len()]) {
        self.places[usize::from(ROUTER)] = self.place(weight_mb_s);
    }

    /// Counts calls in `metrics`, by the nodes' names.
    pub fn count_in(&mut self, metrics: Arc<Metrics>) {
        self.names = self.hub.iter().flat_map(|hub| hub.nodes()).map(|node| node.name).collect();
        self.metrics = Some(metrics);
    }

    /// What is known of the places, readable from other threads.
    pub fn view(&self) -> PlacesView {
        self.view.clone()
    }

    /// Counts a step.
    pub fn begin_step(&mut self) {
        self.step += 1;
        self.refresh();
        self.view.write(&self.places);
    }

    /// Whether any node serves experts.
    pub fn is_served(&self) -> bool {
        self.served
    }

    fn place(&self, weight_mb_s: &[u32; ROWS.len()]) -> Place {
        let assumed = [UNMEASURED_MB_S; ROWS.len()];
        let bytes = self.shape.expert_bytes.max(1);
        let curve = Curve::new(weight_mb_s, bytes).or_else(|| Curve::new(&assumed, bytes));
        Place { weight_mb_s: *weight_mb_s, curve: curve.unwrap_or(Curve::EVEN), learned: Learned::default() }
    }

    /// Reads the routes, and with new ones the nodes' tables. Called for every layer: after a miss the rest of the
    /// step must not wait for the same node again.
    fn refresh(&mut self) {
        let Some(hub) = &self.hub else { return };
        let routes = hub.routes();
        if Arc::ptr_eq(&routes, &self.routes) {
            return;
        }
        self.served = routes.table.all().any(|(_, part)| !part.holders.is_empty());
        self.routes = routes;
        let tables: Vec<_> = hub.nodes().into_iter().map(|node| node.cluster.hello).collect();
        for (index, hello) in tables.into_iter().enumerate() {
            let place = hello.map(|hello| self.place(&hello.weight_mb_s));
            match (self.places.get_mut(index + 1), place) {
                // Learned things stay with a node that came back as it was.
                (Some(known), Some(place)) if known.curve != place.curve => *known = place,
                (Some(_), _) => {}
                (None, place) => {
                    let place = place.unwrap_or_else(|| self.place(&[0; ROWS.len()]));
                    self.places.push(place);
                }
            }
        }
    }

    /// Sends the calls of a layer. `work` is as `Decoder::route` left it.
    pub fn send(
        &mut self,
        layer: usize,
        work: &Workspace,
        (flight, busy): (&mut Flight, Busy),
        cost: &mut StepCost,
    ) {
        flight.clear();
        cost.assignments += work.assignments.len() as u64;
        let Some(hub) = self.hub.clone() else {
            flight.home.extend_from_slice(&work.assignments);
            cost.assignments_here += work.assignments.len() as u64;
            return;
        };
        self.refresh();
        self.divide(layer as u16, work, busy);
        flight.overlapped = busy.overlapped;
        self.gather(work, flight);
        cost.assignments_here += flight.home.len() as u64;
        flight.predicted = self.share.predicted(ROUTER, &self.places[usize::from(ROUTER)]);
        let mut batches = std::mem::take(&mut self.batches);
        let share = &self.share;
        batches.sort_by(|a, b| {
            let finish = |batch: &Batch| share.finish_us(node_place(batch.node));
            finish(b).total_cmp(&finish(a))
        });
        for batch in batches.drain(..) {
            let (sent, before) = (Instant::now(), cost.bytes_out);
            let pending = self.call(&hub, (layer as u16, &batch), work, cost);
            let sent_bytes = cost.bytes_out - before;
            let place = node_place(batch.node);
            let known = self.places.get(usize::from(place));
            let predicted = known.map(|known| self.share.predicted(place, known));
            flight.out.push(Outstanding { batch, sent, sent_bytes, pending, predicted });
        }
        self.batches = batches;
        for index in 1..flight.out.len() {
            let (before, this) = flight.out.split_at_mut(index);
            if let Some(same) = before.iter_mut().find(|call| call.batch.node == this[0].batch.node) {
                (same.predicted, this[0].predicted) = (None, None);
            }
        }
    }

    /// Decides who computes what.
    fn divide(&mut self, layer: u16, work: &Workspace, busy: Busy) {
        let (routes, replicated) = (&self.routes, self.replicated);
        let holders = |expert: u16, slot: usize| -> Option<PlaceIndex> {
            match (routes.node(layer, expert), slot) {
                (Some(node), 0) => Some(node_place(node)),
                (Some(_), 1) if replicated => Some(ROUTER),
                (None, 0) => Some(ROUTER),
                _ => None,
            }
        };
        let mode = if busy.overlapped { Mode::Overlapped } else { Mode::Alone };
        let (rows, busy_us) = (work.rows as u32, micros(busy.time));
        let layer = share::Layer { assignments: &work.assignments, rows, busy_us, mode, holders: &holders };
        self.share.divide(&layer, &self.places);
        if self.replicated {
            for (index, place) in (0..).zip(&mut self.places) {
                if self.share.is_idle(index) {
                    place.learned.idle();
                }
            }
        }
    }

    /// Puts together what each node gets, in calls of at most the rows that fit in one.
    fn gather(&mut self, work: &Workspace, flight: &mut Flight) {
        let rows_max = CallHead::rows_max(row_format(self.shape.format), hidden(work) as u32) as usize;
        self.open.clear();
        self.open.resize(self.places.len(), None);
        for assignment in &work.assignments {
            let place = self.share.place(assignment.expert);
            if place == ROUTER {
                flight.home.push(*assignment);
                continue;
            }
            let open = &mut self.open[usize::from(place)];
            let fits =
                |batch: &Batch| batch.rows.last() == Some(&assignment.row) || batch.rows.len() < rows_max;
            let index = match open.filter(|index| fits(&self.batches[*index])) {
                Some(index) => index,
                None => {
                    let mut batch = self.spare.pop().unwrap_or_default();
                    batch.node = place - 1;
                    batch.rows.clear();
                    batch.assignments.clear();
                    self.batches.push(batch);
                    *open = Some(self.batches.len() - 1);
                    self.batches.len() - 1
                }
            };
            let batch = &mut self.batches[index];
            // Rows come in ascending order.
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
        self.wire.clear();
        self.wire.extend(batch.assignments.iter().map(|assignment| {
            while batch.rows[local] != assignment.row {
                local += 1;
            }
            WireAssignment::new(local as u32, assignment.expert, assignment.weight)
        }));
        self.calls += 1;
        let budget = hub.budget(batch.node, self.wire.len() as u32);
        let head = CallHead {
            call: self.calls,
            step: self.step,
            epoch: self.routes.epoch,
            budget_us: budget.total.as_micros().min(u128::from(BUDGET_US_MAX)) as u32,
            layer,
            format: row_format(self.shape.format),
            hidden: hidden(work) as u32,
            rows: batch.rows.len() as u32,
        };
        let sent = CallDraft::new(hub.pool(), head, &self.wire).and_then(|mut draft| {
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

    /// Learns from the router's own share, which took `time`.
    pub fn computed_here(&mut self, flight: &Flight, time: Duration) {
        self.places[usize::from(ROUTER)].learned.served(flight.predicted, micros(time));
    }

    /// Waits for the replies of `send` and adds them to `sums` (`[rows, hidden]`).
    pub fn collect(
        &mut self,
        layer: usize,
        (work, flight): (&Workspace, &mut Flight),
        (home, sums): (&mut Home, &mut [i64]),
        cost: &mut StepCost,
    ) -> Result<(), HomeError> {
        let mut clock = Instant::now();
        let hidden = hidden(work);
        let mut out = std::mem::take(&mut flight.out);
        for mut call in out.drain(..) {
            let waits = call.pending.as_ref().is_some_and(|pending| !pending.is_done());
            let reply = call.pending.take().map(PendingCall::wait);
            let before = clock;
            lap(&mut clock, &mut cost.wait);
            match reply {
                Some(Ok(reply)) => {
                    let waited = waits.then(|| clock - before);
                    self.learn(&call, flight.overlapped, &reply, waited);
                    cost.bytes_in += reply.frame_bytes() as u64;
                    self.count(&call, Ok(reply.frame_bytes() as u64));
                    add_rows(&reply, &call.batch.rows, (sums, hidden), &mut self.overflowed);
                    let overflowed = &self.overflowed;
                    call.batch.assignments.retain(|assignment| overflowed.contains(&assignment.row));
                }
                failed => {
                    cost.fallbacks += 1;
                    if let Some(Err(error)) = failed {
                        self.count(&call, Err(&error));
                        tracing::info!(%error, layer, "a node did not answer; its experts are computed here");
                    }
                }
            }
            home.add(layer, work.input.view(), &call.batch.assignments, sums)?;
            self.spare.push(call.batch);
            lap(&mut clock, &mut cost.combine);
        }
        flight.out = out;
        Ok(())
    }

    /// Learns from a reply, for which the router waited so long, if it had to.
    fn learn(&mut self, call: &Outstanding, overlapped: bool, reply: &Reply, waited: Option<Duration>) {
        let place = self.places.get_mut(usize::from(node_place(call.batch.node)));
        let (Some(place), Some(predicted)) = (place, call.predicted) else { return };
        let (rows, service_us) = (call.batch.rows.len() as u32, reply.head().service_us as f32);
        place.learned.served(predicted, service_us);
        if overlapped {
            place.learned.lagged(rows, waited.map_or(0.0, micros));
        } else {
            let beside = micros(call.sent.elapsed()) - service_us;
            place.learned.travelled(predicted, rows, (beside, waited.map_or(0.0, micros)));
        }
    }

    fn count(&self, call: &Outstanding, outcome: Result<u64, &CallError>) {
        let (Some(metrics), Some(name)) = (&self.metrics, self.names.get(usize::from(call.batch.node)))
        else {
            return;
        };
        let rows = call.batch.rows.len();
        match outcome {
            Ok(received_bytes) => {
                let (sent_bytes, duration) = (call.sent_bytes, call.sent.elapsed());
                metrics.node_call(name, NodeCall { rows, sent_bytes, received_bytes, duration });
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
                metrics.fallback(rows);
            }
        }
    }
}

/// Adds a reply's rows to those of the part that were sent; `overflowed` gets those it has no sums for.
fn add_rows(reply: &Reply, sent: &[u32], (sums, hidden): (&mut [i64], usize), overflowed: &mut Vec<u32>) {
    overflowed.clear();
    for (row, sent) in reply.view().rows().zip(sent) {
        let sums = &mut sums[*sent as usize * hidden..][..hidden];
        match row {
            Row::I16(part) => sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p)),
            Row::I32(part) => sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p)),
            Row::Overflow => overflowed.push(*sent),
        }
    }
}

fn micros(time: Duration) -> f32 {
    time.as_secs_f32() * 1e6
}

fn hidden(work: &Workspace) -> usize {
    work.input.view().inputs()
}

fn row_format(format: Format) -> RowFormat {
    if format.is_quantized() { RowFormat::Int8 } else { RowFormat::F32 }
}
