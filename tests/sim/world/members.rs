//! Machines that come to stay, leave in order, or are gone for good; and what is asked for.

use std::time::Duration;

use mesh_proto::cluster::Event;
use mesh_proto::popularity::{BATCH_TOKENS_MIN, Counts};
use mesh_proto::routes::NodeIndex;
use mesh_wire::control::Placed;

use super::{Control, Happening, Path, Way, World};
use crate::machine::Machine;
use crate::toy::MOE_LAYERS;

/// Machines of a run at most.
const MACHINES_MAX: usize = 12;

/// Silence after which a node that was let go ends, as in mesh-net.
const QUIET: Duration = Duration::from_millis(300);

impl World {
    /// A machine that was never here joins the cluster.
    pub(super) fn machine_joins(&mut self) {
        if !self.router_up || self.machines.len() >= MACHINES_MAX {
            return;
        }
        let experts = u64::from(self.facts.experts) * MOE_LAYERS.len() as u64;
        let memory = self.facts.expert_bytes * experts * self.dice.between(10, 120) / 100;
        let speed = self.dice.between(200, 2000) as u32;
        let node = self.machines.len() as NodeIndex;
        self.trace.note(self.now, format_args!("node {node} joins: {memory} bytes, {speed} MB/s"));
        self.machines.push(Machine::new(memory, speed, 0));
        self.paths.push(Path::default());
        self.router.admit();
        self.start(node);
    }

    /// It never comes back. The last one stays, or nothing could be shown.
    pub(super) fn machine_dies(&mut self, node: NodeIndex) {
        if self.machines.iter().filter(|machine| !machine.dead).count() > 1 {
            self.machines[usize::from(node)].die();
            self.machines[usize::from(node)].dead = true;
        }
    }

    /// Thousands of tokens that want some experts more than others.
    pub(super) fn usage_changes(&mut self) {
        for _ in 0..self.dice.between(1, 10) {
            let mut layer = || (0..self.facts.experts).map(|_| (1 << self.dice.roll(16)) as u32).collect();
            let rows = (0..MOE_LAYERS.len()).map(|_| layer()).collect();
            let tokens = BATCH_TOKENS_MIN / 2 + self.dice.roll(BATCH_TOKENS_MIN * 4);
            if self.router_up {
                self.handle(Event::Used(Box::new(Counts { tokens, rows })));
            }
        }
    }

    /// SIGTERM: it says so and serves until the router lets go. Some are killed before that.
    pub(super) fn leave(&mut self, node: NodeIndex) {
        let machine = &mut self.machines[usize::from(node)];
        if !machine.up || machine.leaving {
            return;
        }
        machine.leaving = true;
        let (life, connection) = (machine.life, machine.connection);
        let patience = match connection {
            Some(connection) => {
                self.say(node, Way::In, connection, Control::Leaving);
                if self.dice.chance(300) { self.dice.millis(0, 3000) } else { Duration::from_secs(75) }
            }
            None => Duration::ZERO,
        };
        self.at(patience, Happening::Gone { node, life });
    }

    /// A leaving node is told something.
    pub(super) fn leaving_hears(&mut self, node: NodeIndex, connection: u64, control: Control) {
        let Control::Place(placement) = control else { return };
        if placement.0.experts.is_empty() {
            let life = self.machines[usize::from(node)].life;
            return self.at(QUIET, Happening::Gone { node, life });
        }
        let refusal = "the node is stopping".to_owned();
        let placed = Placed { epoch: placement.0.epoch, weight_bytes: 0, refusal };
        self.say(node, Way::In, connection, Control::Placed(placed));
    }

    /// The end of a node that left.
    pub(super) fn gone(&mut self, node: NodeIndex, life: u64) {
        let machine = &mut self.machines[usize::from(node)];
        if !machine.up || machine.life != life {
            return;
        }
        machine.die();
        if !self.calm || !machine.dead {
            let back = self.dice.millis(100, 3000);
            self.at(back, Happening::Start(node));
        }
    }
}
