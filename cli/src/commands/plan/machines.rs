//! The machines of a plan: from a file, from a running router, or this one.
//!
//! A file is TOML and says little: a name, memory, speed, and the link where it is no gigabit. Where only one speed is
//! given, that of many rows at once follows from what our kernels do on an ordinary core. What was assumed is
//! collected, to be said with the answer. Refuses unknown keys and figures that no machine has, with their line.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use mesh_proto::facts::LinkSpeed;
use mesh_proto::machine::{Machine, UNMEASURED_LINK_MB_S, UNMEASURED_ROUND_TRIP_US};
use model::home;
use serde::Deserialize;
use serde_json::Value;

use crate::memory;
use crate::model_options::ModelOptions;

/// What `--example` prints.
pub(super) const EXAMPLE: &str = r#"# Machines of a cluster, for `moemesh plan --nodes cluster.toml --model MODEL`.

[router]                     # attention, KV cache, the API; the one machine that cannot be replaced
memory = "64 GB"             # what it may spend in all
gb_s = 60                    # weights it streams per second: `moemesh bench kernel` measures it
experts = "0 GB"             # of its memory for experts, which it then shares with the nodes

[[nodes]]
name = "tower"
memory = "48 GB"             # what it may spend on experts
gb_s = 45
# Measured, at 1, 4, 16, 64 and 256 rows (`moemesh nodes --json` shows it): better than gb_s alone.
# weight_mb_s = [45000, 43000, 24000, 7800, 2100]

[[nodes]]
name = "nuc"
count = 2                    # so many alike: nuc-1, nuc-2
memory = "24 GB"
gb_s = 30
mbit_s = 2500                # link to the router; gigabit, if it is not said
round_trip_ms = 0.2          # of a small message; 0.25 ms, if it is not said

[[nodes]]
name = "pi"
memory = "6 GB"
gb_s = 9
"#;

/// Speed at 1, 4, 16, 64 and 256 rows over that at one row: our kernels on a core with AVX-512 VNNI (NUMERICS: 14 GB/s
/// at one row, 360 GFLOP/s at 256). Cores with AMX are twice as fast at many rows, those with AVX2 half.
const PROFILE: [f64; 5] = [1.0, 0.95, 0.4, 0.11, 0.028];

/// Shape on which this machine is measured: the format and the kernels count, the model hardly does.
const MEASURED_ON: &str = "synthetic:qwen3-30b-a3b?layers=1";

/// Most nodes of a file: more than a router has connections for.
const NODES_MAX: usize = 1024;

/// A machine with experts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) machine: Machine,
}

/// The machine without which nothing runs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Router {
    pub(super) machine: Machine,
    /// What it may spend in all; 0 where nobody said.
    pub(super) memory_bytes: u64,
    /// Of that, for experts.
    pub(super) experts_bytes: u64,
}

/// All of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Machines {
    pub(super) router: Router,
    pub(super) nodes: Vec<Node>,
    /// What nobody measured or said.
    pub(super) assumed: Vec<String>,
    /// Whether there is but this machine: then more like it are tried.
    pub(super) alone: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    router: RouterEntry,
    #[serde(default)]
    nodes: Vec<NodeEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RouterEntry {
    memory: Option<Size>,
    experts: Option<Size>,
    gb_s: Option<f64>,
    weight_mb_s: Option<[u32; 5]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeEntry {
    name: String,
    #[serde(default = "one")]
    count: usize,
    memory: Size,
    gb_s: Option<f64>,
    weight_mb_s: Option<[u32; 5]>,
    round_trip_ms: Option<f64>,
    mbit_s: Option<f64>,
}

fn one() -> usize {
    1
}

/// Bytes, written "24 GB", "24 GiB" or "512 MB".
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Size(u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Size, String> {
        let trimmed = text.trim();
        let split = trimmed.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let scale = match unit.to_ascii_lowercase().as_str() {
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            "mib" => f64::from(1 << 20),
            "gib" => f64::from(1 << 30),
            _ => return Err(format!("'{text}' is no size: write \"24 GB\" or \"512 MB\"")),
        };
        let number: f64 =
            number.trim().parse().map_err(|_| format!("'{text}' is no size: write \"24 GB\""))?;
        let bytes = number * scale;
        if (0.0..1e16).contains(&bytes) {
            Ok(Size(bytes as u64))
        } else {
            Err(format!("'{text}' is no memory"))
        }
    }
}

impl Machines {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<Machines> {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read {shown}; `moemesh plan --example` prints such a file"))?;
        Machines::parse(&text)
            .with_context(|| format!("{shown} is no list of machines; `moemesh plan --example` prints one"))
    }

    fn parse(text: &str) -> anyhow::Result<Machines> {
        let file: File = toml::from_str(text)?;
        let mut assumed = Vec::new();
        let (memory, experts) = (&file.router.memory, &file.router.experts);
        let router = Router {
            machine: machine("the router", (file.router.gb_s, file.router.weight_mb_s), None, &mut assumed)?,
            memory_bytes: memory.map_or(0, |size| size.0),
            experts_bytes: experts.map_or(0, |size| size.0),
        };
        ensure!(
            router.memory_bytes == 0 || router.experts_bytes <= router.memory_bytes,
            "the router has less memory than it is to spend on experts: lower `experts`"
        );
        let mut nodes: Vec<Node> = Vec::new();
        for entry in &file.nodes {
            ensure!(!entry.name.trim().is_empty(), "a node has an empty name");
            ensure!(entry.count >= 1, "{}: count is 0; leave the node out instead", entry.name);
            let link = (entry.round_trip_ms, entry.mbit_s);
            let machine = machine(&entry.name, (entry.gb_s, entry.weight_mb_s), Some(link), &mut assumed)?;
            for index in 1..=entry.count {
                let name =
                    if entry.count == 1 { entry.name.clone() } else { format!("{}-{index}", entry.name) };
                ensure!(nodes.iter().all(|node| node.name != name), "two nodes are called {name}");
                nodes.push(Node { name, memory_bytes: entry.memory.0, machine });
                ensure!(nodes.len() <= NODES_MAX, "more than {NODES_MAX} nodes");
            }
        }
        assumed.dedup();
        Ok(Machines { router, nodes, assumed, alone: false })
    }

    /// The router and the nodes that are connected to it now, with what they measured.
    pub(super) fn of_cluster(report: &Value) -> anyhow::Result<Machines> {
        let mut assumed = Vec::new();
        let table = |value: &Value| {
            let mut table = [0_u32; 5];
            for (index, mb_s) in table.iter_mut().enumerate() {
                *mb_s = value["weight_mb_s"][index]
                    .as_u64()
                    .and_then(|mb_s| u32::try_from(mb_s).ok())
                    .unwrap_or(0);
            }
            table
        };
        let router = Machine { weight_mb_s: table(&report["router"]), ..Machine::default() };
        if router.weight_mb_s[0] == 0 {
            assumed.push("the router measured nothing of itself: 10 GB/s".to_owned());
        }
        let mut nodes = Vec::new();
        for node in report["nodes"].as_array().into_iter().flatten() {
            let name = node["name"].as_str().unwrap_or("?").to_owned();
            let Some(memory_bytes) = node["memory_bytes"].as_u64() else {
                assumed.push(format!("{name} is not connected: left out"));
                continue;
            };
            let figure = |key: &str| node["link"][key].as_u64().and_then(|figure| u32::try_from(figure).ok());
            let [round_trip_us, mb_s] = ["round_trip_us", "mb_s"].map(|key| figure(key).unwrap_or(0));
            let link = LinkSpeed { round_trip_us, mb_s };
            if link == LinkSpeed::default() {
                assumed.push(format!("the link of {name} is not measured yet: gigabit, 0.25 ms"));
            }
            nodes.push(Node { name, memory_bytes, machine: Machine { weight_mb_s: table(node), link } });
        }
        if nodes.is_empty() {
            bail!("no node is connected to this router; say what you have with --nodes FILE");
        }
        Ok(Machines {
            router: Router { machine: router, memory_bytes: 0, experts_bytes: 0 },
            nodes,
            assumed,
            alone: false,
        })
    }

    /// This machine, measured, and nothing else.
    pub(super) fn here(options: &ModelOptions) -> anyhow::Result<Machines> {
        let measured_on = ModelOptions { model: Some(MEASURED_ON.to_owned()), ..options.clone() };
        let model = measured_on.open()?;
        let (kernels, _) = measured_on.load_kernels(&model)?;
        let weight_mb_s = home::weight_mb_s(&model, &*kernels)?;
        let memory_bytes = memory::total().unwrap_or(0);
        let assumed = vec![
            "no --nodes FILE and no --router: this machine was measured, and more like it, on gigabit Ethernet with \
             round trips of 0.25 ms, are what is compared"
                .to_owned(),
        ];
        // Experts here take what the node would: the rest is for everything else.
        let experts_bytes = memory_bytes / 4 * 3;
        let machine = Machine { weight_mb_s, ..Machine::default() };
        let router = Router { machine, memory_bytes, experts_bytes };
        Ok(Machines { router, nodes: Vec::new(), assumed, alone: true })
    }
}

/// Speed and link of an entry.
fn machine(
    name: &str,
    (gb_s, table): (Option<f64>, Option<[u32; 5]>),
    link: Option<(Option<f64>, Option<f64>)>,
    assumed: &mut Vec<String>,
) -> anyhow::Result<Machine> {
    let weight_mb_s = match (gb_s, table) {
        (Some(_), Some(_)) => bail!("{name} has both gb_s and weight_mb_s; leave one out"),
        (None, None) => {
            bail!("{name} has no speed: add gb_s, the gigabytes of weights it streams per second")
        }
        (_, Some(table)) => {
            ensure!(table[0] > 0, "{name}: the first figure of weight_mb_s, of one row, is above 0");
            table
        }
        (Some(gb_s), None) => {
            ensure!((0.001..100_000.0).contains(&gb_s), "{name}: gb_s = {gb_s} is no speed of a machine");
            assumed.push(
                "machines of which only gb_s is known are as fast with many rows as a core with AVX-512 VNNI is"
                    .to_owned(),
            );
            PROFILE.map(|share| ((gb_s * 1000.0 * share) as u32).max(1))
        }
    };
    let Some((round_trip_ms, mbit_s)) = link else {
        return Ok(Machine { weight_mb_s, ..Machine::default() });
    };
    let within = |figure: Option<f64>, range: std::ops::Range<f64>, key: &str| match figure {
        Some(figure) if !range.contains(&figure) => bail!("{name}: {key} = {figure} cannot be"),
        figure => Ok(figure),
    };
    let round_trip_ms = within(round_trip_ms, 0.0..100_000.0, "round_trip_ms")?;
    let mbit_s = within(mbit_s, 0.01..10_000_000.0, "mbit_s")?;
    let link = LinkSpeed {
        round_trip_us: round_trip_ms.map_or(UNMEASURED_ROUND_TRIP_US, |ms| ((ms * 1000.0) as u32).max(1)),
        // Of the bits, six in a hundred are headers.
        mb_s: mbit_s.map_or(UNMEASURED_LINK_MB_S, |mbit_s| ((mbit_s / 8.0 * 0.94) as u32).max(1)),
    };
    Ok(Machine { weight_mb_s, link })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_example_is_read_as_it_says() {
        let machines = Machines::parse(EXAMPLE).unwrap();
        let names: Vec<_> = machines.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["tower", "nuc-1", "nuc-2", "pi"]);
        assert_eq!((machines.router.memory_bytes, machines.router.experts_bytes), (64_000_000_000, 0));
        assert_eq!(machines.router.machine.weight_mb_s[0], 60_000);
        let link = |node: usize| machines.nodes[node].machine.link;
        assert_eq!(link(1), LinkSpeed { round_trip_us: 200, mb_s: 293 });
        assert_eq!(link(3), LinkSpeed { round_trip_us: 250, mb_s: 117 });
        assert_eq!(machines.nodes[3].memory_bytes, 6_000_000_000);
        assert_eq!(machines.assumed.len(), 1);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let wrong = |text: &str| format!("{:#}", Machines::parse(text).unwrap_err());
        let router = "[router]\ngb_s = 10\n";
        let with = |node: &str| wrong(&format!("{router}[[nodes]]\n{node}"));
        for (node, told) in [
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\nspeed = 3\n", "line 7"),
            ("name = \"a\"\nmemory = 12\ngb_s = 5\n", "line 5"),
            ("name = \"a\"\nmemory = \"lots\"\ngb_s = 5\n", "'lots' is no size"),
            ("name = \"a\"\nmemory = \"-1 GB\"\ngb_s = 5\n", "is no memory"),
            ("name = \"a\"\nmemory = \"1 GB\"\n", "a has no speed"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\nweight_mb_s = [1, 1, 1, 1, 1]\n", "both gb_s and"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = -5\n", "gb_s = -5"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\nround_trip_ms = nan\n", "round_trip_ms = NaN"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\nmbit_s = 0\n", "mbit_s = 0"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\ncount = 0\n", "count is 0"),
            ("name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\ncount = 2000\n", "more than 1024"),
            ("name = \"\"\nmemory = \"1 GB\"\ngb_s = 5\n", "empty name"),
            (
                "name = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\n[[nodes]]\nname = \"a\"\nmemory = \"1 GB\"\ngb_s = 5\n",
                "two nodes",
            ),
        ] {
            let message = with(node);
            assert!(message.contains(told), "{node}: {message}");
        }
        assert!(wrong("").contains("missing field `router`"));
        assert!(
            wrong("[router]\ngb_s = 1\nmemory = \"1 GB\"\nexperts = \"2 GB\"\n").contains("lower `experts`")
        );
    }

    #[test]
    fn a_running_cluster_is_taken_as_it_measured_itself() {
        let report = json!({
            "router": {"weight_mb_s": [9000, 9000, 9000, 4000, 1000]},
            "nodes": [
                {"name": "a", "memory_bytes": 1000, "weight_mb_s": [5000, 5000, 4000, 900, 0],
                 "link": {"round_trip_us": 300, "mb_s": 110}},
                {"name": "b", "memory_bytes": null},
            ],
        });
        let machines = Machines::of_cluster(&report).unwrap();
        let machine = Machine {
            weight_mb_s: [5000, 5000, 4000, 900, 0],
            link: LinkSpeed { round_trip_us: 300, mb_s: 110 },
        };
        assert_eq!(machines.nodes, [Node { name: "a".into(), memory_bytes: 1000, machine }]);
        assert_eq!(machines.router.machine.weight_mb_s[0], 9000);
        assert_eq!(machines.assumed, ["b is not connected: left out"]);
        assert!(Machines::of_cluster(&json!({"nodes": [], "router": {}})).is_err());
    }
}
