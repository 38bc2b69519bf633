//! `moemesh plan`: what a cluster would make of a model, before anything is bought, carried or started.
//!
//! Machines come from a file, from a running router with what its nodes measured, or this one is measured. The answer is
//! that of the planner the router itself uses (`mesh_proto::placement`): does it fit, who would hold what, how fast, what
//! bounds it, what a lost machine costs, and who makes it slower. Weights are not needed: a model's `config.json`, or
//! the name of a shape, is enough. Refuses machines whose speed is not said: a guess would look like an answer.

mod machines;

mod outcome;

mod story;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use mesh_proto::placement::{Copies, Wishes};
use model::format::Format;
use model::open::Model;
use router::serve::{Resident, shape_facts};

use self::machines::Machines;
use self::outcome::{Outcome, Question};
use crate::client::Client;
use crate::commands::router::{Slices, parse_replicas};
use crate::model_options::ModelOptions;
use crate::output;

/// Options of `moemesh plan`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// TOML file with the machines (`moemesh plan --example` prints one)
    #[arg(long)]
    nodes: Option<PathBuf>,
    /// Plan for the nodes of this running router, with what they measured
    #[arg(long, env = "MOEMESH_ROUTER", conflicts_with = "nodes")]
    router: Option<String>,
    /// API key, if the router wants one
    #[arg(long, env = "MOEMESH_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Machines that hold each expert: 1 to 4, or auto (2, where memory is left and it costs little speed)
    #[arg(long, default_value = "auto", value_parser = parse_replicas)]
    replicas: Copies,
    /// auto: experts are cut and spread over several nodes where that is faster. off: experts stay whole
    #[arg(long, value_enum, default_value_t = Slices::Auto)]
    slices: Slices,
    /// Tokens of the prompt whose first answer is timed
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: u32,
    /// Print an example of a file with machines
    #[arg(long)]
    example: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if options.example {
        print!("{}", machines::EXAMPLE);
        return Ok(ExitCode::SUCCESS);
    }
    let (name, config) = Model::describe(&options.model.spec()?, options.model.weights)?;
    if config.moe_layers().next().is_none() {
        bail!("{name} has no experts: one machine runs it as fast as many");
    }
    let facts = shape_facts(&config, options.model.weights);
    let machines = match (&options.nodes, &options.router) {
        (Some(path), _) => Machines::read(path)?,
        (None, Some(router)) => {
            let client = Client::new(router, options.api_key.clone());
            Machines::of_cluster(&client.fetch("/api/v1/nodes")?)?
        }
        (None, None) => Machines::here(&options.model)?,
    };
    let wishes = Wishes {
        copies: options.replicas,
        slices: options.slices == Slices::Auto,
        router_experts: Resident::Bytes(machines.router.experts_bytes).per_layer(&facts),
        router: machines.router.machine,
    };
    let smaller: Vec<_> = Format::ALL
        .into_iter()
        .map(|format| (format, shape_facts(&config, format)))
        .filter(|(_, other)| other.expert_bytes < facts.expert_bytes)
        .collect();
    let question = Question {
        name,
        weights: options.model.weights,
        facts,
        smaller,
        machines,
        wishes,
        prompt: options.prompt,
    };
    let outcome = Outcome::find(&question);
    if options.json {
        output::json(&outcome.to_json(&question))?;
    } else {
        println!("{}", story::tell(&question, &outcome));
    }
    Ok(ExitCode::SUCCESS)
}
