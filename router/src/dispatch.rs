//! One layer's rows to the nodes and back: who gets which rows, in one call per node.
//!
//! `send` divides the assignments of a layer (`share`) over the router and the nodes that the routing table names,
//! builds and sends every call before anything is waited for, the one that is expected to take longest first, and
//! leaves the rest to the router. `collect` adds the replies to the sums. A call that is late or fails is repeated
//! elsewhere by the rules of `attempts`: at other holders, else here, with the same bits. What a node reports as
//! overflowed is computed here too, in i64. Only where the router must not compute what it does not hold
//! (`set_fallback`) can an expert be out of reach; then the step fails and says which rows needed it.
//!
//! A row travels once per node, however many of its experts are there; a call carries at most
//! `CALL_PAYLOAD_BYTES_MAX` of rows, more rows make more calls on the prefill lane. What is out for one part of a
//! step is a `Flight`, so that several parts can be under way.

mod collect;
mod flight;
mod inspect;
mod usage;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_net::hub::{Hub, Lane};
use mesh_net::pending::PendingCall;
use mesh_proto::attempts::{HedgeBudget, Standing};
use mesh_proto::cluster::Cluster;
use mesh_proto::health::{Budget, Doubts};
use mesh_proto::routes::{self, NodeIndex, Routes};
use mesh_wire::call::{Assignment as WireAssignment, CallDraft, CallHead};
use mesh_wire::frame::BUDGET_US_MAX;
use mesh_wire::payload::RowFormat;
use model::decoder::workspace::Workspace;
use model::format::Format;
use model::home::{Home, HomeError};
use model::kernel::Assignment;
use model::kernel::measure::ROWS;

use self::flight::{Batch, Outstanding};
pub use self::flight::{Flight, Unreachable};
use self::inspect::Inspection;
use self::usage::Usage;
use crate::audit::{Audit, AuditView};
use crate::cost::StepCost;
use crate::metrics::Metrics;
use crate::share::{self, Choice, Curve, Learned, Mode, Place, Predicted, ROUTER, Share, node_place};

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

/// Calls that others have beaten and that may still be answered; more than these are cancelled.
const LINGERING_MAX: usize = 64;

/// Why a layer cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Nobody who can be reached holds these experts.
    #[error("{0}")]
    Unreachable(Unreachable),
    /// A kernel refused.
    #[error(transparent)]
    Home(#[from] HomeError),
}

/// The division of layers, and how calls are made.
#[derive(Debug)]
pub struct Dispatch {
    hub: Option<Arc<Hub>>,
    shape: Shape,
    own: Own,
    routes: Arc<Routes>,
    peers: Peers,
    hedges: HedgeBudget,
    /// Calls that were beaten, for what their answers tell of their nodes.
    lingering: Vec<Lingering>,
    /// The router, then the nodes.
    places: Vec<Place>,
    view: PlacesView,
    share: Share,
    step: u64,
    calls: u64,
    metrics: Option<Arc<Metrics>>,
    inspection: Inspection,
    names: Vec<String>,
    /// Batch that a place's next row may join, by place, while gathering.
    open: Vec<Option<usize>>,
    batches: Vec<Batch>,
    spare: Vec<Batch>,
    wire: Vec<WireAssignment>,
    /// Assignments on their way from one batch to another, or to `Home`.
    some: Vec<Assignment>,
    usage: Usage,
}

#[derive(Debug)]
struct Lingering {
    node: NodeIndex,
    pending: PendingCall,
    predicted: Option<Predicted>,
}

/// What the router computes itself.
#[derive(Clone, Copy, Debug)]
struct Own {
    /// It has every expert in memory, whatever the routes say.
    replicated: bool,
    /// It may compute what it does not hold, from its mapped files.
    fallback: bool,
}

/// How the nodes are doing, as far as this thread knows.
#[derive(Debug)]
struct Peers {
    started: Instant,
    /// By node: whether the routes name it.
    serving: Vec<bool>,
    /// By node: which process it was when the routes last changed, 0 for none yet.
    instances: Vec<u64>,
    /// By node: whether others are to be preferred to it, as it is hot.
    spared: Vec<bool>,
    doubts: Doubts,
}

impl Peers {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The process behind a node. A new one is not doubted for calls that were out to the last: else a node that came
    /// back at once could not be asked for what the next one to die owes.
    fn meet(&mut self, node: NodeIndex, instance: u64) {
        let index = usize::from(node);
        if self.instances.len() <= index {
            self.instances.resize(index + 1, 0);
        }
        if std::mem::replace(&mut self.instances[index], instance) != instance {
            self.doubts.answered(node);
        }
    }

    /// Whether it is as good as any other: none of its calls is late, and it is not hot.
    fn is_preferred(&self, node: NodeIndex, now: Duration) -> bool {
        !self.doubts.of(node, now) && !self.spared.get(usize::from(node)).copied().unwrap_or(false)
    }

    /// Any node that can be asked is asked before the router: they compute at the same time.
    fn standing(&self, hub: Option<&Hub>, node: NodeIndex, now: Duration) -> Standing {
        if node == routes::ROUTER {
            return Standing::Good(u32::MAX);
        }
        if !self.serving.get(usize::from(node)).is_some_and(|serving| *serving) {
            return Standing::Out;
        }
        let load = hub.map_or(0, |hub| hub.outstanding(node));
        if !self.is_preferred(node, now) { Standing::Doubtful(load) } else { Standing::Good(load) }
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
    /// expert, and its share of those that nodes hold is chosen layer by layer. Where it holds some, the routes say so.
    pub fn new(hub: Option<Arc<Hub>>, shape: Shape, replicated: bool) -> Dispatch {
        let peers = Peers {
            started: Instant::now(),
            serving: Vec::new(),
            instances: Vec::new(),
            spared: Vec::new(),
            doubts: Doubts::default(),
        };
        let mut dispatch = Dispatch {
            hub,
            shape,
            own: Own { replicated, fallback: true },
            routes: Arc::new(Routes::default()),
            peers,
            hedges: HedgeBudget::default(),
            lingering: Vec::new(),
            places: Vec::new(),
            view: PlacesView::default(),
            share: Share::default(),
            step: 0,
            calls: 0,
            metrics: None,
            inspection: Inspection::default(),
            names: Vec::new(),
            open: Vec::new(),
            batches: Vec::new(),
            spare: Vec::new(),
            wire: Vec::new(),
            some: Vec::new(),
            usage: Usage::default(),
        };
        dispatch.places.push(dispatch.place(&[0; ROWS.len()]));
        dispatch
    }

    /// Whether the router may compute experts that it does not hold, from its mapped files, where no node can.
    pub fn set_fallback(&mut self, fallback: bool) {
        self.own.fallback = fallback;
    }

    /// Says what the router itself measured (`Home::weight_mb_s`).
    pub fn set_own_speed(&mut self, weight_mb_s: &[u32; ROWS.len()]) {
        self.places[usize::from(ROUTER)] = self.place(weight_mb_s);
    }

    /// Counts calls in `metrics`, by the nodes' names, which come with the routes.
    pub fn count_in(&mut self, metrics: Arc<Metrics>) {
        self.metrics = Some(metrics);
    }

    /// Keeps some of what nodes answer for `audit`.
    pub fn audit_with(&mut self, audit: Audit) {
        self.inspection.audit = Some(audit);
    }

    /// What came of audits, readable from other threads; none without them.
    pub fn audits(&self) -> Option<AuditView> {
        self.inspection.audit.as_ref().map(Audit::view)
    }

    /// The requests that are served now, by number: the oldest, and the one that would be next.
    pub fn serves(&mut self, requests: Range<u64>) {
        self.inspection.requests = requests;
    }

    /// What is known of the places, readable from other threads.
    pub fn view(&self) -> PlacesView {
        self.view.clone()
    }

    /// Counts a step.
    pub fn begin_step(&mut self) {
        self.step += 1;
        self.inspection.begin_step();
        self.refresh();
        if let (Some(hub), Some(counts)) = (&self.hub, self.usage.take()) {
            hub.note_used(counts);
        }
        self.view.write(&self.places);
    }

    /// Whether experts that could not be had may be there soon, because the routes are others already, or nodes are
    /// loading or tried again shortly; then waits until the routes are others, for `timeout` at most. Not where the
    /// router could have computed them.
    pub fn await_loading(&self, lost: &Unreachable, timeout: Duration) -> bool {
        let Some(hub) = self.hub.as_ref().filter(|_| !self.own.fallback) else { return false };
        // Those that the part was sent by: another part of the step may have seen newer ones since.
        let is_new = |cluster: &Cluster| !Arc::ptr_eq(&cluster.routes(), &lost.routes);
        let may_come = |cluster: &Cluster| is_new(cluster) || cluster.may_recover();
        if !hub.wait_until(Duration::ZERO, may_come) {
            return false;
        }
        hub.wait_until(timeout, is_new);
        true
    }

    /// Epoch of the routes of the last layer; 0 before there is a placement.
    pub fn epoch(&self) -> u64 {
        self.routes.epoch
    }

    /// Whether any node serves experts.
    pub fn is_served(&self) -> bool {
        self.peers.serving.contains(&true)
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
        if !self.lingering.is_empty() {
            self.look_after();
        }
        let Some(hub) = &self.hub else { return };
        let routes = hub.routes();
        if Arc::ptr_eq(&routes, &self.routes) {
            return;
        }
        self.routes = routes;
        let nodes = hub.nodes();
        // Machines join while the router runs.
        self.names = nodes.iter().map(|node| node.name.clone()).collect();
        self.peers.serving.clear();
        self.peers.serving.resize(nodes.len(), false);
        for node in self.routes.table.all().flat_map(|(_, part)| part.holders.as_slice()) {
            if let Some(serving) = self.peers.serving.get_mut(usize::from(*node)) {
                *serving = true;
            }
        }
        self.peers.spared.clear();
        self.peers
            .spared
            .extend((0..nodes.len()).map(|node| self.routes.spared.contains(&(node as NodeIndex))));
        let exact = nodes.iter().map(|node| node.cluster.hello.as_ref().is_some_and(|hello| hello.exact));
        self.inspection.meet(&self.peers.serving, exact.collect());
        for (index, node) in nodes.into_iter().enumerate() {
            if let Some(hello) = &node.cluster.hello {
                self.peers.meet(index as NodeIndex, hello.instance);
            }
            let place = node.cluster.hello.map(|hello| self.place(&hello.weight_mb_s));
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
    ///
    /// # Errors
    /// Experts that nobody holds, where the router may not compute them; nothing is out then.
    pub fn send(
        &mut self,
        layer: usize,
        work: &Workspace,
        (flight, busy): (&mut Flight, Busy),
        cost: &mut StepCost,
    ) -> Result<(), LayerError> {
        self.spare.extend(flight.recycle(self.own.fallback));
        cost.assignments += work.assignments.len() as u64;
        let Some(hub) = self.hub.clone() else {
            flight.home.extend_from_slice(&work.assignments);
            cost.assignments_here += work.assignments.len() as u64;
            return Ok(());
        };
        self.refresh();
        self.usage.count((layer as u16, &self.routes.table), (work.rows, &work.assignments));
        flight.routes = Arc::clone(&self.routes);
        flight.overlapped = busy.overlapped;
        self.divide(layer as u16, work, busy);
        self.gather(layer as u16, work, flight);
        let mut batches = std::mem::take(&mut self.batches);
        if !flight.lost.is_empty() {
            self.spare.append(&mut batches);
            self.batches = batches;
            return Err(LayerError::Unreachable(Unreachable::lost(layer, &self.routes, &flight.lost)));
        }
        cost.assignments_here += flight.kept();
        flight.predicted = self.share.predicted(ROUTER, &self.places[usize::from(ROUTER)]);
        let share = &self.share;
        batches.sort_by(|a, b| {
            let finish = |batch: &Batch| share.finish_us(node_place(batch.node));
            finish(b).total_cmp(&finish(a))
        });
        for batch in batches.drain(..) {
            let place = node_place(batch.node);
            let known = self.places.get(usize::from(place));
            let predicted = known.map(|known| self.share.predicted(place, known));
            let (call, budget) = self.call(&hub, (layer as u16, flight.routes.epoch), (&batch, work), cost);
            self.hedges.earn();
            let at = call.sent.saturating_duration_since(self.peers.started);
            let asked = flight.attempts.ask(batch.node, &batch.units, at, budget);
            if call.pending.is_none() {
                flight.attempts.failed(asked);
            }
            flight.out.push(Outstanding { predicted, batch, ..call });
        }
        self.batches = batches;
        flight.tell_origins();
        Ok(())
    }

    /// Decides who computes what.
    fn divide(&mut self, layer: u16, work: &Workspace, busy: Busy) {
        let (table, peers, own) = (&self.routes.table, &self.peers, self.own);
        // Mostly nobody was ever late, and the clock need not be read.
        let now = if peers.doubts.any(Duration::ZERO) { peers.now() } else { Duration::ZERO };
        let doubts = peers.doubts.any(now) || peers.spared.contains(&true);
        let parts = |expert: u16, index: usize| -> Option<Choice> {
            let all = table.parts(layer, expert);
            let part = all.get(index)?;
            let whole = all.last().map_or(1, |last| last.to);
            let width = f32::from(part.to - part.from) / f32::from(whole.max(1));
            let here = own.replicated && !part.holders.is_empty() && !part.holders.contains(routes::ROUTER);
            let holders = part.holders.as_slice().iter().copied().chain(here.then_some(routes::ROUTER));
            let well = |node: &NodeIndex| *node == routes::ROUTER || peers.is_preferred(*node, now);
            if doubts && holders.clone().any(|node| well(&node)) {
                return Some(Choice::new(width, holders.filter(well).map(place_of)));
            }
            Some(Choice::new(width, holders.map(place_of)))
        };
        let mode = if busy.overlapped { Mode::Overlapped } else { Mode::Alone };
        let (rows, busy_us) = (work.rows as u32, micros(busy.time));
        let layer = share::Layer { assignments: &work.assignments, rows, busy_us, mode, parts: &parts };
        self.share.divide(&layer, &self.places);
        for (index, place) in (0..).zip(&mut self.places) {
            if self.share.is_idle(index) {
                place.learned.idle();
            }
        }
    }

    /// Puts together what each node gets, in calls of at most the rows that fit in one.
    fn gather(&mut self, layer: u16, work: &Workspace, flight: &mut Flight) {
        let rows_max = CallHead::rows_max(row_format(self.shape.format), hidden(work) as u32) as usize;
        self.open.clear();
        self.open.resize(self.places.len(), None);
        let routes = Arc::clone(&self.routes);
        for assignment in &work.assignments {
            let parts = routes.table.parts(layer, assignment.expert);
            if parts.is_empty() {
                flight.home.push(*assignment);
            }
            for (index, part) in parts.iter().enumerate() {
                let place = self.share.place(assignment.expert, index);
                if place != ROUTER {
                    self.hand_out(place, part, (assignment, rows_max), flight);
                    continue;
                }
                let Own { replicated, fallback } = self.own;
                if !(replicated || fallback || part.holders.contains(routes::ROUTER)) {
                    flight.lost.push(*assignment);
                } else if parts.len() == 1 {
                    flight.home.push(*assignment);
                } else {
                    flight.keep_slice((part.from, part.to), *assignment);
                }
            }
        }
    }

    /// Adds a row's assignment to what a node gets.
    fn hand_out(
        &mut self,
        place: share::PlaceIndex,
        part: &routes::Part,
        (assignment, rows_max): (&Assignment, usize),
        flight: &mut Flight,
    ) {
        let open = &mut self.open[usize::from(place)];
        let fits = |batch: &Batch| batch.rows.last() == Some(&assignment.row) || batch.rows.len() < rows_max;
        let index = match open.filter(|index| fits(&self.batches[*index])) {
            Some(index) => index,
            None => {
                let mut batch = self.spare.pop().unwrap_or_default();
                batch.begin(place - 1);
                self.batches.push(batch);
                *open = Some(self.batches.len() - 1);
                self.batches.len() - 1
            }
        };
        let here = self.own.replicated;
        let unit = self.batches[index].add(assignment);
        match unit {
            Some(unit) => flight.attempts.grow(unit, 1),
            None => {
                let mut holders = part.holders;
                if here {
                    // Without room for it the nodes are enough.
                    holders.add(routes::ROUTER);
                }
                let unit = flight.unit(assignment.expert, (part.from, part.to), holders);
                self.batches[index].name(assignment.expert, unit);
            }
        }
    }

    /// Builds and sends one call. Without a pending one it cannot be sent.
    fn call(
        &mut self,
        hub: &Hub,
        (layer, epoch): (u16, u64),
        (batch, work): (&Batch, &Workspace),
        cost: &mut StepCost,
    ) -> (Outstanding, Budget) {
        let (sent, mut sent_bytes) = (Instant::now(), 0);
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
            epoch,
            budget_us: budget.total.as_micros().min(u128::from(BUDGET_US_MAX)) as u32,
            layer,
            format: row_format(self.shape.format),
            hidden: hidden(work) as u32,
            rows: batch.rows.len() as u32,
        };
        let drafted = CallDraft::new(hub.pool(), head, &self.wire).and_then(|mut draft| {
            draft.copy_rows(batch.rows.iter().map(|row| work.input.row(*row as usize)))?;
            Ok(draft.finish())
        });
        let pending = match drafted {
            Ok(call) => {
                let lane = if batch.rows.len() <= DECODE_LANE_ROWS { Lane::Decode } else { Lane::Prefill };
                cost.calls += 1;
                sent_bytes = call.frame_bytes() as u64;
                Some(hub.send(batch.node, lane, call))
            }
            Err(error) => {
                tracing::warn!(%error, layer, "a call cannot be built; its experts are computed elsewhere");
                None
            }
        };
        cost.bytes_out += sent_bytes;
        (Outstanding { sent, sent_bytes, pending, ..Outstanding::default() }, budget)
    }

    /// Computes the router's own share of a layer and adds it to `sums` (`[rows, hidden]`).
    ///
    /// # Errors
    /// Weights that are not to be had; what the kernel refuses.
    pub fn compute(
        &mut self,
        layer: usize,
        (work, flight): (&Workspace, &Flight),
        (home, sums): (&mut Home, &mut [i64]),
    ) -> Result<(), LayerError> {
        let x = work.input.view();
        home.add(layer, x, &flight.home, sums)
            .map_err(|error| flight::unreadable(layer, &flight.home, error))?;
        for (blocks, assignments) in &flight.slices {
            home.add_slice(layer, *blocks, (x, assignments), sums)
                .map_err(|error| flight::unreadable(layer, assignments, error))?;
        }
        Ok(())
    }

    /// Learns from the router's own share, which took `time`.
    pub fn computed_here(&mut self, flight: &Flight, time: Duration) {
        self.places[usize::from(ROUTER)].learned.served(flight.predicted, micros(time));
    }
}

/// The place of a holder.
fn place_of(node: NodeIndex) -> share::PlaceIndex {
    if node == routes::ROUTER { ROUTER } else { node_place(node) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_node_is_not_doubted_for_calls_of_the_last_process() {
        let mut peers = Peers {
            started: Instant::now(),
            serving: vec![true, true],
            instances: Vec::new(),
            spared: Vec::new(),
            doubts: Doubts::default(),
        };
        let now = Duration::from_secs(5);
        peers.meet(1, 7);
        peers.doubts.overdue(1, now);
        peers.meet(1, 7);
        assert_eq!(peers.standing(None, 1, now), Standing::Doubtful(0), "the same process is still late");
        peers.meet(1, 8);
        assert_eq!(peers.standing(None, 1, now), Standing::Good(0));
    }
}
