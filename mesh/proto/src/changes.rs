//! Why a placement changes, what a change did, and how long the cluster waits before it changes anything.
//!
//! Machines are restarted more often than they are lost, cables wobble, and a crowd of machines comes one by one: a
//! cluster that followed every event would do nothing but load weights. So events are waited out (`Patience`): what a
//! machine needs to be back, and a moment of silence after the last coming or going, which ends in any case after a
//! while. What is urgent waits for little: experts that only a lost node held. The price: a new machine works seconds
//! later than it could. Refuses to know what a plan is.

use std::time::Duration;

use crate::routes::NodeIndex;

/// Longest time that a node which is about to leave goes on serving while others load what only it holds: 6 GB over
/// gigabit Ethernet. Longer, and whoever stops it takes it for hung; what is not handed over by then is the router's.
pub const HANDOVER_MAX: Duration = Duration::from_secs(60);

/// How long events are waited out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Silence (nobody came, nobody went) before a newcomer is planned for, or a loss made good. A machine that comes and
    /// goes every second is never planned for by this.
    pub steady: Duration,
    /// Where there is no silence: least time between changes. Twenty nodes that come within a minute cost six plans.
    pub at_latest: Duration,
    /// How long a node is away before others load what only it held. A supervisor has restarted a process by then;
    /// a machine that reboots is not worth waiting for, as every token is slower meanwhile, and what it holds stays
    /// its own.
    pub unserved: Duration,
    /// How long before copies are made of what has fewer holders by its absence. Nothing is slower for want of these
    /// but the next loss, and a board has rebooted by then.
    pub lost: Duration,
    /// Least time between plans that only follow what is asked for. What people ask for changes over hours.
    pub reconsider: Duration,
}

/// Seconds for newcomers and losses, a minute for copies, ten for frequencies.
impl Default for Patience {
    fn default() -> Patience {
        Patience {
            steady: Duration::from_secs(2),
            at_latest: Duration::from_secs(10),
            unserved: Duration::from_secs(3),
            lost: Duration::from_secs(60),
            reconsider: Duration::from_secs(600),
        }
    }
}

/// Why a placement was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There was none.
    First,
    /// The operator asked for it.
    Asked,
    /// Nodes came.
    Joined,
    /// Nodes are away, and others stand in.
    Lost,
    /// Nodes said that they would leave, and others took over first.
    Leaving,
    /// Nodes will not serve any more: revoked, in quarantine, or unable to load.
    Replaced,
    /// Some experts are wanted more often than others.
    Frequencies,
    /// It is an earlier router's.
    Restored,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Why::First => "first",
            Why::Asked => "asked",
            Why::Joined => "joined",
            Why::Lost => "lost",
            Why::Leaving => "leaving",
            Why::Replaced => "replaced",
            Why::Frequencies => "frequencies",
            Why::Restored => "restored",
        })
    }
}

/// What a change of the placement was, and what it is to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Epoch of the new placement.
    pub epoch: u64,
    /// Why.
    pub why: Why,
    /// The nodes it was made because of.
    pub nodes: Vec<NodeIndex>,
    /// Nanoseconds of a token predicted of the placement before, with the nodes that served when this one was made;
    /// `None` where there was none.
    pub before_ns: Option<u64>,
    /// The same of this one.
    pub after_ns: u64,
    /// Bytes of experts that nodes had to get for it.
    pub moved_bytes: u64,
}
