//! One simulated cluster: clock, network, machines and clients around the real router logic, and what must be true of it.
//!
//! Nothing here decides anything about calls, nodes or plans: `Cluster`, `Attempts`, the planner, `Share` and `Scheduler`
//! do, as in the program. The world carries their messages, badly, and compares.

mod engine;

mod members;

mod router;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use mesh_proto::cluster::{Action, Event, NodeState, NodeStatus, Policy};
use mesh_proto::facts::{LinkSpeed, ModelFacts};
use mesh_proto::placement::Copies;
use mesh_proto::planner::Task;
use mesh_proto::routes::NodeIndex;
use mesh_proto::stored::Stored;
use mesh_wire::buffer::Pool;
use mesh_wire::control::{Health, Placed, Placement, Refusal};

use crate::dice::Dice;
use crate::faults::{Fault, Profile};
use crate::machine::{Answer, Call, Machine};
use crate::toy::{MOE_LAYERS, Toy, VOCAB};
use crate::trace::Trace;
use engine::Engine;
use router::Router;

/// Silence after which a connection is given up, as in mesh-net.
const IDLE: Duration = Duration::from_secs(3);
/// How often time is told and connections are looked at.
const TICK: Duration = Duration::from_millis(100);
/// What cannot be delivered is tried again after this (QUIC repeats what was lost).
const BLOCKED: Duration = Duration::from_millis(50);
/// Within this, after the last fault, every request has ended and everything that fits is placed and served: the longest
/// pause of a suspect node, its connection, its loading, and the calls in between, twice.
const CALM_WITHIN: Duration = Duration::from_secs(150);
/// More than any run needs: a run that goes on longer never ends.
const EVENTS_MAX: u64 = 3_000_000;

/// Direction of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To the node.
    Out,
    /// To the router.
    In,
}

/// What is said on a control stream.
#[derive(Clone, Debug)]
pub(crate) enum Control {
    Place(Order),
    Placed(Placed),
    Health(Health),
    Leaving,
}

/// A placement; a trace need not list its experts.
#[derive(Clone)]
pub(crate) struct Order(pub(crate) Placement);

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}, {} experts", self.0.epoch, self.0.experts.len())
    }
}

/// Something that happens at its time.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Tick,
    /// The next control message on a path is due.
    Control(NodeIndex, Way),
    Call(NodeIndex, u64, Call),
    /// On the stream of a call.
    Answer(NodeIndex, u64, Answer),
    /// A node's worker is done.
    Computed {
        node: NodeIndex,
        life: u64,
        connection: u64,
        call: Call,
    },
    Loaded {
        node: NodeIndex,
        life: u64,
        connection: u64,
        placement: Order,
    },
    Dial {
        node: NodeIndex,
        life: u64,
    },
    /// The link of a connection was measured.
    Linked {
        node: NodeIndex,
        connection: u64,
        speed: LinkSpeed,
    },
    Start(NodeIndex),
    /// A leaving node ends, whether or not the router let go of it.
    Gone {
        node: NodeIndex,
        life: u64,
    },
    /// A plan was worked out for this start of the router.
    Planned {
        router: u64,
        task: Box<Task>,
    },
    RouterStart,
    Engine,
    Arrive(usize),
    Cancel(usize),
    Strike(Fault),
    Calm,
}

/// Between the router and one node.
#[derive(Debug, Default)]
struct Path {
    /// Until then nothing arrives: out, in.
    blocked: [Duration; 2],
    /// Control messages under way, in order, with their connection.
    control: [VecDeque<(u64, Control)>; 2],
    control_at: [Duration; 2],
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Complete(Vec<u32>),
    /// 503: nobody could compute some experts.
    Unavailable,
    /// The client went away.
    Cancelled,
    /// The router's process ended.
    Broken,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens_max: usize,
    pub(crate) wanted: Vec<u32>,
    pub(crate) end: Option<End>,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) trace: u64,
    pub(crate) events: u64,
    pub(crate) complete: u64,
    pub(crate) unavailable: u64,
    /// Steps that failed although a node that holds what they lacked is still trusted: it did not answer in time.
    pub(crate) unanswered: u64,
    pub(crate) calls: u64,
    pub(crate) hedges: u64,
    pub(crate) hedges_won: u64,
    pub(crate) retries: u64,
    pub(crate) computed_here: u64,
    pub(crate) ignored: u64,
    pub(crate) malformed: u64,
    pub(crate) quarantined: u64,
    pub(crate) preemptions: u64,
    pub(crate) newcomers_planned: u64,
    pub(crate) stand_ins: u64,
    pub(crate) handovers: u64,
    pub(crate) tuned: u64,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Duration,
    pub(crate) dice: Dice,
    pub(crate) trace: Trace,
    pub(crate) toy: Toy,
    pub(crate) facts: ModelFacts,
    pub(crate) profile: Profile,
    pub(crate) pool: Pool,
    pub(crate) machines: Vec<Machine>,
    pub(crate) router: Router,
    policy: Policy,
    /// Plans on the router's disk, newest last, as text.
    stored: Vec<String>,
    pub(crate) engine: Engine,
    pub(crate) clients: Vec<Client>,
    pub(crate) summary: Summary,
    /// Whether the faults are over.
    pub(crate) calm: bool,
    pub(crate) router_up: bool,
    paths: Vec<Path>,
    queue: BTreeMap<(Duration, u64), Happening>,
    serial: u64,
    connections: u64,
}

impl World {
    pub(crate) fn new(seed: u64, prints: bool) -> World {
        let mut dice = Dice::new(seed);
        let profile = Profile::draw(&mut dice);
        let (experts, blocks) = (dice.between(1, 13) as u16, dice.between(1, 7) as u16);
        let top_k = dice.between(1, 4) as u16;
        let toy = Toy { seed: dice.roll(u64::MAX), experts, blocks, top_k };
        let facts = ModelFacts {
            fingerprint: [7; 32],
            moe_layers: MOE_LAYERS.to_vec(),
            experts,
            expert_bytes: u64::from(blocks) * 1_000_000,
            blocks,
            block_bytes: 1_000_000,
            hidden: crate::toy::HIDDEN as u32,
            top_k,
            ..ModelFacts::default()
        };
        let nodes = dice.between(1, 6);
        let nodes = if profile.stragglers { nodes.max(4) } else { nodes };
        let liars = if dice.chance(400) && !profile.stragglers { dice.between(1, 3) } else { 0 };
        let share = facts.expert_bytes * u64::from(experts) * MOE_LAYERS.len() as u64 / nodes;
        let machines = (0..nodes)
            .map(|node| {
                // From a third of its fair share to three times as much, and sometimes next to nothing.
                let memory =
                    if dice.chance(50) { dice.roll(2_000_000) } else { share * dice.between(30, 300) / 100 };
                let memory = if profile.stragglers { 4 * share + facts.expert_bytes } else { memory };
                let lies = if node < liars { dice.between(20, 1000) } else { 0 };
                Machine::new(memory, dice.between(200, 2000) as u32, lies)
            })
            .collect();
        let mut policy = router::policy(nodes, &facts, &mut dice);
        if profile.stragglers {
            policy.wishes.copies = Copies::Exactly(3);
        }
        let router = Router::new(&facts, policy, nodes as usize, None);
        let engine = Engine::new(profile.stragglers, &mut dice);
        let mut world = World {
            now: Duration::from_millis(1),
            trace: Trace::new(prints),
            toy,
            facts,
            profile,
            pool: Pool::new(1 << 24),
            machines,
            router,
            policy,
            stored: Vec::new(),
            engine,
            clients: Vec::new(),
            summary: Summary::default(),
            calm: false,
            router_up: true,
            paths: (0..nodes).map(|_| Path::default()).collect(),
            queue: BTreeMap::new(),
            serial: 0,
            connections: 0,
            dice,
        };
        world.prepare();
        world
    }

    /// What is known to come: machines, clients, faults, their end.
    fn prepare(&mut self) {
        let (facts, profile) = (self.facts.clone(), self.profile.clone());
        self.trace.note(self.now, format_args!("{facts:?} {profile:?}"));
        self.at(Duration::ZERO, Happening::Tick);
        for node in 0..self.machines.len() as NodeIndex {
            let machine = &self.machines[usize::from(node)];
            let (memory, speed, lies) = (machine.memory_bytes, machine.weight_mb_s, machine.lies);
            self.trace.note(self.now, format_args!("node {node}: {memory} bytes, {speed} MB/s, lies {lies}"));
            let delay = self.dice.millis(0, 1500);
            self.at(delay, Happening::Start(node));
        }
        let end = self.dice.millis(4_000, 12_000);
        let (from, to) = (100_000, end.as_micros() as u64 * 9 / 10);
        let mut base = self.dice.micros(from, to);
        let together = self.dice.chance(500);
        let most = if self.profile.stragglers { 60 } else { 12 };
        for client in 0..self.dice.between(2, most) as usize {
            // Some come one by one, some in crowds.
            if !together || self.dice.chance(250) {
                base = self.dice.micros(from, to);
            }
            let delay = base + self.dice.millis(0, 300);
            self.arrive(client, delay);
        }
        for (fault, mean) in self.profile.every.clone() {
            let delay = self.dice.millis(100, mean.as_millis() as u64 * 2);
            self.at(delay, Happening::Strike(fault));
        }
        self.at(end, Happening::Calm);
    }

    /// A new client, `delay` from now.
    pub(crate) fn arrive(&mut self, client: usize, delay: Duration) {
        let longest = if self.dice.chance(300) { 24 } else { 8 };
        let length = self.dice.between(1, longest);
        let prompt: Vec<u32> = (0..length).map(|_| self.dice.roll(VOCAB) as u32).collect();
        let tokens_max = self.dice.between(1, 12) as usize;
        let wanted = self.toy.generate(&prompt, tokens_max);
        self.clients.push(Client { prompt, tokens_max, wanted, end: None });
        self.at(delay, Happening::Arrive(client));
        if !self.calm && self.dice.chance(80) {
            let later = self.dice.millis(1, 1500);
            self.at(delay + later, Happening::Cancel(client));
        }
    }

    pub(crate) fn at(&mut self, delay: Duration, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now + delay, self.serial), happening);
    }

    /// Runs until the faults are over and nothing is left to do. Panics where something is wrong.
    pub(crate) fn run(mut self) -> Summary {
        let mut calm_at = None;
        while let Some(((at, _), happening)) = self.queue.pop_first() {
            assert!(self.summary.events < EVENTS_MAX, "it never ends");
            self.summary.events += 1;
            self.now = at;
            if matches!(happening, Happening::Calm) {
                calm_at = Some(at);
            }
            self.happen(happening);
            let Some(calm_at) = calm_at else { continue };
            if self.is_done() {
                break;
            }
            if at > calm_at + CALM_WITHIN {
                self.explain();
            }
        }
        self.afterwards();
        self.summary.trace = self.trace.hash();
        self.summary
    }

    fn is_done(&self) -> bool {
        let idle = self.machines.iter().all(|machine| machine.free_at <= self.now);
        idle && self.clients.iter().all(|client| client.end.is_some()) && self.is_placed()
    }

    /// Why it has not come to an end.
    fn explain(&self) {
        let open = (0..).zip(&self.clients).filter(|(_, client)| client.end.is_none());
        let open: Vec<usize> = open.map(|(index, _)| index).collect();
        let states: Vec<_> = self.router.cluster.statuses().into_iter().map(|status| status.state).collect();
        panic!(
            "{CALM_WITHIN:?} after the last fault: requests {open:?} are open; settled {}, nodes {states:?}, engine {}",
            self.router.cluster.settled(),
            self.engine.describe(),
        );
    }

    /// All is well again: what the cluster owes then.
    fn afterwards(&mut self) {
        assert!(self.is_done(), "the world stands still before everything is done");
        let quiet = self.router.cluster.handle(self.now, Event::Tick);
        if let [Action::Plan(task)] = &quiet[..] {
            // It was time to make copies of what is gone for good, or to follow frequencies.
            let (router, task) = (self.router.life, task.clone());
            self.at(TICK, Happening::Planned { router, task });
        } else {
            assert_eq!(quiet, [], "it is restless");
        }
        self.engine.check_empty();
        let clients = self.clients.len();
        (0..2).for_each(|more| self.arrive(clients + more, Duration::from_millis(1)));
        let until = self.now + CALM_WITHIN;
        while !self.is_done() {
            let Some(((at, _), happening)) = self.queue.pop_first() else {
                panic!("requests of a calm cluster hang")
            };
            assert!(at < until, "requests of a calm cluster take too long");
            self.now = at;
            self.happen(happening);
        }
        // While plans change, a node without memory for both has to drop one; then steps wait until it holds the other.
        let held = self.router.cluster.routes().table.all().all(|(_, part)| !part.holders.is_empty());
        let whole = held || self.profile.fallback;
        for client in &self.clients[clients..] {
            let complete = matches!(client.end, Some(End::Complete(_)));
            assert!(complete || !whole, "a calm cluster failed a request: {:?}", client.end);
        }
        self.engine.check_empty();
        self.check_hedges();
    }

    fn happen(&mut self, happening: Happening) {
        if !matches!(happening, Happening::Tick | Happening::Engine | Happening::Control(..)) {
            self.trace.note(self.now, format_args!("{happening:?}"));
        }
        match happening {
            Happening::Tick => self.tick(),
            Happening::Control(node, way) => self.control_due(node, way),
            Happening::Call(node, connection, call) => self.call_arrives(node, connection, call),
            Happening::Answer(node, stream, answer) => {
                if self.is_blocked(node, Way::In) {
                    self.at(BLOCKED, Happening::Answer(node, stream, answer));
                } else if self.router_up {
                    self.answer_arrives(node, stream, answer);
                }
            }
            Happening::Computed { node, life, connection, call } => {
                self.computed(node, life, connection, &call)
            }
            Happening::Loaded { node, life, connection, placement } => {
                self.loaded(node, life, connection, &placement.0);
            }
            Happening::Dial { node, life } => self.dial(node, life),
            Happening::Linked { node, connection, speed } => {
                if self.router_up && self.router.connection(node) == Some(connection) {
                    self.handle(Event::Linked(node, speed));
                }
            }
            Happening::Start(node) => self.start(node),
            Happening::Gone { node, life } => self.gone(node, life),
            Happening::Planned { router, task } => {
                if self.router_up && self.router.life == router {
                    self.handle(Event::Planned(Box::new(task.work())));
                }
            }
            Happening::RouterStart if self.router_up => {}
            Happening::RouterStart => self.router_starts(),
            Happening::Engine => self.pump(),
            Happening::Arrive(client) => self.client_arrives(client),
            Happening::Cancel(client) => self.client_leaves(client),
            Happening::Strike(fault) => self.strike(fault),
            Happening::Calm => self.become_calm(),
        }
    }

    fn tick(&mut self) {
        self.at(TICK, Happening::Tick);
        if self.router_up {
            self.handle(Event::Tick);
        }
        for node in 0..self.machines.len() as NodeIndex {
            self.keep_alive(node);
            if self.dice.chance(100) {
                self.report_health(node);
            }
        }
        if self.router_up {
            self.pump();
        }
        // A refusal that was on its way when the operator asked: he asks again.
        let refused = |status: &NodeStatus| status.state == NodeState::Refused;
        if self.calm && self.router.cluster.statuses().iter().any(refused) {
            self.handle(Event::Plan);
        }
    }

    /// Both ends of a connection listen for the other.
    fn keep_alive(&mut self, node: NodeIndex) {
        let index = usize::from(node);
        let (now, ours) = (self.now, self.router.connection(node));
        let blocked = [Way::Out, Way::In].map(|way| self.is_blocked(node, way));
        let machine = &mut self.machines[index];
        let awake = machine.up && machine.frozen_until <= now;
        if awake && let Some(theirs) = machine.connection {
            if !blocked[0] && self.router_up {
                if ours != Some(theirs) {
                    // The router says that it knows no such connection.
                    machine.connection = None;
                } else {
                    machine.heard_at = now;
                }
            } else if now.saturating_sub(machine.heard_at) > IDLE {
                machine.connection = None;
            }
            if machine.connection.is_none() {
                self.redial(node);
            }
        }
        let Some(ours) = ours else { return };
        let theirs = self.machines[index].connection;
        if awake && !blocked[1] {
            if theirs != Some(ours) {
                self.disconnect(node);
            } else {
                self.router.heard(node, now);
            }
        } else if self.router.silent_since(node).is_some_and(|at| now.saturating_sub(at) > IDLE) {
            self.disconnect(node);
        }
    }

    fn report_health(&mut self, node: NodeIndex) {
        let machine = &self.machines[usize::from(node)];
        let Some(connection) = machine.connection.filter(|_| machine.up && machine.frozen_until <= self.now)
        else {
            return;
        };
        let lies = self.dice.chance(machine.lies);
        let (count, bytes) = if lies { (u64::MAX, u64::MAX) } else { (1, 1) };
        let health = Health {
            epoch: count,
            calls: count,
            rows: count,
            busy_us: count,
            queued: 0,
            resident_bytes: bytes,
            ..Health::default()
        };
        self.say(node, Way::In, connection, Control::Health(health));
    }

    pub(crate) fn is_blocked(&self, node: NodeIndex, way: Way) -> bool {
        self.paths[usize::from(node)].blocked[way as usize] > self.now
    }

    fn delay(&mut self) -> Duration {
        let delay = self.profile.delay + self.dice.micros(0, self.profile.jitter.as_micros() as u64);
        if self.dice.chance(self.profile.resent) { delay + self.dice.millis(20, 250) } else { delay }
    }

    /// When copies of a message on a stream of its own arrive: not in order, perhaps not at all.
    pub(crate) fn deliveries(&mut self) -> Vec<Duration> {
        if self.dice.chance(self.profile.lost) {
            return Vec::new();
        }
        let first = self.delay();
        if self.dice.chance(self.profile.replayed) { vec![first, self.delay()] } else { vec![first] }
    }

    /// Control messages of a connection stay in order, and none is left out.
    pub(crate) fn say(&mut self, node: NodeIndex, way: Way, connection: u64, control: Control) {
        let due = self.now + self.delay();
        let path = &mut self.paths[usize::from(node)];
        path.control[way as usize].push_back((connection, control));
        path.control_at[way as usize] = path.control_at[way as usize].max(due);
        let delay = path.control_at[way as usize] - self.now;
        self.at(delay, Happening::Control(node, way));
    }

    fn control_due(&mut self, node: NodeIndex, way: Way) {
        let index = usize::from(node);
        let frozen = way == Way::Out && self.machines[index].frozen_until > self.now;
        if self.is_blocked(node, way) || frozen {
            return self.at(BLOCKED, Happening::Control(node, way));
        }
        let Some((connection, control)) = self.paths[index].control[way as usize].pop_front() else { return };
        let known = match way {
            Way::Out => self.machines[index].connection,
            Way::In => self.router.connection(node).filter(|_| self.router_up),
        };
        self.trace.note(self.now, format_args!("{way:?} {node} {control:?} {}", known == Some(connection)));
        if known != Some(connection) {
            return;
        }
        match control {
            Control::Place(_) if self.machines[index].leaving => {
                self.leaving_hears(node, connection, control)
            }
            Control::Place(placement) => self.placement_arrives(node, connection, placement),
            Control::Placed(placed) => {
                self.router.placed(node, &placed);
                self.handle(Event::Placed(node, placed));
            }
            Control::Health(health) => self.handle(Event::Health(node, health)),
            Control::Leaving => self.handle(Event::Leaving(node)),
        }
    }

    fn placement_arrives(&mut self, node: NodeIndex, connection: u64, placement: Order) {
        let machine = &self.machines[usize::from(node)];
        let known = machine.held.iter().any(|held| held.epoch == placement.0.epoch);
        let delay = if known {
            Duration::ZERO
        } else {
            self.dice.millis(1, 20 + 5 * placement.0.experts.len() as u64)
        };
        // One after the other, in the order they came.
        let machine = &mut self.machines[usize::from(node)];
        machine.loaded_at = machine.loaded_at.max(self.now) + delay;
        let (life, delay) = (machine.life, machine.loaded_at - self.now);
        self.at(delay, Happening::Loaded { node, life, connection, placement });
    }

    fn loaded(&mut self, node: NodeIndex, life: u64, connection: u64, placement: &Placement) {
        let refuse = self.dice.chance(self.profile.refused);
        let machine = &mut self.machines[usize::from(node)];
        if !machine.up || machine.life != life {
            return;
        }
        let lies = machine.lies;
        if !refuse {
            machine.load(placement, &self.facts);
        }
        let placed = machine.placed(placement, refuse, &mut self.dice);
        if machine.connection == Some(connection) {
            self.say(node, Way::In, connection, Control::Placed(placed.clone()));
            if self.dice.chance(lies / 2) {
                self.say(node, Way::In, connection, Control::Placed(placed));
            }
        }
    }

    fn call_arrives(&mut self, node: NodeIndex, connection: u64, call: Call) {
        let machine = &self.machines[usize::from(node)];
        if !machine.up || machine.connection != Some(connection) {
            return;
        }
        if machine.frozen_until > self.now || self.is_blocked(node, Way::Out) {
            return self.at(BLOCKED, Happening::Call(node, connection, call));
        }
        match machine.service(&call, &self.facts) {
            Err(refusal) => self.answer(node, call.call, Answer::Refused(call.call, refusal)),
            Ok(service) => {
                let noise = self.dice.micros(0, 300);
                let machine = &mut self.machines[usize::from(node)];
                machine.free_at = machine.free_at.max(self.now) + service + noise;
                let (life, delay) = (machine.life, machine.free_at - self.now);
                self.at(delay, Happening::Computed { node, life, connection, call });
            }
        }
    }

    fn computed(&mut self, node: NodeIndex, life: u64, connection: u64, call: &Call) {
        let machine = &mut self.machines[usize::from(node)];
        if !machine.up || machine.life != life || machine.connection != Some(connection) {
            return;
        }
        if machine.frozen_until > self.now {
            let happening = Happening::Computed { node, life, connection, call: call.clone() };
            return self.at(BLOCKED, happening);
        }
        for answer in machine.answers(call, (&self.toy, &self.pool), &mut self.dice) {
            self.answer(node, call.call, answer);
        }
    }

    fn answer(&mut self, node: NodeIndex, stream: u64, answer: Answer) {
        for delay in self.deliveries() {
            self.at(delay, Happening::Answer(node, stream, answer.clone()));
        }
    }

    fn start(&mut self, node: NodeIndex) {
        let (now, machine) = (self.now, &mut self.machines[usize::from(node)]);
        if !machine.up && !machine.dead {
            machine.start(now);
            self.redial(node);
        }
    }

    fn redial(&mut self, node: NodeIndex) {
        let life = self.machines[usize::from(node)].life;
        let delay = self.dice.millis(50, 3000);
        self.at(delay, Happening::Dial { node, life });
    }

    fn dial(&mut self, node: NodeIndex, life: u64) {
        let machine = &self.machines[usize::from(node)];
        if !machine.up || machine.life != life || machine.connection.is_some() {
            return;
        }
        let blocked = [Way::Out, Way::In].iter().any(|way| self.is_blocked(node, *way));
        if blocked || !self.router_up || machine.frozen_until > self.now {
            return self.redial(node);
        }
        self.connections += 1;
        let (now, connection) = (self.now, self.connections);
        let machine = &mut self.machines[usize::from(node)];
        (machine.connection, machine.heard_at) = (Some(connection), now);
        let hello = machine.hello(&self.facts, &mut self.dice);
        self.fail_calls(node);
        self.router.connect(node, connection, now, &hello);
        self.handle(Event::Joined(node, hello));
        if self.dice.chance(900) {
            let absurd = self.dice.chance(self.machines[usize::from(node)].lies);
            let speed = LinkSpeed {
                round_trip_us: if absurd { u32::MAX } else { self.dice.between(100, 5000) as u32 },
                mb_s: if absurd { u32::MAX } else { self.dice.between(5, 1000) as u32 },
            };
            let delay = self.dice.millis(5, 800);
            self.at(delay, Happening::Linked { node, connection, speed });
        }
    }

    /// The router's end of a connection is gone.
    fn disconnect(&mut self, node: NodeIndex) {
        self.router.close(node);
        self.fail_calls(node);
        self.handle(Event::Lost(node));
        self.pump();
    }

    fn router_starts(&mut self) {
        self.router_up = true;
        let members = router::members(self.machines.len());
        // Now and then the newest is not the one that is read: the disk was full, or a backup was put back.
        let text = if self.dice.chance(700) { self.stored.last() } else { self.stored.first() };
        let text = text.filter(|_| self.dice.chance(850));
        let stored =
            text.map(|text| Stored::parse(text, &self.facts, &members).expect("it wrote this itself"));
        let epoch = stored.as_ref().map(|stored| stored.epoch);
        self.trace.note(self.now, format_args!("the router starts from the plan of {epoch:?}"));
        let life = self.router.life + 1;
        self.router = Router::new(&self.facts, self.policy, members.len(), stored);
        self.router.life = life;
    }

    fn strike(&mut self, fault: Fault) {
        let Some((_, mean)) = self.profile.every.iter().find(|(kind, _)| *kind == fault).copied() else {
            return;
        };
        let next = self.dice.millis(100, mean.as_millis() as u64 * 2);
        self.at(next, Happening::Strike(fault));
        let node = self.dice.roll(self.machines.len() as u64) as NodeIndex;
        let (now, index) = (self.now, usize::from(node));
        match fault {
            Fault::Crash => {
                self.machines[index].die();
                // Some supervisors are quick.
                let back = if self.dice.chance(300) {
                    self.dice.millis(10, 200)
                } else {
                    self.dice.millis(200, 6000)
                };
                self.at(back, Happening::Start(node));
            }
            Fault::Disconnect => {
                if self.machines[index].up && self.machines[index].connection.take().is_some() {
                    self.redial(node);
                }
            }
            Fault::Partition => {
                let until = now + self.dice.millis(20, 7000);
                let ways: &[Way] = match (self.dice.chance(self.profile.one_way), self.dice.chance(500)) {
                    (false, _) => &[Way::Out, Way::In],
                    (true, true) => &[Way::Out],
                    (true, false) => &[Way::In],
                };
                for way in ways {
                    let blocked = &mut self.paths[index].blocked[*way as usize];
                    *blocked = (*blocked).max(until);
                }
            }
            Fault::Freeze => self.machines[index].frozen_until = now + self.dice.millis(50, 6000),
            Fault::Slow => self.machines[index].slow = self.dice.between(1, 60) as u32,
            Fault::Leave => self.leave(node),
            Fault::Join => self.machine_joins(),
            Fault::Death => self.machine_dies(node),
            Fault::Usage => self.usage_changes(),
            Fault::RouterCrash => self.router_crashes(),
            Fault::Plan if self.router_up => self.handle(Event::Plan),
            Fault::Plan => {}
        }
    }

    fn router_crashes(&mut self) {
        if !self.router_up {
            return;
        }
        self.router_up = false;
        for client in self.engine.crash() {
            self.end(client, End::Broken);
        }
        let back = self.dice.millis(200, 4000);
        self.at(back, Happening::RouterStart);
    }

    /// The faults are over: machines run, paths are open, liars are replaced, the operator pardons.
    fn become_calm(&mut self) {
        self.calm = true;
        self.profile.heal();
        if !self.router_up {
            self.router_starts();
        }
        for node in 0..self.machines.len() as NodeIndex {
            self.paths[usize::from(node)].blocked = [Duration::ZERO; 2];
            let machine = &mut self.machines[usize::from(node)];
            (machine.slow, machine.frozen_until) = (1, Duration::ZERO);
            if machine.lies > 0 {
                machine.lies = 0;
                machine.die();
            }
            self.start(node);
            self.handle(Event::Pardon(node));
        }
        // Refusals are forgotten by this; else nobody need say a word.
        self.router.plan_when_all_are_here = self.profile.operator;
    }

    pub(crate) fn refused(&mut self, node: NodeIndex, refusal: Refusal) {
        // As mesh-net does: these two happen to a healthy node when plans change or it stops.
        if !matches!(refusal, Refusal::UnknownEpoch | Refusal::Stopping) {
            self.handle(Event::Missed(node));
        }
    }
}
