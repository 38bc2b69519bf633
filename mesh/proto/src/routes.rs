//! Where the experts are right now: the table the router dispatches by.
//!
//! An expert is whole, or cut at multiples of 128 intermediate values into slices, whose sums add up to its own. Each
//! part is held by some nodes, any of which may be asked; a part that nobody holds is the router's. The table is flat
//! (two vectors per layer), because it is rebuilt whenever a node comes, goes or is mistrusted. The price: at most
//! `HOLDERS_MAX` holders per part. A node holds at most one part of an expert, so a call need not say which.

use mesh_wire::id::{ExpertKey, Slice};

use crate::facts::ModelFacts;

/// Position of a node among the cluster's members; stable while the router runs.
pub type NodeIndex = u16;

/// The router as a holder: it has the part in memory and computes its share of it like any node. A part without any
/// holder is the router's too, but computed from its mapped files.
pub const ROUTER: NodeIndex = NodeIndex::MAX;

/// Most nodes that hold one part: beyond a few copies, more make neither loss nor waiting rarer.
pub const HOLDERS_MAX: usize = 4;

/// The nodes that hold a part.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Holders {
    nodes: [NodeIndex; HOLDERS_MAX],
    count: u8,
}

impl Holders {
    /// One more; false where there is no room, or it is there already.
    pub fn add(&mut self, node: NodeIndex) -> bool {
        let count = usize::from(self.count);
        if count == HOLDERS_MAX || self.contains(node) {
            return false;
        }
        self.nodes[count] = node;
        self.count += 1;
        true
    }

    /// All of them, in the order they were added.
    pub fn as_slice(&self) -> &[NodeIndex] {
        &self.nodes[..usize::from(self.count)]
    }

    /// Whether `node` is one of them.
    pub fn contains(&self, node: NodeIndex) -> bool {
        self.as_slice().contains(&node)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn filtered(&self, keep: impl Fn(NodeIndex) -> bool) -> Holders {
        self.as_slice().iter().copied().filter(|node| keep(*node)).collect()
    }
}

impl FromIterator<NodeIndex> for Holders {
    /// The first `HOLDERS_MAX` different ones.
    fn from_iter<I: IntoIterator<Item = NodeIndex>>(nodes: I) -> Holders {
        let mut holders = Holders::default();
        nodes.into_iter().for_each(|node| {
            holders.add(node);
        });
        holders
    }
}

impl std::fmt::Debug for Holders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// An expert, or a slice of it, and who holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First block of 128 intermediate values.
    pub from: u16,
    /// The block after the last one.
    pub to: u16,
    /// Any of these may be asked; without any it is the router's.
    pub holders: Holders,
}

/// Who holds what of every expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    layers: Vec<Layer>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Layer {
    /// By expert, and one more: where its parts begin. Empty in a layer without routed experts.
    first: Vec<u32>,
    parts: Vec<Part>,
}

impl Table {
    /// Every expert whole and nobody's.
    pub fn empty(facts: &ModelFacts) -> Table {
        let mut table = Table::default();
        let whole = [Part { from: 0, to: facts.blocks, holders: Holders::default() }];
        for layer in &facts.moe_layers {
            table.set_layer(*layer, (0..facts.experts).map(|_| whole));
        }
        table
    }

    /// Replaces a layer: the parts of each expert in turn, ascending and together the whole expert.
    pub fn set_layer(&mut self, layer: u16, experts: impl Iterator<Item = impl AsRef<[Part]>>) {
        let at = usize::from(layer);
        if self.layers.len() <= at {
            self.layers.resize(at + 1, Layer::default());
        }
        let mut new = Layer { first: vec![0], parts: Vec::new() };
        for parts in experts {
            new.parts.extend_from_slice(parts.as_ref());
            new.first.push(new.parts.len() as u32);
        }
        self.layers[at] = new;
    }

    /// Layers, those without routed experts included.
    pub fn layers(&self) -> u16 {
        self.layers.len() as u16
    }

    /// Routed experts of a layer.
    pub fn experts(&self, layer: u16) -> u16 {
        self.layers.get(usize::from(layer)).map_or(0, |layer| layer.first.len().saturating_sub(1) as u16)
    }

    /// The parts of an expert, ascending; none where there is no such expert.
    pub fn parts(&self, layer: u16, expert: u16) -> &[Part] {
        let found = self.layers.get(usize::from(layer)).and_then(|layer| {
            let expert = usize::from(expert);
            let (from, to) = (layer.first.get(expert)?, layer.first.get(expert + 1)?);
            layer.parts.get(*from as usize..*to as usize)
        });
        found.unwrap_or_default()
    }

    /// Blocks of experts that nobody but nodes that are `out` holds. Tables whose parts are of other sizes can be compared
    /// by it.
    pub fn open_blocks(&self, out: &[NodeIndex]) -> u64 {
        let open = |part: &Part| part.holders.as_slice().iter().all(|node| out.contains(node));
        self.all().filter(|(_, part)| open(part)).map(|(_, part)| u64::from(part.to - part.from)).sum()
    }

    /// Every part of every expert.
    pub fn all(&self) -> impl Iterator<Item = (ExpertKey, &Part)> {
        (0..self.layers()).flat_map(move |layer| {
            (0..self.experts(layer)).flat_map(move |expert| {
                self.parts(layer, expert).iter().map(move |part| (ExpertKey { layer, expert }, part))
            })
        })
    }

    /// What `node` holds, ascending.
    pub fn held_by(&self, node: NodeIndex) -> impl Iterator<Item = Slice> {
        self.all().filter(move |(_, part)| part.holders.contains(node)).map(|(key, part)| Slice {
            key,
            from: part.from,
            to: part.to,
        })
    }

    /// The same with only those holders that `serves` names, and the router where it is one.
    pub fn filtered(&self, serves: impl Fn(NodeIndex) -> bool) -> Table {
        let mut table = self.clone();
        for part in table.layers.iter_mut().flat_map(|layer| &mut layer.parts) {
            part.holders = part.holders.filtered(|node| node == ROUTER || serves(node));
        }
        table
    }
}

/// One version of the table. Cheap to read, replaced as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Placement epoch that calls must carry.
    pub epoch: u64,
    /// The nodes to ask.
    pub table: Table,
    /// Those of them that are to be asked only for what no other holder can do, ascending (`heat`).
    pub spared: Vec<NodeIndex>,
}

impl Routes {
    /// The first node (not the router) that serves the first part of `expert`.
    pub fn node(&self, layer: u16, expert: u16) -> Option<NodeIndex> {
        let holders = &self.table.parts(layer, expert).first()?.holders;
        holders.as_slice().iter().copied().find(|node| *node != ROUTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_filtered_and_listed_by_holder() {
        let facts = ModelFacts { moe_layers: vec![1], experts: 2, blocks: 6, ..ModelFacts::default() };
        let mut table = Table::empty(&facts);
        assert_eq!((table.layers(), table.experts(0), table.experts(1)), (2, 0, 2));
        let part =
            |from, to, nodes: &[NodeIndex]| Part { from, to, holders: nodes.iter().copied().collect() };
        let whole = vec![part(0, 6, &[0, ROUTER, 2])];
        let cut = vec![part(0, 2, &[0]), part(2, 6, &[1])];
        table.set_layer(1, [whole.clone(), cut.clone()].iter());
        assert_eq!((table.parts(1, 0), table.parts(1, 1)), (&whole[..], &cut[..]));
        assert_eq!((table.parts(0, 0), table.parts(1, 2), table.parts(9, 0)), (&[][..], &[][..], &[][..]));
        let held: Vec<_> = table.held_by(0).map(|slice| (slice.key.expert, slice.from, slice.to)).collect();
        assert_eq!(held, [(0, 0, 6), (1, 0, 2)]);
        let without = table.filtered(|node| node != 0);
        assert_eq!(without.parts(1, 0), [part(0, 6, &[ROUTER, 2])]);
        assert!(without.parts(1, 1)[0].holders.is_empty());
        let routes = Routes { epoch: 1, table: without, spared: Vec::new() };
        assert_eq!((routes.node(1, 0), routes.node(1, 1), routes.node(7, 0)), (Some(2), None, None));
    }

    #[test]
    fn holders_are_different_and_few() {
        let holders: Holders = [3, 3, 1, 2, 0, 9].into_iter().collect();
        assert_eq!(holders.as_slice(), [3, 1, 2, 0]);
        assert!(!holders.contains(9));
    }
}
