//! Where the experts are right now: the table the router dispatches by.

/// Position of a node in the roster; stable while the router runs.
pub type NodeIndex = u16;

/// One version of the table. Cheap to read, replaced as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routes {
    /// Placement epoch that calls must carry.
    pub epoch: u64,
    /// `nodes[layer][expert]`: the node to ask; `None` means the router computes it itself. A layer without
    /// routed experts has an empty entry.
    pub nodes: Vec<Vec<Option<NodeIndex>>>,
}

impl Routes {
    /// The node that serves `expert` of `layer`.
    pub fn node(&self, layer: u16, expert: u16) -> Option<NodeIndex> {
        *self.nodes.get(usize::from(layer))?.get(usize::from(expert))?
    }
}
