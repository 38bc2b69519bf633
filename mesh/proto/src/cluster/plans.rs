//! When a plan is made, for whom, and when it comes into use.
//!
//! In the order of urgency: what a leaving node holds is handed over; what the operator asked for, or a node will not
//! do any more; newcomers; nodes that are away; what is wanted more often than before; and, where nothing is to change,
//! what the plan in use gives now that others serve than it was made for. One at a time: what is due is
//! worked out of the state at every event, so nothing is forgotten by an event that comes at a bad moment. A plan that
//! comes back is taken if those it was made for are still there as they were; else it is due again.
//!
//! A plan that would leave more to the router than the one in use, because somebody died or refused while it was loaded,
//! is given up: nodes are told to go back to what is in use, which they still hold. A node with a slow link may load for
//! hours; it is waited for while it shows progress, and the plan is given up for what is more urgent than it. The price:
//! another newcomer waits as long.

use std::time::Duration;

use mesh_wire::control::Placement;

use super::nodes::{Cover, Link, Node, Order};
use super::stage::{Stage, per_layer, place};
use super::{Action, Cluster, HANDOVER_MAX, SWITCH_WAIT_MAX};
use crate::changes::{Change, Why};
use crate::machine::Capacity;
use crate::placement::Plan;
use crate::planner::{Proposal, Task, Work};
use crate::popularity::Popularity;
use crate::routes::NodeIndex;
use crate::standin::Loss;

/// Bytes that a node gets at a time of what nobody else holds. Every step brings some of it into use, and together with
/// `STEP_EVERY` a node reads at most half of what gigabit Ethernet carries: calls go on beside it.
const STEP_BYTES: u64 = 512 << 20;

/// Bytes that a node gets at a time of copies, which no token waits for.
const COPIES_STEP_BYTES: u64 = 128 << 20;

/// Least time between such steps.
const STEP_EVERY: Duration = Duration::from_secs(10);

/// Longest time that a plan may take to be made: a thousand times what it takes for the largest clusters.
const ERRAND_MAX: Duration = Duration::from_secs(60);

/// Batches of counts before anything is planned by them: the mean then holds most of what it will.
const BATCHES_MIN: u64 = 8;

/// A plan that is being made.
#[derive(Debug)]
pub(super) struct Errand {
    ticket: u64,
    since: Duration,
    /// `None`: nothing is to change, and what is predicted is worked out anew.
    pub(super) why: Option<Why>,
    /// Because of whom.
    nodes: Vec<NodeIndex>,
    /// Epoch of the plan it changes, 0 for none.
    base: u64,
    /// Who has to be there still, and since when they are.
    needs: Vec<(NodeIndex, Duration)>,
    /// What is done for `nodes` by it, if they are away.
    cover: Cover,
}

impl Cluster {
    /// Takes the next plan into use or gives it up, lets leaving nodes go, and has a plan made if one is due.
    pub(super) fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.resolve(now, actions);
        self.release_late(now, actions);
        // One that does not come back, because whoever worked at it failed, is due again.
        self.errand.take_if(|errand| now.saturating_sub(errand.since) >= ERRAND_MAX);
        if self.next.is_some() || self.errand.is_some() {
            return;
        }
        let Some((mut errand, work)) = self.due(now) else { return };
        self.ticket += 1;
        (errand.ticket, errand.since) = (self.ticket, now);
        match work {
            Work::Tune => self.considered = now,
            Work::Forecast => self.foreseen = now,
            Work::Anew(_) | Work::StandIns(_) => {}
        }
        let before = self.current.as_ref().map(|stage| stage.plan.clone());
        let serving =
            (0..).zip(&self.nodes).filter(|(_, node)| node.serves()).map(|(node, _)| node).collect();
        let known = self.popularity.batches() >= BATCHES_MIN;
        let popularity: Option<Popularity> = known.then(|| self.popularity.clone());
        let (facts, wishes) = (self.facts.clone(), self.policy.wishes);
        let task = Task { ticket: self.ticket, facts, wishes, before, serving, popularity, work };
        self.errand = Some(errand);
        actions.push(Action::Plan(Box::new(task)));
    }

    /// Connected nodes that no plan was made for as they are.
    pub(super) fn newcomers(&self) -> impl Iterator<Item = (NodeIndex, &Link)> {
        let nodes = (0..).zip(&self.nodes).filter(|(_, node)| node.is_willing() && !node.barred);
        // Who does not answer would be planned for and stood in for in turns.
        let comes = |link: &&Link| link.wants_in && !link.trust.is_suspect();
        nodes.filter_map(move |(index, node)| Some((index, node.link.as_ref().filter(comes)?)))
    }

    /// What is to be planned now.
    fn due(&self, now: Duration) -> Option<(Errand, Work)> {
        if let Some(handover) = self.handover(now) {
            return Some(handover);
        }
        if let Some(why) = self.anew_is_due(now) {
            let slow = why == Why::Joined && self.newcomers().any(|(_, link)| link.stood_back);
            return if slow && self.is_missed(now) { self.loss(now) } else { self.anew(now, why) };
        }
        if self.restored && !self.has_waited(now) {
            return None;
        }
        self.loss(now).or_else(|| self.tune(now)).or_else(|| self.forecast(now))
    }

    fn errand(&self, why: impl Into<Option<Why>>, nodes: Vec<NodeIndex>, needs: &[Capacity]) -> Errand {
        let why = why.into();
        let joined = |node: NodeIndex| Some((node, self.nodes.get(usize::from(node))?.link.as_ref()?.joined));
        let needs = needs.iter().filter_map(|capacity| joined(capacity.node)).collect();
        let base = self.current.as_ref().map_or(0, |stage| stage.epoch);
        Errand { ticket: 0, since: Duration::ZERO, why, nodes, base, needs, cover: Cover::Nothing }
    }

    /// Whether there was silence long enough; or what is due since then, and the last change, are long enough ago.
    fn is_calm(&self, now: Duration, since: Duration) -> bool {
        let patience = &self.policy.patience;
        now.saturating_sub(self.stirred) >= patience.steady
            || now.saturating_sub(self.changed.max(since)) >= patience.at_latest
    }

    /// Whether those who may come back after a restart of the router had the time to.
    fn has_waited(&self, now: Duration) -> bool {
        let enough = match self.policy.plan_at_nodes {
            usize::MAX => self.nodes.iter().filter(|node| !node.revoked).count(),
            nodes => nodes,
        };
        let waited = now.saturating_sub(self.started.unwrap_or(now));
        self.links().count() >= enough || waited >= self.policy.plan_after
    }

    /// Whether a plan is to be made for those who are here, and why.
    fn anew_is_due(&self, now: Duration) -> Option<Why> {
        let measured =
            |link: &Link| now.saturating_sub(link.joined) >= self.policy.measure_within || link.is_measured();
        if !self.links().all(|(_, link)| measured(link)) {
            return None;
        }
        let steady = |link: &Link| now.saturating_sub(link.joined) >= self.policy.patience.steady;
        let mut wanted = None;
        let first_of = self.newcomers().map(|(_, link)| link.joined).min().unwrap_or(now);
        if self.newcomers().any(|(_, link)| steady(link)) && self.is_calm(now, first_of) {
            wanted = Some(Why::Joined);
        }
        if self.wanted.replaced.is_some() {
            wanted = Some(Why::Replaced);
        }
        if self.wanted.asked {
            wanted = Some(Why::Asked);
        }
        match &self.current {
            Some(_) if self.restored => wanted.filter(|_| self.has_waited(now)),
            Some(_) => wanted,
            None if wanted.is_some() || self.has_waited(now) => Some(Why::First),
            None => None,
        }
    }

    /// A plan for those who are here, or will be in a moment.
    fn anew(&self, now: Duration, why: Why) -> Option<(Errand, Work)> {
        let patience = &self.policy.patience;
        let everyone = matches!(why, Why::First | Why::Asked);
        let steady = |link: &Link| now.saturating_sub(link.joined) >= patience.steady;
        let back_soon =
            |node: &Node| node.out_since.is_none_or(|since| now.saturating_sub(since) < patience.unserved);
        let before = self.current.as_ref().map(|stage| &stage.plan);
        let mut capacities = Vec::new();
        for (index, node) in (0..).zip(&self.nodes) {
            let then = before.and_then(|plan| plan.capacity(index));
            match &node.link {
                Some(link) if node.is_willing() => {
                    let member = then.is_some() && !link.wants_in;
                    let comes = !node.barred && !link.trust.is_suspect() && steady(link);
                    let takes_part = if member { back_soon(node) } else { comes };
                    // One that is barred would be waited for in vain, whoever asks.
                    if takes_part || everyone && !node.barred {
                        capacities.push(link.capacity(index));
                    }
                }
                // It was here a moment ago, and keeps its place.
                None if !everyone && !node.revoked && !node.is_quarantined() && back_soon(node) => {
                    capacities.extend(then);
                }
                _ => {}
            }
        }
        let is_here = |capacity: &Capacity| self.nodes[usize::from(capacity.node)].link.is_some();
        if !capacities.iter().any(is_here) {
            return None;
        }
        let nodes = match why {
            Why::Replaced => self.wanted.replaced.into_iter().collect(),
            Why::Joined => {
                let came = |node: &NodeIndex| capacities.iter().any(|capacity| capacity.node == *node);
                self.newcomers().map(|(node, _)| node).filter(came).collect()
            }
            _ => Vec::new(),
        };
        Some((self.errand(why, nodes, &capacities), Work::Anew(capacities)))
    }

    /// Members of the plan in use that nothing may depend on, and those that may take more.
    fn divided(&self, now: Duration, plan: &Plan) -> (Vec<NodeIndex>, Vec<Capacity>) {
        let (mut out, mut able) = (Vec::new(), Vec::new());
        for capacity in &plan.capacities {
            let Some(node) = self.nodes.get(usize::from(capacity.node)) else { continue };
            let away = |since: Duration| now.saturating_sub(since) >= self.policy.patience.unserved;
            let leaving = node.link.as_ref().is_some_and(|link| link.leaving.is_some());
            if leaving || node.is_quarantined() || node.out_since.is_some_and(away) {
                out.push(capacity.node);
            } else if let Some(link) =
                node.link.as_ref().filter(|_| node.is_willing() && node.out_since.is_none())
            {
                // As it is now; as fast as it was planned with, so that nothing moves by noise.
                able.push(Capacity { memory_bytes: link.hello.memory_bytes, ..*capacity });
            }
        }
        (out, able)
    }

    /// Stand-ins for nodes that said they leave.
    fn handover(&self, now: Duration) -> Option<(Errand, Work)> {
        let current = self.current.as_ref()?;
        let waits = |link: &Link| link.leaving.is_some() && !link.released && !link.handing_over;
        let nodes: Vec<NodeIndex> =
            self.links().filter(|(_, link)| waits(link)).map(|(node, _)| node).collect();
        if nodes.is_empty() {
            return None;
        }
        let (out, able) = self.divided(now, &current.plan);
        let errand = self.errand(Why::Leaving, nodes, &able);
        Some((errand, Work::StandIns(Loss { out, gone: Vec::new(), able, step_bytes: u64::MAX })))
    }

    /// Nodes that are away for so long, and for which less than this was done.
    fn away(&self, now: Duration, than: Duration, cover: Cover) -> impl Iterator<Item = NodeIndex> {
        let long = move |node: &Node| node.out_since.is_some_and(|since| now.saturating_sub(since) >= than);
        let of = move |(_, node): &(NodeIndex, &Node)| long(node) && node.covered < cover;
        (0..).zip(&self.nodes).filter(of).map(|(node, _)| node)
    }

    /// Whether nothing has been done yet about what only a lost node held.
    fn is_missed(&self, now: Duration) -> bool {
        self.away(now, self.policy.patience.unserved, Cover::Served).next().is_some()
    }

    /// Stand-ins for nodes that are away, or copies of what they held.
    fn loss(&self, now: Duration) -> Option<(Errand, Work)> {
        let current = self.current.as_ref()?;
        if now < self.step_after {
            return None;
        }
        let patience = &self.policy.patience;
        let urgent: Vec<NodeIndex> = self.away(now, patience.unserved, Cover::Served).collect();
        // Copies are never made before what nobody holds is taken over.
        let after = patience.lost.max(patience.unserved);
        let lost: Vec<NodeIndex> = self.away(now, after, Cover::Whole).collect();
        let (nodes, gone, cover) = match (urgent.is_empty(), lost.is_empty()) {
            (false, _) => (urgent, Vec::new(), Cover::Served),
            (true, false) => (lost.clone(), lost, Cover::Whole),
            (true, true) => return None,
        };
        let since =
            nodes.iter().filter_map(|node| self.nodes[usize::from(*node)].out_since).min().unwrap_or(now);
        let due_since = since.saturating_add(patience.unserved);
        if !self.is_calm(now, due_since) {
            return None;
        }
        let (out, able) = self.divided(now, &current.plan);
        let step_bytes = if cover == Cover::Served { STEP_BYTES } else { COPIES_STEP_BYTES };
        let errand = Errand { cover, ..self.errand(Why::Lost, nodes, &able) };
        Some((errand, Work::StandIns(Loss { out, gone, able, step_bytes })))
    }

    /// A better place for what is wanted often.
    fn tune(&self, now: Duration) -> Option<(Errand, Work)> {
        let current = self.current.as_ref()?;
        let every = self.policy.patience.reconsider;
        let due = now.saturating_sub(self.considered.max(self.changed)) >= every
            && self.popularity.batches() >= BATCHES_MIN
            && current.plan.cuts == 1;
        let capacities = &current.plan.capacities;
        let serves = |capacity: &Capacity| {
            self.nodes.get(usize::from(capacity.node)).is_some_and(|node| node.serves() && node.is_willing())
        };
        if !due || !capacities.iter().all(serves) {
            return None;
        }
        Some((self.errand(Why::Frequencies, Vec::new(), capacities), Work::Tune))
    }

    /// What the plan in use gives with other nodes than it was made for.
    fn forecast(&self, now: Duration) -> Option<(Errand, Work)> {
        let current = self.current.as_ref()?;
        let serves = |node: &NodeIndex| self.nodes.get(usize::from(*node)).is_some_and(Node::serves);
        let serving = current.plan.capacities.iter().map(|capacity| capacity.node).filter(serves);
        let rested = now.saturating_sub(self.foreseen) >= self.policy.patience.at_latest;
        let due = rested && !self.loads_current() && self.is_calm(now, Duration::ZERO);
        if !due || serving.eq(current.present.iter().copied()) {
            return None;
        }
        Some((self.errand(None, Vec::new(), &[]), Work::Forecast))
    }

    /// A plan came back.
    pub(super) fn planned(&mut self, now: Duration, proposal: Proposal, actions: &mut Vec<Action>) {
        let Some(errand) = self.errand.take_if(|errand| errand.ticket == proposal.ticket) else { return };
        let base = self.current.as_ref().map_or(0, |stage| stage.epoch);
        let still = |(node, joined): &(NodeIndex, Duration)| {
            let node = &self.nodes[usize::from(*node)];
            node.is_willing() && node.link.as_ref().is_some_and(|link| link.joined == *joined)
        };
        if base != errand.base || !errand.needs.iter().all(still) {
            return;
        }
        for node in &errand.nodes {
            let entry = &mut self.nodes[usize::from(*node)];
            if !proposal.more && entry.out_since.is_some() {
                entry.covered = entry.covered.max(errand.cover);
            }
            if let Some(link) = entry.link.as_mut().filter(|_| errand.why == Some(Why::Leaving)) {
                link.handing_over = true;
            }
        }
        if proposal.more {
            self.step_after = now.saturating_add(STEP_EVERY);
        }
        let Some(plan) = proposal.plan else {
            if errand.why == Some(Why::Leaving) {
                errand.nodes.iter().for_each(|node| self.release(*node, actions));
            }
            return;
        };
        let Some(why) = errand.why else {
            if let Some(current) = self.current.as_mut() {
                (current.plan.predicted, current.present) = (plan.predicted, proposal.present);
            }
            return;
        };
        let change = Change {
            epoch: 0,
            why,
            nodes: errand.nodes,
            before_ns: proposal.before_ns,
            after_ns: plan.predicted.token_ns,
            moved_bytes: proposal.moved_bytes,
        };
        self.load(now, (plan, proposal.present), change, actions);
    }

    /// Has a new plan loaded. With it come the nodes that what is predicted of it counts on.
    fn load(
        &mut self,
        now: Duration,
        (plan, present): (Plan, Vec<NodeIndex>),
        change: Change,
        actions: &mut Vec<Action>,
    ) {
        let anew = !matches!(change.why, Why::Lost | Why::Leaving | Why::Frequencies);
        self.restored = false;
        if anew {
            self.wanted.replaced = None;
            self.wanted.asked &= !matches!(change.why, Why::Asked | Why::First);
            for node in plan.left_out(&self.facts, &present) {
                let note =
                    "would make every token slower by computing; it holds copies of others' experts at most";
                self.report(node, note.to_owned(), actions);
            }
        }
        let held = self.links().map(|(_, link)| link.hello.held_epoch).max().unwrap_or(0);
        self.epoch = self.epoch.max(held) + 1;
        let stage = Stage {
            epoch: self.epoch,
            since: now,
            lingers: false,
            plan,
            present,
            change: Change { epoch: self.epoch, ..change },
        };
        let first = self.current.is_none();
        for capacity in &stage.plan.capacities {
            let entry = &mut self.nodes[usize::from(capacity.node)];
            let willing = entry.is_willing();
            let Some(link) = entry.link.as_mut().filter(|_| willing) else { continue };
            if !stage.plan.suits(capacity.node, link.hello.memory_bytes, &self.facts) {
                link.wants_in = true;
                continue;
            }
            *(if first { &mut link.current } else { &mut link.next }) = Order::Sent;
            link.wants_in &= !anew;
            link.speed.per_layer = link.speed.per_layer.max(per_layer(&stage.plan, capacity.node));
            actions.push(place(&self.facts, &stage, capacity.node));
        }
        for (node, entry) in (0..).zip(&mut self.nodes) {
            if let Some(link) = entry.link.as_mut() {
                link.wants_in |= stage.plan.capacity(node).is_none();
            }
        }
        *(if first { &mut self.current } else { &mut self.next }) = Some(stage);
        if first {
            self.changed = now;
        }
    }

    /// The next plan comes into use when all have answered, if nobody else's experts are lost by that. After
    /// `SWITCH_WAIT_MAX` it does not wait for all, and if experts are lost by that, only for those that get on, and only
    /// as long as nothing else is urgent.
    fn resolve(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Some(next) = &self.next else { return };
        let late = now.saturating_sub(next.since) >= SWITCH_WAIT_MAX;
        if !late && self.links().any(|(_, link)| link.loads_next()) {
            return;
        }
        let open = self.open(next, |_, link| link.next);
        // Those that hand over by this plan are on their way out in any case.
        let leaves = |node: NodeIndex| next.change.why == Why::Leaving && next.change.nodes.contains(&node);
        let open_now = self.current.as_ref().map_or(u64::MAX, |current| {
            self.open(current, |node, link| if leaves(node) { Order::NotSent } else { link.current })
        });
        let comes = |link: &Link| link.loads_next() && link.is_too_slow(now, next.since).is_none();
        let open_then = self.open(next, |_, link| if comes(link) { Order::Held } else { link.next });
        if open <= open_now {
            self.switch(now, actions);
        } else if open_then <= open_now && !self.is_pressed(now, next) {
            self.next.iter_mut().for_each(|next| next.lingers = true);
        } else {
            self.give_up(now, actions);
        }
    }

    /// Whether something is due that cannot wait until all have loaded this plan. What they have loaded by then is not
    /// lost: nodes keep what they fetched on disk.
    fn is_pressed(&self, now: Duration, next: &Stage) -> bool {
        let Some((errand, _)) = self.due(now) else { return false };
        match errand.why {
            Some(Why::Asked | Why::Replaced | Why::Leaving) => true,
            Some(Why::Lost) => {
                let known = |node| next.change.nodes.contains(node);
                errand.cover == Cover::Served && !errand.nodes.iter().all(known)
            }
            Some(Why::First | Why::Joined | Why::Frequencies | Why::Restored) | None => false,
        }
    }

    /// Nodes that do not hold what they should, are not here or do not answer.
    fn missing(&self, order: impl Fn(NodeIndex, &Link) -> Order) -> Vec<NodeIndex> {
        let holds = |index: NodeIndex, node: &Node| {
            let held =
                |link: &Link| order(index, link) == Order::Held && !link.released && !link.trust.is_suspect();
            node.link.as_ref().is_some_and(held) && !node.is_quarantined() && !node.barred
        };
        let nodes = (0..).zip(&self.nodes);
        nodes.filter(|(index, node)| !holds(*index, node)).map(|(index, _)| index).collect()
    }

    /// Blocks of experts that only such nodes hold, or nobody.
    fn open(&self, stage: &Stage, order: impl Fn(NodeIndex, &Link) -> Order) -> u64 {
        stage.plan.table.open_blocks(&self.missing(order))
    }

    fn switch(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Some(next) = self.next.take() else { return };
        self.changed = now;
        for (index, node) in (0..).zip(&mut self.nodes) {
            let Some(link) = node.link.as_mut() else { continue };
            link.current = std::mem::replace(&mut link.next, Order::NotSent);
            // Others may have room for what it refused.
            if link.current == Order::Refused && link.leaving.is_none() && next.plan.load(index).experts > 0 {
                self.wanted.replaced = Some(index);
            }
        }
        let handed_over =
            if next.change.why == Why::Leaving { next.change.nodes.clone() } else { Vec::new() };
        self.current = Some(next);
        handed_over.into_iter().for_each(|node| self.release(node, actions));
    }

    /// The next plan would leave more to the router than the one in use: nodes go back to that, which they hold.
    fn give_up(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (Some(given_up), Some(current)) = (self.next.take(), &self.current) else { return };
        self.changed = now;
        for (index, node) in (0..).zip(&mut self.nodes) {
            let Some(link) = node.link.as_mut() else { continue };
            let suits = current.plan.suits(index, link.hello.memory_bytes, &self.facts);
            let asked = std::mem::replace(&mut link.next, Order::NotSent);
            if asked == Order::Sent && link.leaving.is_none() {
                match link.is_too_slow(now, given_up.since) {
                    Some(note) => {
                        link.decline(now);
                        actions.push(Action::Report(index, note));
                    }
                    None => link.stood_back = true,
                }
            }
            link.wants_in = !suits;
            link.handing_over = false;
            let both = current.plan.bytes_with(&given_up.plan, index, &self.facts);
            match link.current {
                // Behind what is given up, which may be loaded yet and would push out what is in use, or has.
                Order::Held | Order::Sent if asked != Order::NotSent && link.leaving.is_none() => {
                    if both > link.hello.memory_bytes {
                        link.current = Order::Sent;
                    }
                }
                Order::NotSent if suits && link.leaving.is_none() => link.current = Order::Sent,
                _ => continue,
            }
            actions.push(place(&self.facts, current, index));
        }
        let Change { why, nodes, .. } = given_up.change;
        match why {
            Why::Asked => self.wanted.asked = true,
            Why::Replaced => self.wanted.replaced = nodes.first().copied(),
            _ => {}
        }
        for node in nodes {
            self.nodes[usize::from(node)].covered = Cover::Nothing;
        }
    }

    /// Lets those go that need not wait, or must not any longer.
    fn release_late(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let late = |link: &Link| {
            let since = link.leaving?;
            let idle = link.current != Order::Held;
            Some(idle || now.saturating_sub(since) >= HANDOVER_MAX)
        };
        let due: Vec<NodeIndex> =
            self.links().filter(|(_, link)| late(link) == Some(true)).map(|(node, _)| node).collect();
        due.into_iter().for_each(|node| self.release(node, actions));
    }

    /// A leaving node gets no more calls. A placement without experts tells it so.
    fn release(&mut self, node: NodeIndex, actions: &mut Vec<Action>) {
        let (model, epoch) = (self.facts.fingerprint, self.current.as_ref().map_or(0, |stage| stage.epoch));
        let Some(link) = self.link(node).filter(|link| link.leaving.is_some() && !link.released) else {
            return;
        };
        link.released = true;
        actions.push(Action::Place(node, Placement { epoch, model, experts: Vec::new() }));
    }
}
