//! What nodes do, one by one: they come, answer, go silent, leave, refuse, send nonsense.
//!
//! Each event changes what is known of one node and sends it at most what it asks for; what follows for the placement
//! is left to `plans`. Refuses nodes of other models, kernels or histories, with the remedy.

use std::time::Duration;

use mesh_wire::control::{Health, Hello, Loading, Placed};

use super::stage::{Stage, per_layer, place};
use super::{Action, Cluster, EPOCH_MAX, LOADING_MAX, MALFORMED_MAX, SWITCH_WAIT_MAX, WRONG_MAX};
use crate::claims::{Claims, believable, bounded};
use crate::facts::LinkSpeed;
use crate::health::{Flaps, Speed, Trust};
use crate::heat::Heat;
use crate::machine::{Capacity, Machine};
use crate::routes::NodeIndex;

/// How long a node that refused its placement is left out of plans: at first, and at most. Each try with it costs the
/// others a load.
pub(super) const DECLINED_MIN: Duration = Duration::from_secs(30);
const DECLINED_MAX: Duration = Duration::from_secs(900);

#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) link: Option<Link>,
    pub(super) note: String,
    /// Times it sent what no correct node sends; kept over reconnects.
    malformed: u32,
    /// Times it was proven wrong; kept over reconnects.
    wrong: u32,
    /// Kept over reconnects, or a node could reconnect to be asked again.
    pub(super) heat: Heat,
    flaps: Flaps,
    /// It lost its connection too often, and gets no calls for now.
    pub(super) barred: bool,
    pub(super) revoked: bool,
    /// Since when it does not serve its part of the plan in use, and is not loading it either.
    pub(super) out_since: Option<Duration>,
    /// What was done about that.
    pub(super) covered: Cover,
}

/// What others do for a node that is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cover {
    /// Nothing yet.
    #[default]
    Nothing,
    /// What only it held they hold, as far as there is room.
    Served,
    /// And copies are as many as before.
    Whole,
}

impl Node {
    pub(super) fn is_quarantined(&self) -> bool {
        self.malformed >= MALFORMED_MAX || self.wrong >= WRONG_MAX
    }

    /// Whether it may be part of a plan, as far as it says itself.
    pub(super) fn is_willing(&self) -> bool {
        let willing = |link: &Link| link.declined.is_none() && link.leaving.is_none();
        !self.is_quarantined() && self.link.as_ref().is_some_and(willing)
    }

    /// Whether calls go there.
    pub(super) fn serves(&self) -> bool {
        let serves = |link: &Link| link.current == Order::Held && !link.released && !link.trust.is_suspect();
        !self.is_quarantined() && !self.barred && self.link.as_ref().is_some_and(serves)
    }

    /// Notes whether it does what the plan in use wants of it, if that wants anything.
    pub(super) fn note_absence(&mut self, now: Duration, is_part: bool) {
        let loading =
            |link: &Link| link.current == Order::Sent || matches!(link.next, Order::Sent | Order::Held);
        let comes = !self.barred && self.is_willing() && self.link.as_ref().is_some_and(loading);
        if self.serves() || !is_part {
            (self.out_since, self.covered) = (None, Cover::Nothing);
        } else if comes {
            self.out_since = None;
        } else {
            self.out_since.get_or_insert(now);
        }
    }
}

/// A connection that passed the checks.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) hello: Hello,
    /// Where it stands with `Cluster::current`.
    pub(super) current: Order,
    /// Where it stands with `Cluster::next`.
    pub(super) next: Order,
    /// It refused a placement, and is left out of plans until then, or until it reconnects or the operator asks for a
    /// plan. What was in the way, a full disk, may be gone some day; planning with it again and again would reload the
    /// others for nothing.
    pub(super) declined: Option<Duration>,
    /// Placements it refused since it held one.
    refusals: u32,
    pub(super) epoch: u64,
    pub(super) weight_bytes: u64,
    pub(super) health: Option<Health>,
    pub(super) trust: Trust,
    pub(super) speed: Speed,
    pub(super) joined: Duration,
    /// How far it is with what it is loading; nothing once it says otherwise.
    pub(super) loading: Option<Loading>,
    /// How far it was when it last said so, and when that was news; it may have begun as it came.
    loaded: Loading,
    progressed: Duration,
    pub(super) measured: LinkSpeed,
    /// A plan that waited for it was given up for something urgent; such things come first now.
    pub(super) stood_back: bool,
    /// No plan has been made for it as it is now.
    pub(super) wants_in: bool,
    /// When it said that it is going to stop.
    pub(super) leaving: Option<Duration>,
    /// Others were asked to take over from it; it may go.
    pub(super) handing_over: bool,
    pub(super) released: bool,
}

impl Link {
    /// Whether it is loading its part of a plan that comes into use when it has.
    pub(super) fn loads_next(&self) -> bool {
        self.next == Order::Sent && self.leaving.is_none()
    }

    /// Why it is not waited for any longer, if so, where it was asked to load something at `asked`.
    pub(super) fn is_too_slow(&self, now: Duration, asked: Duration) -> Option<String> {
        let still = now.saturating_sub(self.progressed.max(asked));
        if still >= SWITCH_WAIT_MAX {
            let seconds = SWITCH_WAIT_MAX.as_secs();
            return Some(format!("showed no progress with its placement for {seconds} s"));
        }
        let hours = LOADING_MAX.as_secs() / 3600;
        let endless = now.saturating_sub(asked) >= LOADING_MAX;
        endless.then(|| format!("did not load its placement within {hours} h"))
    }

    pub(super) fn is_measured(&self) -> bool {
        self.measured != LinkSpeed::default()
    }

    /// Leaves it out of plans for a while, longer each time.
    pub(super) fn decline(&mut self, now: Duration) {
        let pause = DECLINED_MIN.saturating_mul(1_u32.checked_shl(self.refusals).unwrap_or(u32::MAX));
        self.declined = Some(now.saturating_add(pause.min(DECLINED_MAX)));
        self.refusals = self.refusals.saturating_add(1);
    }

    pub(super) fn capacity(&self, node: NodeIndex) -> Capacity {
        let machine = Machine { weight_mb_s: self.speed.weight_mb_s, link: self.measured };
        Capacity { node, memory_bytes: self.hello.memory_bytes, machine }
    }
}

/// A placement on its way to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    NotSent,
    Sent,
    Held,
    Refused,
}

impl Cluster {
    pub(super) fn report(&mut self, node: NodeIndex, note: String, actions: &mut Vec<Action>) {
        if let Some(entry) = self.nodes.get_mut(usize::from(node)) {
            entry.note.clone_from(&note);
            actions.push(Action::Report(node, note));
        }
    }

    /// Why a node may not take part, with the remedy.
    pub(super) fn objection(&self, hello: &Hello) -> Option<String> {
        if hello.model != self.facts.fingerprint {
            let short =
                |hash: &[u8; 32]| hash[..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            return Some(format!(
                "the node has model {}, the router serves {}: start both with the same --model and --weights",
                short(&hello.model),
                short(&self.facts.fingerprint),
            ));
        }
        if self.policy.require_exact && !hello.exact {
            return Some(format!(
                "kernels '{}' do not compute the exact bits that the router promises: start the node with \
                 --kernels exact, or the router with --kernels fastest",
                hello.kernels
            ));
        }
        (hello.held_epoch >= EPOCH_MAX && hello.held_epoch > self.epoch).then(|| {
            format!("the node claims to hold epoch {}, which cannot be: restart the node", hello.held_epoch)
        })
    }

    pub(super) fn joined(
        &mut self,
        now: Duration,
        (node, hello): (NodeIndex, Hello),
        actions: &mut Vec<Action>,
    ) {
        if usize::from(node) >= self.nodes.len() {
            return;
        }
        let entry = &mut self.nodes[usize::from(node)];
        entry.link = None;
        if entry.revoked {
            actions.push(Action::Disconnect(node, "the operator revoked this node's key".into()));
            return;
        }
        if !entry.is_quarantined() && !entry.barred {
            entry.note.clear();
        }
        if let Some(reason) = self.objection(&hello) {
            self.nodes[usize::from(node)].note.clone_from(&reason);
            actions.push(Action::Disconnect(node, reason));
            return;
        }
        let (hello, claims) = bounded(hello);
        // Who claims what cannot be is not believed in anything: its speed is unknown.
        let weight_mb_s =
            if matches!(claims, Claims::Cut(_)) { Default::default() } else { hello.weight_mb_s };
        self.outgrow(hello.held_epoch, actions);
        let mut link = Link {
            speed: Speed {
                weight_mb_s,
                expert_bytes: self.facts.expert_bytes,
                per_layer: 0,
                round_trip: Duration::ZERO,
            },
            hello,
            current: Order::NotSent,
            next: Order::NotSent,
            declined: None,
            refusals: 0,
            epoch: 0,
            weight_bytes: 0,
            health: None,
            trust: Trust::default(),
            joined: now,
            loading: None,
            loaded: Loading::default(),
            progressed: now,
            measured: LinkSpeed::default(),
            stood_back: false,
            wants_in: false,
            leaving: None,
            handing_over: false,
            released: false,
        };
        self.stirred = now;
        self.welcome(node, &mut link, actions);
        self.nodes[usize::from(node)].link = Some(link);
        match claims {
            Claims::Sound => {}
            // Why it is left out matters more.
            _ if self.nodes[usize::from(node)].is_quarantined() => {}
            Claims::Unmeasured(note) => self.nodes[usize::from(node)].note = note,
            Claims::Cut(note) => self.report(node, note, actions),
        }
    }

    /// Gives a node that came its part of the newest plan, if that plan still fits what it has. An older plan would
    /// only be loaded to be dropped, unless it holds that already.
    fn welcome(&self, node: NodeIndex, link: &mut Link, actions: &mut Vec<Action>) {
        let suits = |stage: &&Stage| stage.plan.suits(node, link.hello.memory_bytes, &self.facts);
        let (current, next) = (self.current.as_ref(), self.next.as_ref());
        let held = |stage: &&Stage| next.is_none() || link.hello.held_epoch == stage.epoch;
        let (current, next) = (current.filter(suits).filter(held), next.filter(suits));
        for (stage, order) in [(current, &mut link.current), (next, &mut link.next)] {
            let Some(stage) = stage else { continue };
            *order = Order::Sent;
            link.speed.per_layer = link.speed.per_layer.max(per_layer(&stage.plan, node));
            actions.push(place(&self.facts, stage, node));
        }
        let newest = self.next.as_ref().or(self.current.as_ref());
        link.wants_in = newest.is_some_and(|stage| !suits(&stage));
    }

    /// An earlier router's plan that is older than what a node holds was not its last. It gets an epoch beyond all, and
    /// nodes that are here are asked again.
    pub(super) fn outgrow(&mut self, held_epoch: u64, actions: &mut Vec<Action>) {
        let Some(stage) = self.current.as_mut().filter(|stage| self.restored && stage.epoch < held_epoch)
        else {
            return;
        };
        stage.epoch = held_epoch + 1;
        stage.change.epoch = stage.epoch;
        self.epoch = self.epoch.max(stage.epoch);
        for (node, entry) in (0..).zip(&mut self.nodes) {
            let Some(link) = entry.link.as_mut().filter(|link| link.current != Order::NotSent) else {
                continue;
            };
            link.current = Order::Sent;
            actions.push(place(&self.facts, stage, node));
        }
    }

    /// Its connection is gone. If that happens again and again, the routes shall not flap with it.
    pub(super) fn lost(&mut self, now: Duration, node: NodeIndex, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        let Some(link) = entry.link.take() else { return };
        self.stirred = now;
        if link.leaving.is_some() {
            return;
        }
        let Some(pause) = entry.flaps.lost(now) else { return };
        entry.barred = true;
        if entry.is_quarantined() {
            return;
        }
        let note =
            format!("its connection was lost again and again; it gets no calls for {} s", pause.as_secs());
        self.report(node, note, actions);
    }

    pub(super) fn malformed(&mut self, node: NodeIndex, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        entry.malformed = entry.malformed.saturating_add(1);
        if entry.malformed == MALFORMED_MAX {
            let note = format!(
                "sent what no correct node sends, {MALFORMED_MAX} times; it is left out until `moemesh nodes pardon`"
            );
            self.report(node, note, actions);
            self.replace(node);
        }
    }

    pub(super) fn lied(&mut self, node: NodeIndex, how: &str, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        entry.wrong = entry.wrong.saturating_add(1);
        if entry.wrong == WRONG_MAX {
            self.report(node, format!("{how}; it is left out until `moemesh nodes pardon`"), actions);
            self.replace(node);
        }
    }

    /// Takes in a report. True if it changes who is to be asked.
    pub(super) fn heard(
        &mut self,
        now: Duration,
        (node, health): (NodeIndex, Health),
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return false };
        let Some(link) = &mut entry.link else { return false };
        let vitals = believable(health.vitals);
        link.health = Some(Health { vitals, ..health });
        // While it loads it says so after each report.
        link.loading = None;
        let Some(change) = entry.heat.report(now, vitals) else { return false };
        actions.push(Action::Report(node, change.to_string()));
        true
    }

    /// Notes whether it got on with what it is loading. Less than before is progress, too: what is fetched is then read
    /// into memory, and counts from nothing; a blob with the wrong hash is fetched again.
    pub(super) fn loads(&mut self, now: Duration, node: NodeIndex, loading: Loading) {
        let Some(link) = self.link(node) else { return };
        link.loading = Some(loading);
        if loading != link.loaded {
            (link.loaded, link.progressed) = (loading, now);
        }
    }

    /// A node will not serve any more; the others shall hold what it was to hold.
    pub(super) fn replace(&mut self, node: NodeIndex) {
        let newest = self.next.as_ref().or(self.current.as_ref());
        if newest.is_some_and(|stage| stage.plan.load(node).experts > 0) {
            self.wanted.replaced = Some(node);
        }
    }

    /// The operator lets a node back in. It is planned for, if the plan was made without it.
    pub(super) fn pardon(&mut self, node: NodeIndex) {
        let newest = self.next.as_ref().or(self.current.as_ref());
        let without = newest.is_some_and(|stage| stage.plan.capacity(node).is_none());
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        if let Some(link) = entry.link.as_mut() {
            link.wants_in |= without;
        }
        (entry.malformed, entry.wrong) = (0, 0);
        entry.note.clear();
    }

    pub(super) fn placed(
        &mut self,
        now: Duration,
        (node, placed): (NodeIndex, Placed),
        actions: &mut Vec<Action>,
    ) {
        let is = |stage: &Option<Stage>| stage.as_ref().is_some_and(|stage| stage.epoch == placed.epoch);
        let (current, next) = (is(&self.current), is(&self.next));
        let Some(link) = self.link(node) else { return };
        link.loading = None;
        let order = match (current, next) {
            (true, _) => &mut link.current,
            (_, true) => &mut link.next,
            _ => return,
        };
        // Asked again for what it holds, it may say that it does not any more.
        let lost = *order == Order::Held && !placed.refusal.is_empty();
        if *order != Order::Sent && !lost {
            return;
        }
        if placed.refusal.is_empty() {
            *order = Order::Held;
            link.refusals = 0;
            link.stood_back = false;
            link.epoch = placed.epoch;
            link.weight_bytes = placed.weight_bytes;
            return;
        }
        *order = Order::Refused;
        if link.leaving.is_some() {
            // It has better things to do; others take over from it.
            return;
        }
        link.decline(now);
        // The others may have room for its part; of a plan that is not in use yet,
        // that is seen when it would be.
        if current {
            self.wanted.replaced = Some(node);
        }
        let note = format!("refused its placement: {}; its experts stay on the router", placed.refusal);
        self.report(node, note, actions);
    }

    pub(super) fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for (index, node) in (0..).zip(&mut self.nodes) {
            let pardoned = node.barred && !node.flaps.is_barred(now);
            node.barred &= !pardoned;
            if node.link.as_mut().is_some_and(|link| link.trust.tick(now) || pardoned) {
                actions.push(Action::Report(index, "is tried again".into()));
            }
            if let Some(link) =
                node.link.as_mut().filter(|link| link.declined.is_some_and(|until| until <= now))
            {
                (link.declined, link.wants_in) = (None, true);
                actions.push(Action::Report(index, "is asked again to hold experts".into()));
            }
        }
    }
}
