//! What an arrangement of processes could reach: by memory bandwidth alone, and by what its processes measured.
//!
//! Memory limit: every weight byte of a token crosses a memory bus once. The router's own bytes come at the
//! bandwidth of one process, those of the experts at what all processes that hold them read together, as if every
//! layer were split evenly and nothing else took time. On one machine "together" is less than the sum.
//!
//! Prediction: that of the plan the router made (`mesh_proto::cost`), before anything was timed; of a router on its own
//! the same cost model with everything in one place.

use mesh_proto::cost::{DRAWS, Scene};
use mesh_proto::facts::ModelFacts;
use mesh_proto::machine::Machine;
use mesh_proto::routes::{Part, ROUTER, Table};
use model::config::TokenBytes;
use model::kernel::measure::ROWS;

/// Who computes the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// One process.
    Alone,
    /// So many nodes.
    Nodes(u16),
    /// So many nodes and the router.
    Shared(u16),
}

/// Gigabytes (10^9 bytes) that processes read per second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bandwidth {
    /// The router alone.
    pub(super) router: f64,
    /// All that compute experts, together.
    pub(super) experts: f64,
}

impl Bandwidth {
    /// Slowed down to the paces of router and nodes, if they have any.
    pub(super) fn paced(self, paces: &[f64], arrangement: Arrangement) -> Bandwidth {
        let Some(router) = paces.first() else { return self };
        let nodes: f64 = paces[1..].iter().sum();
        let experts = match arrangement {
            Arrangement::Alone => *router,
            Arrangement::Nodes(_) => nodes,
            Arrangement::Shared(_) => router + nodes,
        };
        Bandwidth { router: self.router.min(*router), experts: self.experts.min(experts) }
    }
}

/// Tokens per second that memory allows.
pub(super) fn memory_limit(bytes: TokenBytes, bandwidth: Bandwidth) -> f64 {
    let seconds = bytes.router as f64 / bandwidth.router + bytes.experts as f64 / bandwidth.experts;
    1e9 / seconds
}

/// Predicted tokens per second of a router that computes everything itself, from what it measured; `None` where it
/// measured nothing.
pub(super) fn predicted_alone(facts: &ModelFacts, weight_mb_s: [u32; ROWS.len()]) -> Option<f64> {
    let mut table = Table::empty(facts);
    let here = [Part { from: 0, to: facts.blocks, holders: [ROUTER].into_iter().collect() }];
    for layer in &facts.moe_layers {
        table.set_layer(*layer, (0..facts.experts).map(|_| here));
    }
    let router = Machine { weight_mb_s, ..Machine::default() };
    let scene = Scene { facts, router, fallback_mb_s: 0, nodes: &[], popularity: None };
    let token_ns = scene.decode(&table, DRAWS).token_ns;
    (weight_mb_s[0] > 0).then(|| 1e9 / token_ns.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: TokenBytes = TokenBytes { router: 300_000_000, experts: 240_000_000 };

    #[test]
    fn the_memory_limit_reads_router_and_experts_one_after_the_other() {
        let limit = memory_limit(BYTES, Bandwidth { router: 15.0, experts: 24.0 });
        assert!((limit - 1.0 / (0.020 + 0.010)).abs() < 1e-9, "{limit}");
    }

    #[test]
    fn a_pace_bounds_the_bandwidth_of_those_it_slows() {
        let free = Bandwidth { router: 15.0, experts: 24.0 };
        let get = |paces: &[f64], arrangement| {
            let paced = free.paced(paces, arrangement);
            (paced.router, paced.experts)
        };
        assert_eq!(get(&[], Arrangement::Shared(1)), (15.0, 24.0));
        assert_eq!(get(&[10.0, 4.0], Arrangement::Shared(1)), (10.0, 14.0));
        assert_eq!(get(&[10.0, 4.0], Arrangement::Nodes(1)), (10.0, 4.0));
        assert_eq!(get(&[100.0, 100.0], Arrangement::Shared(1)), (15.0, 24.0));
        assert_eq!(get(&[5.0], Arrangement::Alone), (5.0, 5.0));
    }

    #[test]
    fn alone_a_token_reads_all_its_bytes_from_one_memory() {
        let facts = ModelFacts {
            moe_layers: (0..12).collect(),
            experts: 128,
            top_k: 8,
            expert_bytes: 2_500_000,
            blocks: 6,
            router_bytes: BYTES.router,
            ..ModelFacts::default()
        };
        let alone = predicted_alone(&facts, [10_000; ROWS.len()]).unwrap();
        // 54 ms of weights, and some for everything else.
        assert!((17.0..18.5).contains(&alone), "{alone}");
        assert_eq!(predicted_alone(&facts, [0; ROWS.len()]), None);
    }
}
