//! `moemesh reference`: a prompt in one process.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use crate::model_options::ModelOptions;
use crate::output;
use crate::story::{self, StoryOptions};

/// Options of `moemesh reference`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    story: StoryOptions,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let story = story::reference(&options.model, &options.story, output::stream_text)?;
    println!();
    eprintln!(
        "{} tokens, {:.1} tokens/s, first token after {:.0} ms",
        story.token_ids.len(),
        story.decode_tok_s(),
        output::ms(story.ttft)
    );
    if options.json {
        output::json(&json!({
            "model": options.model.spec()?,
            "weights": options.model.weights,
            "text": story.text,
            "token_ids": story.token_ids,
            "logits_digest": story.logits_digest,
            "decode_tok_s": story.decode_tok_s(),
            "ttft_ms": output::ms(story.ttft),
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}
