//! What an arrangement of processes could reach: by memory bandwidth alone, and by what its processes measured.
//!
//! Memory limit: every weight byte of a token crosses a memory bus once. The router's own bytes come at the
//! bandwidth of one process, those of the experts at what all processes that hold them read together, as if every
//! layer were split evenly and nothing else took time. On one machine "together" is less than the sum.
//!
//! Prediction (techniques: a token is the router's bytes, then per layer the slowest place): each place's table of
//! weight bandwidths at one row, the cost of a call beside computing, and the same division of a layer's experts as
//! the router makes. What it leaves out is attention over a long context, sampling, and everything between layers.

use model::config::TokenBytes;
use model::kernel::Assignment;
use model::kernel::measure::ROWS;
use router::share::{Curve, Layer, Learned, Mode, Place, PlaceIndex, ROUTER, Share, node_place, whole};

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

/// What a process said of its speed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    /// MB/s at `ROWS`; zeros where not measured.
    pub(super) weight_mb_s: [u32; ROWS.len()],
    /// Microseconds of a call to it beside computing.
    pub(super) call_us: f64,
}

/// The model, as far as a token's time goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenWork {
    /// Bytes of weights.
    pub(super) bytes: TokenBytes,
    /// Layers with experts.
    pub(super) moe_layers: usize,
    /// Experts per layer and token.
    pub(super) top_k: usize,
    /// Bytes of one.
    pub(super) expert_bytes: u64,
}

/// Predicted tokens per second; `processes` are the router and the nodes. `None` where nobody measured anything.
pub(super) fn predicted(work: &TokenWork, arrangement: Arrangement, processes: &[Measured]) -> Option<f64> {
    let table = |index: usize| {
        // A router without experts of its own measures nothing: taken to be like its first node.
        let own = processes.get(index).map(|process| process.weight_mb_s).filter(|table| table[0] > 0);
        own.or_else(|| processes.iter().map(|process| process.weight_mb_s).find(|table| table[0] > 0))
    };
    let place = |index: usize| {
        let weight_mb_s = table(index)?;
        let call_us = processes.get(index).map_or(0.0, |process| process.call_us) as f32;
        let curve = Curve::new(&weight_mb_s, work.expert_bytes)?;
        Some(Place { weight_mb_s, curve, learned: Learned::with_call_us(call_us) })
    };
    let places: Vec<Place> = (0..processes.len()).map(place).collect::<Option<_>>()?;
    let assignments: Vec<Assignment> =
        (0..work.top_k).map(|expert| Assignment { row: 0, expert: expert as u16, weight: 1.0 }).collect();
    let holders = |expert: u16, slot: usize| -> Option<PlaceIndex> {
        // Nodes get the experts of a token in turn: the even case.
        match (arrangement, slot) {
            (Arrangement::Alone, 0) => Some(ROUTER),
            (Arrangement::Nodes(nodes) | Arrangement::Shared(nodes), 0) => {
                Some(node_place(expert % nodes.max(1)))
            }
            (Arrangement::Shared(_), 1) => Some(ROUTER),
            _ => None,
        }
    };
    let layer = Layer {
        assignments: &assignments,
        rows: 1,
        busy_us: 0.0,
        mode: Mode::Alone,
        parts: &whole(&holders),
    };
    let mut share = Share::default();
    share.divide(&layer, &places);
    let router_us = work.bytes.router as f64 / f64::from(table(0)?[0]);
    Some(1e6 / (router_us + work.moe_layers as f64 * f64::from(share.latest_us())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: TokenBytes = TokenBytes { router: 300_000_000, experts: 240_000_000 };
    const WORK: TokenWork = TokenWork { bytes: BYTES, moe_layers: 12, top_k: 8, expert_bytes: 2_500_000 };

    fn measured(mb_s: u32, call_us: f64) -> Measured {
        Measured { weight_mb_s: [mb_s; ROWS.len()], call_us }
    }

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
    fn the_prediction_is_bytes_over_tables_plus_calls() {
        let alone = predicted(&WORK, Arrangement::Alone, &[measured(10_000, 0.0)]).unwrap();
        assert!((alone - 1e6 / (30_000.0 + 24_000.0)).abs() < 1e-3, "{alone}");
        // Eight experts of 250 us on the node, and a call.
        let remote = [measured(0, 0.0), measured(10_000, 100.0)];
        let nodes = predicted(&WORK, Arrangement::Nodes(1), &remote).unwrap();
        assert!((nodes - 1e6 / (30_000.0 + 12.0 * 2100.0)).abs() < 1e-3, "{nodes}");
        // Four here, four there: the node's call makes it the later one.
        let both = [measured(10_000, 0.0), measured(10_000, 100.0)];
        let shared = predicted(&WORK, Arrangement::Shared(1), &both).unwrap();
        assert!((shared - 1e6 / (30_000.0 + 12.0 * 1100.0)).abs() < 1e-3, "{shared}");
        assert_eq!(predicted(&WORK, Arrangement::Nodes(1), &[Measured::default(); 2]), None);
    }
}
