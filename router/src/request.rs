//! What the API asks of the engine, and what comes back: the contract between `http` and `engine`.
//!
//! The engine works in token ids and never sees text. Whoever holds the stream turns tokens into text, looks
//! for stop strings and drops the stream when it has enough; dropping it cancels the work at the next step.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

/// Requests that wait for the engine thread to take them; beyond that `submit` answers `QueueFull`.
pub const SUBMISSIONS_MAX: usize = 256;

/// How tokens are chosen. Ranges are checked by whoever builds it (`http`, `cli`).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the most probable token, ties to the lower id.
    pub temperature: f32,
    /// Keep the smallest set of most probable tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divide positive (multiply negative) logits of tokens seen in prompt or output; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtract this per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtract this once if the token occurs in the output.
    pub presence_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws. The same request with the same seed gives the same tokens, whoever else is served.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// One sequence to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Prompt tokens; at least one.
    pub prompt: Vec<u32>,
    /// How to choose.
    pub sampling: Sampling,
    /// Tokens to generate at most. 0 only scores the prompt.
    pub max_tokens: u32,
    /// Tokens before which no stop token is chosen.
    pub min_tokens: u32,
    /// Tokens that end the sequence (end-of-sequence tokens unless the request ignores them).
    pub stop_tokens: Vec<u32>,
    /// Report log-probabilities of each generated token and of this many most probable ones.
    pub logprobs: Option<u32>,
    /// The same for the prompt tokens, each given those before it.
    pub prompt_logprobs: Option<u32>,
    /// Report a BLAKE3 digest over the raw f32 logits each generated token was chosen from, so that two runs
    /// can be compared bit for bit from outside.
    pub logits_digest: bool,
}

/// Log-probability of one token among its alternatives, natural logarithm, before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Most probable tokens, best first, ties to the lower id.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was chosen; it is not part of the output.
    Stop,
    /// `max_tokens` reached, or the context is full.
    Length,
}

/// Measured by the engine at its steps, not at the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Submission to first scheduled step.
    pub queued: Duration,
    /// First scheduled step to first token.
    pub prefill: Duration,
    /// First token to last.
    pub decode: Duration,
    /// Part of prefill and decode spent waiting for replies of nodes.
    pub waiting: Duration,
    /// Bytes of call and reply frames, shared out over the rows of the steps.
    pub wire_bytes: u64,
    /// How often the sequence gave up its KV blocks and was computed again.
    pub preemptions: u32,
}

/// What a stream yields, in this order: `Prompt` (if asked for), `Token`s, then `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of the prompt; the first entry is `None`.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// One more token.
    Token {
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        timing: Timing,
        /// If asked for: hexadecimal BLAKE3.
        logits_digest: Option<String>,
    },
    /// The request cannot go on. Nothing follows.
    Failed(GenerateError),
}

/// Why a request ended without its text; each variant is an HTTP status in `http/error.rs`.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// Prompt and `max_tokens` do not fit.
    #[error(
        "the prompt has {prompt} tokens and {max_tokens} were asked for, but the context holds {context}; \
         shorten the prompt or lower max_tokens"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens of context.
        context: usize,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests wait already; try again in a moment")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// The cache has fewer blocks than this one sequence needs.
    #[error(
        "the sequence needs {needed} tokens of KV cache but the budget holds {capacity}; raise --kv-memory"
    )]
    KvCapacity {
        /// Tokens needed.
        needed: usize,
        /// Tokens there are.
        capacity: usize,
    },
    /// A prompt token is outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// No copy of an expert is reachable and the router has none, or must not use it.
    #[error(
        "no machine that can be reached holds (layer/expert) {experts}; bring a node back, or start the router \
         without --no-fallback"
    )]
    ExpertsUnavailable {
        /// Their names.
        experts: String,
    },
    /// The model produced something that is not a number; named by layer.
    #[error("{0}")]
    Numeric(String),
    /// The router is stopping.
    #[error("the router is shutting down")]
    Stopping,
}

/// Most experts that an error names.
const NAMED_MAX: usize = 8;

/// Experts (layer, number) for an error: `layer/expert`, the first `NAMED_MAX`, and how many more.
pub fn name_experts(experts: impl Iterator<Item = (u16, u16)>) -> String {
    let mut experts = experts;
    let mut text = String::new();
    for (layer, expert) in experts.by_ref().take(NAMED_MAX) {
        let before = if text.is_empty() { "" } else { ", " };
        text += &format!("{before}{layer}/{expert}");
    }
    match experts.count() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// A request on its way to the engine thread.
#[derive(Debug)]
pub struct Submission {
    /// What to generate.
    pub request: GenerateRequest,
    /// Where its events go. Sized so that the engine never waits for a reader.
    pub events: mpsc::Sender<Event>,
    /// When it was submitted.
    pub submitted: std::time::Instant,
}

/// Something the engine is asked besides generating.
#[derive(Debug)]
pub enum Command {
    /// Generate.
    Generate(Submission),
    /// Finish what runs, refuse what comes, then end the thread and answer.
    Drain(oneshot::Sender<()>),
}

/// Facts of the served model that requests are checked against.
#[derive(Clone, Debug)]
pub struct EngineFacts {
    /// Longest sequence.
    pub context: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Tokens of KV cache there are.
    pub kv_tokens: usize,
}

/// Cheap to clone; the way into the engine.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    facts: EngineFacts,
}

impl EngineHandle {
    /// A handle and the queue its engine thread reads.
    pub fn new(facts: EngineFacts) -> (EngineHandle, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(SUBMISSIONS_MAX);
        (EngineHandle { commands, facts }, queue)
    }

    /// What requests are checked against.
    pub fn facts(&self) -> &EngineFacts {
        &self.facts
    }

    /// Whether the engine thread has ended or is ending.
    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Checks a request and hands it to the engine. Dropping the stream cancels it.
    pub fn submit(&self, request: GenerateRequest) -> Result<mpsc::Receiver<Event>, GenerateError> {
        let facts = &self.facts;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens as usize);
        if let Some(token) = request.prompt.iter().find(|token| **token as usize >= facts.vocab) {
            return Err(GenerateError::UnknownToken { token: *token, vocab: facts.vocab });
        }
        if prompt == 0 || prompt + max_tokens > facts.context {
            return Err(GenerateError::ContextLength { prompt, max_tokens, context: facts.context });
        }
        if prompt + max_tokens > facts.kv_tokens {
            let needed = prompt + max_tokens;
            return Err(GenerateError::KvCapacity { needed, capacity: facts.kv_tokens });
        }
        // One event per token, the prompt's, and the end: a sender never waits.
        let (events, stream) = mpsc::channel(max_tokens + 2);
        let submission = Submission { request, events, submitted: std::time::Instant::now() };
        self.commands.try_send(Command::Generate(submission)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => GenerateError::QueueFull { waiting: SUBMISSIONS_MAX },
            mpsc::error::TrySendError::Closed(_) => GenerateError::Stopping,
        })?;
        Ok(stream)
    }

    /// Lets running sequences finish, refuses new ones, and returns when the engine thread has ended.
    pub async fn drain(&self) {
        let (done, ended) = oneshot::channel();
        if self.commands.send(Command::Drain(done)).await.is_ok() {
            // An error means that the thread is gone, which is what was asked for.
            ended.await.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_a_few_experts_and_how_many_more() {
        let of = |count: u16| name_experts((0..count).map(|expert| (3, expert)));
        assert_eq!((of(0), of(2)), (String::new(), "3/0, 3/1".to_owned()));
        assert_eq!(of(8), "3/0, 3/1, 3/2, 3/3, 3/4, 3/5, 3/6, 3/7");
        assert_eq!(of(9), "3/0, 3/1, 3/2, 3/3, 3/4, 3/5, 3/6, 3/7 and 1 more");
        assert!(of(u16::MAX).ends_with("3/7 and 65527 more"));
    }
}
