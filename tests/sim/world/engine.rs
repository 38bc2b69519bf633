//! Requests, steps and layers, as `engine`, `forward` and `dispatch` run them: the real `Scheduler`, `Share` and
//! `Attempts` decide; this carries them out on the toy model and checks every sum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ::router::engine::{HOLD_MAX, HOLD_SLICE};
use ::router::scheduler::{Limits, NewSequence, Scheduler, StepPlan};
use ::router::share::{self, Choice, Curve, Learned, Mode, Place, Share, node_place};
use mesh_proto::attempts::{
    ASKS_MAX, Attempts, CALLS_PER_HEDGE, Call as Attempt, HEDGE_BURST, HedgeBudget, Standing, Step, Unit,
    Units, Why,
};
use mesh_proto::cluster::Event;
use mesh_proto::health::Doubts;
use mesh_proto::routes::{Holders, NodeIndex, ROUTER, Routes};
use mesh_wire::buffer::Pool;
use mesh_wire::frame::{Header, Op};
use mesh_wire::reply::{Reply, Row as Sums};
use model::kernel::Assignment;

use super::{End, Happening, Summary, World};
use crate::dice::Dice;
use crate::machine::{Answer, Call};
use crate::toy::{END, HIDDEN, LAYERS, MOE_LAYERS, Row, Toy};

mod sums;

/// Tokens per KV block.
const BLOCK: usize = 4;
/// Parts a step is cut into at most.
const PARTS: usize = 2;
/// Steps of one layer's calls: more is a circle.
const ROUNDS_MAX: u32 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Begin(u16, usize),
    Settle(u16, usize),
}

#[derive(Debug)]
struct StepRow {
    slice: usize,
    position: usize,
    x: Row,
    /// Expert sums of the layer, and what they must be.
    sums: Row,
    right: Row,
}

#[derive(Debug)]
struct Pass {
    plan: StepPlan,
    rows: Vec<StepRow>,
    turns: Vec<Turn>,
    at: usize,
    /// Where the second part begins.
    cut: usize,
}

/// A part of an expert, with the rows of the step that pass through it.
#[derive(Debug)]
struct Work {
    expert: u16,
    blocks: (u16, u16),
    rows: Vec<usize>,
    /// Who held it when its layer began.
    holders: Holders,
    /// Times it was added to the sums.
    added: u32,
}

#[derive(Debug)]
enum Arrived {
    Reply(Attempt, Reply),
    Failed(Attempt),
}

/// One layer of one part of a step.
#[derive(Debug, Default)]
struct Flight {
    attempts: Attempts,
    layer: u16,
    work: Vec<Work>,
    routes: Arc<Routes>,
    /// What came while the engine was busy.
    inbox: Vec<Arrived>,
    replies: BTreeMap<Attempt, Reply>,
    /// Rows of the step by call.
    rows: BTreeMap<Attempt, Vec<usize>>,
    open: bool,
}

/// A call that was sent.
#[derive(Clone, Copy, Debug)]
struct Out {
    node: NodeIndex,
    part: usize,
    attempt: Attempt,
    rows: u32,
    assignments: u32,
    sent: Duration,
    /// Whether it is among what its node still has to compute.
    pending: bool,
}

#[derive(Debug)]
struct Live {
    tokens: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct Engine {
    limits: Limits,
    scheduler: Scheduler,
    kv: Vec<[[i64; BLOCK]; LAYERS as usize]>,
    live: BTreeMap<u64, Live>,
    leaving: Vec<usize>,
    pass: Option<Pass>,
    busy_until: Duration,
    /// Since when steps fail for want of experts that nodes are loading.
    held_since: Option<Duration>,
    /// Time the router takes per layer besides experts, and per part of an expert that it computes.
    layer_takes: Duration,
    part_takes: Duration,
    flights: Vec<Flight>,
    out: BTreeMap<u64, Out>,
    calls: u64,
    share: Share,
    hedges: HedgeBudget,
    doubts: Doubts,
    /// Assignments that each node has to compute.
    loads: Vec<u32>,
}

impl Engine {
    /// `quick`: its own part takes next to no time, so that calls are many.
    pub(crate) fn new(quick: bool, dice: &mut Dice) -> Engine {
        let sequences = dice.between(1, 6) as usize;
        let limits = Limits {
            block_tokens: BLOCK,
            blocks: dice.between(9, 18) as usize,
            rows: sequences + dice.between(0, 20) as usize,
            chunk: dice.between(1, 12) as usize,
            sequences,
        };
        Engine {
            limits,
            scheduler: Scheduler::new(limits).expect("the limits work"),
            kv: vec![[[0; BLOCK]; LAYERS as usize]; limits.blocks],
            live: BTreeMap::new(),
            leaving: Vec::new(),
            pass: None,
            busy_until: Duration::ZERO,
            held_since: None,
            layer_takes: dice.micros(50, if quick { 200 } else { 15_000 }),
            part_takes: dice.micros(50, 5_000),
            flights: (0..PARTS).map(|_| Flight::default()).collect(),
            out: BTreeMap::new(),
            calls: 0,
            share: Share::default(),
            hedges: HedgeBudget::default(),
            doubts: Doubts::default(),
            loads: Vec::new(),
        }
    }

    /// What it waits for.
    pub(crate) fn describe(&self) -> String {
        let turn = self.pass.as_ref().map(|pass| pass.turns[pass.at]);
        format!("{turn:?}, {} calls out, busy until {:?}", self.out.len(), self.busy_until)
    }

    /// No request, no block, no call is left.
    pub(crate) fn check_empty(&self) {
        let occupancy = self.scheduler.occupancy();
        assert!(self.scheduler.is_empty() && self.live.is_empty(), "sequences are left");
        assert_eq!(occupancy.blocks_used, 0, "KV blocks are lost");
    }

    /// Its process ends: the requests that end with it.
    pub(crate) fn crash(&mut self) -> Vec<usize> {
        let open: Vec<usize> = self.live.keys().map(|id| *id as usize).collect();
        self.live.clear();
        self.leaving.clear();
        self.pass = None;
        self.held_since = None;
        self.out.clear();
        self.loads.clear();
        self.flights.iter_mut().for_each(|flight| flight.open = false);
        self.scheduler = Scheduler::new(self.limits).expect("the limits work");
        open
    }

    fn load(&mut self, node: NodeIndex) -> &mut u32 {
        let index = usize::from(node);
        if self.loads.len() <= index {
            self.loads.resize(index + 1, 0);
        }
        &mut self.loads[index]
    }

    /// A call is nothing its node has to do any more.
    fn over(&mut self, wire: u64) {
        if let Some(out) = self.out.get_mut(&wire).filter(|out| out.pending) {
            out.pending = false;
            let (node, assignments) = (out.node, out.assignments);
            *self.load(node) -= assignments;
        }
    }

    /// Forgets a layer: whatever still comes of it belongs to nobody.
    fn close_flight(&mut self, part: usize) {
        let wires: Vec<u64> =
            self.out.iter().filter(|(_, out)| out.part == part).map(|(wire, _)| *wire).collect();
        for wire in wires {
            self.over(wire);
            self.out.remove(&wire);
        }
        let flight = &mut self.flights[part];
        flight.open = false;
        flight.inbox.clear();
        flight.replies.clear();
        flight.rows.clear();
        flight.work.clear();
    }
}

impl World {
    pub(crate) fn client_arrives(&mut self, client: usize) {
        if !self.router_up {
            return self.end(client, End::Broken);
        }
        let Some(request) = self.clients.get(client) else { return };
        let new = NewSequence {
            id: client as u64,
            prompt: request.prompt.len(),
            longest: request.prompt.len() + request.tokens_max,
            prompt_logits: false,
        };
        self.engine.scheduler.add(new).expect("the longest request fits");
        self.engine.live.insert(client as u64, Live { tokens: request.prompt.clone() });
        self.pump();
    }

    pub(crate) fn client_leaves(&mut self, client: usize) {
        if self.engine.live.contains_key(&(client as u64)) {
            self.engine.leaving.push(client);
        }
    }

    /// A request ends: once.
    pub(crate) fn end(&mut self, client: usize, end: End) {
        self.trace.note(self.now, format_args!("request {client} ends: {end:?}"));
        let request = &mut self.clients[client];
        assert_eq!(request.end, None, "request {client} ends twice");
        if let End::Complete(tokens) = &end {
            assert_eq!(*tokens, request.wanted, "request {client} got other text");
        }
        self.summary.complete += u64::from(matches!(end, End::Complete(_)));
        self.summary.unavailable += u64::from(end == End::Unavailable);
        request.end = Some(end);
    }

    /// Goes on until the engine is idle, busy, or waits for nodes.
    pub(crate) fn pump(&mut self) {
        while self.router_up && self.now >= self.engine.busy_until {
            let Some(pass) = &self.engine.pass else {
                if self.begin_step() {
                    continue;
                }
                return;
            };
            match pass.turns.get(pass.at).copied() {
                None => self.deliver(),
                Some(Turn::Begin(layer, part)) => {
                    self.next_turn();
                    self.begin_layer(layer, part);
                }
                Some(Turn::Settle(layer, part)) => match self.settle(part) {
                    Settled::Waits => return,
                    Settled::Lost => self.fail_step(part),
                    Settled::Done => {
                        self.next_turn();
                        self.finish_layer(layer, part);
                    }
                },
            }
        }
        let busy = self.engine.busy_until;
        if self.router_up && busy > self.now {
            self.at(busy - self.now, Happening::Engine);
        }
    }

    fn next_turn(&mut self) {
        if let Some(pass) = &mut self.engine.pass {
            pass.at += 1;
        }
    }

    fn works_for(&mut self, time: Duration) {
        self.engine.busy_until = self.engine.busy_until.max(self.now) + time;
    }

    /// Plans a step; false if there is nothing to do.
    fn begin_step(&mut self) -> bool {
        for client in std::mem::take(&mut self.engine.leaving) {
            if self.engine.live.remove(&(client as u64)).is_some() {
                self.engine.scheduler.remove(client as u64);
                self.end(client, End::Cancelled);
            }
        }
        let plan = self.engine.scheduler.plan();
        self.summary.preemptions += plan.preempted.len() as u64;
        if plan.rows() == 0 {
            assert!(self.engine.scheduler.is_empty(), "sequences wait and nothing runs");
            return false;
        }
        self.check_blocks(&plan);
        let mut rows = Vec::with_capacity(plan.rows());
        for (slice, planned) in plan.slices.iter().enumerate() {
            let tokens = &self.engine.live[&planned.id].tokens;
            for position in planned.tokens.clone() {
                let x = self.toy.embed(tokens[position], position);
                rows.push(StepRow { slice, position, x, sums: [0; HIDDEN], right: [0; HIDDEN] });
            }
        }
        let parts = if rows.len() >= 4 { PARTS } else { 1 };
        let mut turns = Vec::new();
        for layer in 0..=LAYERS {
            for part in 0..parts {
                turns.extend(layer.checked_sub(1).map(|before| Turn::Settle(before, part)));
                turns.extend((layer < LAYERS).then_some(Turn::Begin(layer, part)));
            }
        }
        let cut = if parts == 1 { rows.len() } else { rows.len() / 2 };
        self.engine.pass = Some(Pass { plan, rows, turns, at: 0, cut });
        true
    }

    /// Every block has one owner, and every slice the blocks it needs.
    fn check_blocks(&self, plan: &StepPlan) {
        let mut owned = vec![false; self.engine.limits.blocks];
        assert!(plan.rows() <= self.engine.limits.rows, "too many rows");
        for slice in &plan.slices {
            assert!(slice.blocks.len() * BLOCK >= slice.tokens.end, "a slice lacks blocks");
            for block in &slice.blocks {
                assert!(
                    !std::mem::replace(&mut owned[*block as usize], true),
                    "block {block} has two owners"
                );
            }
        }
        assert!(
            self.engine.scheduler.occupancy().blocks_used >= owned.iter().filter(|owned| **owned).count()
        );
    }

    fn range(&self, part: usize) -> std::ops::Range<usize> {
        let pass = self.engine.pass.as_ref().expect("a step is under way");
        if part == 0 { 0..pass.cut } else { pass.cut..pass.rows.len() }
    }

    /// Attention and gate, then the calls of the layer.
    fn begin_layer(&mut self, layer: u16, part: usize) {
        let range = self.range(part);
        let time = self.engine.layer_takes;
        let Engine { pass, kv, .. } = &mut self.engine;
        let pass = pass.as_mut().expect("a step is under way");
        let mut chosen: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
        for index in range {
            let StepRow { slice, position, x, sums, right } = &mut pass.rows[index];
            let table = &pass.plan.slices[*slice].blocks;
            let at =
                |position: usize| (table[position / BLOCK] as usize, usize::from(layer), position % BLOCK);
            let (block, of, slot) = at(*position);
            kv[block][of][slot] = self.toy.key(layer, x);
            let keys = (0..=*position).map(|position| {
                let (block, of, slot) = at(position);
                kv[block][of][slot]
            });
            self.toy.attend(layer, x, keys);
            (*sums, *right) = ([0; HIDDEN], [0; HIDDEN]);
            if MOE_LAYERS.contains(&layer) {
                for expert in self.toy.gate(layer, x) {
                    chosen.entry(expert).or_default().push(index);
                    let of_expert = self.toy.part((layer, expert), (0, self.toy.blocks), x);
                    right.iter_mut().zip(of_expert).for_each(|(sum, of_expert)| *sum += of_expert);
                }
            }
        }
        self.works_for(time);
        if MOE_LAYERS.contains(&layer) {
            self.dispatch(layer, part, &chosen);
        }
    }

    /// Cuts the layer into units and sends the first calls.
    fn dispatch(&mut self, layer: u16, part: usize, chosen: &BTreeMap<u16, Vec<usize>>) {
        let routes = self.router.cluster.routes();
        self.engine.close_flight(part);
        let flight = &mut self.engine.flights[part];
        flight.attempts.clear(self.profile.fallback);
        (flight.layer, flight.routes, flight.open) = (layer, Arc::clone(&routes), true);
        let mut asked: BTreeMap<NodeIndex, Vec<Unit>> = BTreeMap::new();
        let (mut homeless, mut own) = (Vec::new(), Vec::new());
        self.divide(layer, &routes, chosen);
        for (expert, rows) in chosen {
            for (index, piece) in routes.table.parts(layer, *expert).iter().enumerate() {
                let holders = piece.holders;
                let work = Work {
                    expert: *expert,
                    blocks: (piece.from, piece.to),
                    rows: rows.clone(),
                    holders,
                    added: 0,
                };
                let place = self.engine.share.place(*expert, index);
                let flight = &mut self.engine.flights[part];
                match place.checked_sub(1) {
                    Some(node) => {
                        assert!(holders.contains(node), "{node} does not hold it");
                        asked.entry(node).or_default().push(flight.attempts.unit(holders, rows.len() as u32));
                        flight.work.push(work);
                    }
                    None if self.profile.fallback || holders.contains(ROUTER) => own.push(work),
                    None => {
                        homeless.push(flight.attempts.unit(holders, rows.len() as u32));
                        flight.work.push(work);
                    }
                }
            }
        }
        for (node, units) in asked {
            let budget = self.budget(node, part, &units);
            let call = self.engine.flights[part].attempts.ask(node, &units, self.now, budget);
            self.engine.hedges.earn();
            self.send(part, call, node);
        }
        let pass = self.engine.pass.as_mut().expect("a step is under way");
        for work in &own {
            compute(&self.toy, layer, work, &mut pass.rows);
        }
        let time = self.engine.part_takes * own.len() as u32;
        self.works_for(time);
        if !homeless.is_empty() {
            // As a call that nobody could take.
            let now = self.now;
            let nothing = mesh_proto::health::Budget { hedge: Duration::MAX, total: Duration::MAX };
            let attempts = &mut self.engine.flights[part].attempts;
            let call = attempts.ask(ROUTER, &homeless, now, nothing);
            attempts.failed(call);
        }
    }

    /// Lets `Share` divide a layer, as `dispatch` does.
    fn divide(&mut self, layer: u16, routes: &Routes, chosen: &BTreeMap<u16, Vec<usize>>) {
        let assignments: Vec<Assignment> = chosen
            .iter()
            .flat_map(|(expert, rows)| {
                rows.iter().map(|row| Assignment { row: *row as u32, expert: *expert, weight: 1.0 })
            })
            .collect();
        let doubtful = |node: NodeIndex| self.engine.doubts.of(node, self.now);
        let parts = |expert: u16, index: usize| -> Option<Choice> {
            let part = routes.table.parts(layer, expert).get(index)?;
            let width = f32::from(part.to - part.from) / f32::from(self.facts.blocks);
            let holders = || part.holders.as_slice().iter().copied();
            let well = |node: &NodeIndex| *node == ROUTER || !doubtful(*node);
            let any = holders().any(|node| well(&node));
            let place = |node: NodeIndex| if node == ROUTER { share::ROUTER } else { node_place(node) };
            Some(Choice::new(width, holders().filter(|node| !any || well(node)).map(place)))
        };
        let speed = |mb_s: u32| {
            let curve = Curve::new(&[mb_s; 5], self.facts.expert_bytes).unwrap_or(Curve::EVEN);
            Place { weight_mb_s: [mb_s; 5], curve, learned: Learned::default() }
        };
        let places: Vec<Place> = std::iter::once(1000)
            .chain(self.machines.iter().map(|machine| machine.weight_mb_s))
            .map(speed)
            .collect();
        let layer = share::Layer {
            assignments: &assignments,
            rows: 1,
            busy_us: 0.0,
            mode: Mode::Alone,
            parts: &parts,
        };
        self.engine.share.divide(&layer, &places);
    }

    fn budget(&mut self, node: NodeIndex, part: usize, units: &[Unit]) -> mesh_proto::health::Budget {
        let work = &self.engine.flights[part].work;
        let own: usize = units.iter().map(|unit| work[*unit as usize].rows.len()).sum();
        let out = *self.engine.load(node);
        self.router.cluster.budget(node, own as u32 + out)
    }

    fn standing(&self, node: NodeIndex) -> Standing {
        if node == ROUTER {
            return Standing::Good(u32::MAX);
        }
        let load = self.engine.loads.get(usize::from(node)).copied().unwrap_or(0);
        let serves = self.router.serves(node);
        match (serves, self.engine.doubts.of(node, self.now)) {
            (false, _) => Standing::Out,
            (true, true) => Standing::Doubtful(load),
            (true, false) => Standing::Good(load),
        }
    }

    /// Puts a call on the wire; where there is no connection it has failed already.
    fn send(&mut self, part: usize, attempt: Attempt, node: NodeIndex) {
        self.summary.calls += 1;
        let flight = &self.engine.flights[part];
        let units: Vec<Unit> = flight.attempts.units_of(attempt).to_vec();
        let mut rows: Vec<usize> =
            units.iter().flat_map(|unit| flight.work[*unit as usize].rows.iter().copied()).collect();
        rows.sort_unstable();
        rows.dedup();
        let mut assignments = Vec::new();
        for unit in &units {
            let work = &flight.work[*unit as usize];
            for row in &work.rows {
                let local = rows.binary_search(row).expect("every row of a unit travels");
                assignments.push((local as u32, work.expert));
            }
        }
        self.engine.calls += 1;
        let wire = self.engine.calls;
        let pass = self.engine.pass.as_ref().expect("a step is under way");
        let call = Call {
            call: wire,
            epoch: flight.routes.epoch,
            layer: flight.layer,
            rows: rows.iter().map(|row| pass.rows[*row].x).collect(),
            assignments,
        };
        let Some(connection) = self.router.connection(node) else {
            return self.engine.flights[part].inbox.push(Arrived::Failed(attempt));
        };
        let assignments = call.assignments.len() as u32;
        self.trace
            .note(self.now, format_args!("call {wire} (part {part}, {attempt}) to {node}: units {units:?}"));
        let out =
            Out { node, part, attempt, rows: rows.len() as u32, assignments, sent: self.now, pending: true };
        *self.engine.load(node) += assignments;
        self.engine.out.insert(wire, out);
        self.engine.flights[part].rows.insert(attempt, rows);
        for delay in self.deliveries() {
            self.at(delay, Happening::Call(node, connection, call.clone()));
        }
    }

    /// The calls out to a node will not be answered: its connection is gone.
    pub(crate) fn fail_calls(&mut self, node: NodeIndex) {
        let wires: Vec<u64> =
            self.engine.out.iter().filter(|(_, out)| out.node == node).map(|(wire, _)| *wire).collect();
        for wire in wires {
            self.engine.over(wire);
            if let Some(out) = self.engine.out.remove(&wire) {
                self.engine.flights[out.part].inbox.push(Arrived::Failed(out.attempt));
            }
        }
    }

    /// What came on the stream of call `stream`, as a lane of mesh-net reads it.
    pub(crate) fn answer_arrives(&mut self, node: NodeIndex, stream: u64, answer: Answer) {
        let Some(out) = self.engine.out.get(&stream).copied().filter(|out| out.node == node) else { return };
        let arrived = match answer {
            Answer::Refused(call, refusal) if call == stream => {
                self.refused(node, refusal);
                Arrived::Failed(out.attempt)
            }
            Answer::Refused(..) => return,
            Answer::Reply(body) => match read(&self.pool, &body, (stream, out.rows)) {
                // Of another call: dropped.
                Ok(None) => return,
                Ok(Some(reply)) => {
                    let (assignments, round_trip) = (out.assignments, self.now - out.sent);
                    let service = Duration::from_micros(reply.head().service_us.into());
                    self.engine.doubts.answered(node);
                    self.handle(Event::Answered { node, assignments, service, round_trip });
                    Arrived::Reply(out.attempt, reply)
                }
                Err(()) => {
                    self.malformed(node);
                    Arrived::Failed(out.attempt)
                }
            },
        };
        self.engine.over(stream);
        // The handling of the event may have ended the connection, and the call with it.
        if self.engine.out.contains_key(&stream) {
            self.engine.flights[out.part].inbox.push(arrived);
        }
        self.pump();
    }

    /// Drives the calls of a part as far as they go.
    fn settle(&mut self, part: usize) -> Settled {
        if !self.engine.flights[part].open {
            return Settled::Done;
        }
        for arrived in std::mem::take(&mut self.engine.flights[part].inbox) {
            let flight = &mut self.engine.flights[part];
            match arrived {
                Arrived::Failed(attempt) => flight.attempts.failed(attempt),
                Arrived::Reply(attempt, reply) => {
                    if flight.attempts.answered(attempt) {
                        flight.replies.insert(attempt, reply);
                    }
                }
            }
        }
        for _ in 0..ROUNDS_MAX {
            let mut attempts = std::mem::take(&mut self.engine.flights[part].attempts);
            let mut hedges = self.engine.hedges;
            let step = attempts.next(self.now, &|node| self.standing(node), &mut hedges);
            (self.engine.flights[part].attempts, self.engine.hedges) = (attempts, hedges);
            self.trace.note(self.now, format_args!("  part {part}: {step:?}"));
            match step {
                Step::Send { call, node, .. } => {
                    let units = self.engine.flights[part].attempts.units_of(call).to_vec();
                    let budget = self.budget(node, part, &units);
                    let now = self.now;
                    self.engine.flights[part].attempts.started(call, now, budget);
                    self.send(part, call, node);
                    if let Some(position) = self.engine.flights[part]
                        .inbox
                        .iter()
                        .position(|arrived| matches!(arrived, Arrived::Failed(_)))
                    {
                        self.engine.flights[part].inbox.remove(position);
                        self.engine.flights[part].attempts.failed(call);
                    }
                }
                Step::Compute { units, .. } => self.compute(part, units),
                Step::Lost(units) => {
                    self.check_lost(part, units);
                    return Settled::Lost;
                }
                Step::Add(call) => self.add(part, call),
                Step::Drop(call, why) => {
                    self.engine.flights[part].replies.remove(&call);
                    let wire = self.wire(part, call);
                    if let Some((wire, node)) = wire {
                        if why == Why::GaveUp {
                            self.handle(Event::Missed(node));
                        }
                        if why != Why::Beaten {
                            self.engine.over(wire);
                        }
                    }
                }
                Step::Overdue(_, node) => self.engine.doubts.overdue(node, self.now),
                Step::Wait(until) => {
                    let delay = until.saturating_sub(self.now);
                    if until < Duration::MAX {
                        self.at(delay, Happening::Engine);
                    }
                    return Settled::Waits;
                }
                Step::Done => return Settled::Done,
            }
        }
        panic!("the calls of a layer go in circles");
    }

    fn wire(&self, part: usize, call: Attempt) -> Option<(u64, NodeIndex)> {
        let found = self.engine.out.iter().find(|(_, out)| out.part == part && out.attempt == call);
        found.map(|(wire, out)| (*wire, out.node))
    }

    /// The router computes these itself.
    fn compute(&mut self, part: usize, units: Units) {
        let flight = &mut self.engine.flights[part];
        let pass = self.engine.pass.as_mut().expect("a step is under way");
        let units = flight.attempts.list(units).to_vec();
        for unit in &units {
            let work = &mut flight.work[*unit as usize];
            work.added += 1;
            compute(&self.toy, flight.layer, work, &mut pass.rows);
        }
        self.summary.computed_here += units.len() as u64;
        let time = self.engine.part_takes * units.len() as u32;
        self.works_for(time);
    }

    /// A step is over: tokens are chosen.
    fn deliver(&mut self) {
        let Some(pass) = self.engine.pass.take() else { return };
        self.engine.held_since = None;
        for (index, slice) in pass.plan.slices.iter().enumerate() {
            self.engine.scheduler.advance(slice);
            let last = pass.rows.iter().rfind(|row| row.slice == index);
            let (Some(live), Some(last)) = (self.engine.live.get_mut(&slice.id), last) else { continue };
            assert_eq!(last.position + 1, slice.tokens.end);
            if !slice.samples {
                continue;
            }
            let token = self.toy.token(&last.x);
            let client = slice.id as usize;
            let request = &self.clients[client];
            if token != END {
                live.tokens.push(token);
            }
            if token != END && live.tokens.len() < request.prompt.len() + request.tokens_max {
                self.engine.scheduler.append(slice.id);
                continue;
            }
            let tokens = live.tokens.split_off(request.prompt.len());
            self.engine.live.remove(&slice.id);
            self.engine.scheduler.remove(slice.id);
            self.end(client, End::Complete(tokens));
        }
    }

    /// Nobody has what the step needs: its requests end, unless nodes are loading it.
    fn fail_step(&mut self, part: usize) {
        let Some(pass) = self.engine.pass.take() else { return };
        (0..PARTS).for_each(|part| self.engine.close_flight(part));
        let cluster = &self.router.cluster;
        let since = *self.engine.held_since.get_or_insert(self.now);
        let is_new = !Arc::ptr_eq(&cluster.routes(), &self.engine.flights[part].routes);
        let may_come = is_new || cluster.may_recover();
        if self.now - since < HOLD_MAX && may_come {
            self.works_for(if is_new { Duration::ZERO } else { HOLD_SLICE });
            return;
        }
        self.engine.held_since = None;
        for slice in &pass.plan.slices {
            if self.engine.live.remove(&slice.id).is_some() {
                self.engine.scheduler.remove(slice.id);
                self.end(slice.id as usize, End::Unavailable);
            }
        }
    }

    /// Hedges are a twentieth of the calls at most, and a few at the start.
    pub(crate) fn check_hedges(&self) {
        let Summary { calls, hedges, .. } = self.summary;
        let most = calls / u64::from(CALLS_PER_HEDGE) + u64::from(HEDGE_BURST);
        assert!(hedges <= most, "{hedges} hedges of {calls} calls");
    }
}

/// Adds what a part of an expert gives to the sums of its rows.
fn compute(toy: &Toy, layer: u16, work: &Work, rows: &mut [StepRow]) {
    for row in &work.rows {
        let StepRow { x, sums, .. } = &mut rows[*row];
        let own = toy.part((layer, work.expert), work.blocks, x);
        sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
    }
}

enum Settled {
    Done,
    Waits,
    Lost,
}

/// Reads a reply as mesh-net does; none where it belongs to another call.
fn read(pool: &Pool, body: &[u8], (call, rows): (u64, u32)) -> Result<Option<Reply>, ()> {
    let header = Header::new(Op::Reply, body.len()).map_err(|_| ())?;
    let mut buffer = pool.take(header).map_err(|_| ())?;
    buffer.body_mut().copy_from_slice(body);
    let reply = Reply::parse(buffer).map_err(|_| ())?;
    if reply.head().call != call {
        return Ok(None);
    }
    reply.view().check_against(call, rows, HIDDEN as u32).map_err(|_| ())?;
    Ok(Some(reply))
}
