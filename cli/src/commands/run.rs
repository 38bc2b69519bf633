//! `moemesh run`: a chat with a running router, or one prompt completed.

use std::io::{IsTerminal, Read};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use crate::client::Client;
use crate::output;
use crate::story;

const HELP: &str = "\
/clear            forget the conversation
/system TEXT      set the system message (and forget the conversation)
/set NAME VALUE   set temperature, top_p, top_k, min_p, seed, max_tokens or repetition_penalty
/show             show settings and the router's model
/bye              leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one.";

/// Settings that `/set` takes.
const SETTINGS: [&str; 7] =
    ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "repetition_penalty"];

/// Options of `moemesh run`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Say this, print the answer and leave; '-' reads standard input. Without it: a chat
    prompt: Option<String>,
    /// The router's address
    #[arg(long, env = "MOEMESH_ROUTER", default_value = "http://127.0.0.1:8620")]
    router: String,
    /// API key, if the router wants one
    #[arg(long, env = "MOEMESH_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Complete the text as it is instead of answering it
    #[arg(long, requires = "prompt")]
    raw: bool,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// 0 always takes the most probable token; higher is more varied [default: the model's own]
    #[arg(long)]
    temperature: Option<f32>,
    /// Seed of the draws
    #[arg(long)]
    seed: Option<u64>,
    /// Tokens to generate at most
    #[arg(long)]
    max_tokens: Option<u32>,
    /// Show speed after each answer
    #[arg(long)]
    timings: bool,
    /// Print one JSON object with the answer (needs a prompt)
    #[arg(long, requires = "prompt")]
    json: bool,
}

/// A conversation with a router.
struct Chat {
    client: Client,
    messages: Vec<Value>,
    settings: Value,
    timings: bool,
    interrupted: Arc<AtomicBool>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let client = Client::new(&options.router, options.api_key.clone());
    let mut settings = json!({});
    if let Some(value) = options.temperature {
        settings["temperature"] = json!(value);
    }
    if let Some(value) = options.seed {
        settings["seed"] = json!(value);
    }
    if let Some(value) = options.max_tokens {
        settings["max_tokens"] = json!(value);
    }
    let system = options.system.iter().map(|text| json!({"role": "system", "content": text}));
    let mut chat = Chat {
        client,
        messages: system.collect(),
        settings,
        timings: options.timings,
        interrupted: catch_interrupts()?,
    };
    let prompt = match options.prompt.as_deref() {
        None if std::io::stdin().is_terminal() => return chat.converse(),
        None | Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read the prompt from standard input")?;
            text
        }
        Some(text) => text.to_owned(),
    };
    chat.once(&prompt, options.raw, options.json)
}

/// A flag that Ctrl-C raises from now on instead of ending the process.
fn catch_interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                raised.store(true, Ordering::Relaxed);
            }
        });
    });
    Ok(flag)
}

impl Chat {
    fn once(&mut self, prompt: &str, raw: bool, json: bool) -> anyhow::Result<ExitCode> {
        let (path, body) = if raw {
            ("/v1/completions", self.body(json!({"prompt": prompt})))
        } else {
            self.messages.push(json!({"role": "user", "content": prompt}));
            ("/v1/chat/completions", self.body(json!({"messages": self.messages})))
        };
        let (text, finished) = self.answer(path, &body, !json)?;
        if json {
            output::json(&json!({"text": text, "finished": finished}))?;
        }
        Ok(if finished { ExitCode::SUCCESS } else { ExitCode::from(130) })
    }

    fn converse(&mut self) -> anyhow::Result<ExitCode> {
        let models = self.client.fetch("/v1/models")?;
        let model = models.pointer("/data/0/id").and_then(Value::as_str).unwrap_or("?");
        println!("{model} at {}. /help for help.", self.client.base());
        let mut editor = rustyline::DefaultEditor::new().context("open the terminal")?;
        let mut pending = String::new();
        loop {
            match editor.readline(if pending.is_empty() { "> " } else { ". " }) {
                Ok(line) if line.ends_with('\\') => {
                    pending.push_str(line.trim_end_matches('\\'));
                    pending.push('\n');
                }
                Ok(line) => {
                    let text = std::mem::take(&mut pending) + &line;
                    if text.trim().is_empty() {
                        continue;
                    }
                    // A failed history entry costs nothing but the arrow key.
                    editor.add_history_entry(&text).ok();
                    if text.starts_with('/') {
                        if !self.command(&text) {
                            return Ok(ExitCode::SUCCESS);
                        }
                    } else if let Err(error) = self.turn(&text) {
                        eprintln!("{error:#}");
                    }
                }
                Err(ReadlineError::Interrupted) => pending.clear(),
                Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
                Err(error) => return Err(error).context("read from the terminal"),
            }
        }
    }

    /// One user message and its answer; a failed one leaves the conversation as it was.
    fn turn(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(json!({"role": "user", "content": text}));
        let body = self.body(json!({"messages": self.messages}));
        match self.answer("/v1/chat/completions", &body, true) {
            Ok((answer, _)) => self.messages.push(json!({"role": "assistant", "content": answer})),
            Err(error) => {
                self.messages.pop();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether the chat goes on.
    fn command(&mut self, line: &str) -> bool {
        let mut words = line.splitn(3, ' ');
        match (words.next().unwrap_or(""), words.next(), words.next()) {
            ("/bye" | "/exit" | "/quit", ..) => return false,
            ("/clear", ..) => self.messages.retain(|message| message["role"] == "system"),
            ("/system", Some(_), _) => {
                let text = line.trim_start_matches("/system").trim();
                self.messages = vec![json!({"role": "system", "content": text})];
            }
            ("/set", Some(name), Some(value)) if SETTINGS.contains(&name) => {
                match serde_json::from_str::<serde_json::Number>(value) {
                    Ok(value) => self.settings[name] = json!(value),
                    Err(_) => eprintln!("'{value}' is not a number"),
                }
            }
            ("/set", ..) => eprintln!("/set NAME VALUE, with NAME one of {}", SETTINGS.join(", ")),
            ("/show", ..) => println!("{}", self.settings),
            _ => println!("{HELP}"),
        }
        true
    }

    fn body(&self, mut body: Value) -> Value {
        if let (Some(body), Some(settings)) = (body.as_object_mut(), self.settings.as_object()) {
            body.extend(settings.clone());
            body.insert("stream".into(), json!(true));
            body.insert("stream_options".into(), json!({"include_usage": true}));
        }
        body
    }

    /// Streams an answer; the text, and whether it came to its end.
    fn answer(&self, path: &str, body: &Value, show: bool) -> anyhow::Result<(String, bool)> {
        self.interrupted.store(false, Ordering::Relaxed);
        let (started, mut first, mut tokens) = (Instant::now(), None, 0u64);
        let (mut text, mut finished) = (String::new(), true);
        self.client.stream(path, body, |chunk| {
            if let Some(delta) = story::delta(chunk).filter(|delta| !delta.is_empty()) {
                first.get_or_insert_with(Instant::now);
                text.push_str(delta);
                if show {
                    output::stream_text(delta)?;
                }
            }
            if let Some(count) = chunk.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
                tokens = count;
            }
            finished = !self.interrupted.load(Ordering::Relaxed);
            Ok(finished)
        })?;
        if show {
            println!();
        }
        if self.timings {
            let (first, total) = (first.unwrap_or(started) - started, started.elapsed());
            let speed = tokens.saturating_sub(1) as f64 / (total - first).as_secs_f64().max(1e-9);
            eprintln!("{tokens} tokens, {speed:.1} tokens/s, first after {:.0} ms", output::ms(first));
        }
        Ok((text, finished))
    }
}
