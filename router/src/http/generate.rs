//! The sequences of one API request, as one stream of updates.
//!
//! A request may ask for several answers to several prompts. Each is a sequence of the engine with its own seed
//! (`seed + i` for answer `i` of a prompt). [`Running`] holds their streams, turns tokens into text and finds
//! stop strings; dropping it drops the streams and so cancels whatever still runs. It knows no JSON.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::sync::mpsc;

use super::parameters::Parameters;
use super::service::Service;
use crate::metrics::Metrics;
use crate::request::{Event, FinishReason, GenerateError, GenerateRequest, Timing, TokenLogprobs};
use crate::stream::{Detokenizer, TextStream};

/// What to generate.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) parameters: Parameters,
    pub(super) max_tokens: Vec<u32>,
    pub(super) logprobs: Option<u32>,
    pub(super) prompt_logprobs: Option<u32>,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// Text that was held back.
    pub(super) text: String,
    /// `stop` or `length`.
    pub(super) reason: &'static str,
    /// The stop string found, if one was.
    pub(super) stop: Option<String>,
    pub(super) timing: Timing,
    pub(super) digest: Option<String>,
}

/// Something happened to answer `choice` (prompt `choice / n`).
#[derive(Clone, Debug)]
pub(super) enum Update {
    /// Log-probabilities of its prompt; before anything else, if asked for.
    Prompt { choice: usize, logprobs: Vec<Option<TokenLogprobs>> },
    /// One token, with the text it makes certain and the code points decoded before it.
    Token { choice: usize, id: u32, text: String, offset: usize, logprobs: Option<TokenLogprobs> },
    /// It ended.
    End { choice: usize, end: End },
    /// The request cannot go on.
    Failed(GenerateError),
}

impl Update {
    /// The answer it is about.
    pub(super) fn choice(&self) -> Option<usize> {
        match self {
            Update::Prompt { choice, .. } | Update::Token { choice, .. } | Update::End { choice, .. } => {
                Some(*choice)
            }
            Update::Failed(_) => None,
        }
    }
}

struct Choice {
    events: Option<mpsc::Receiver<Event>>,
    text: TextStream,
    first: Option<Instant>,
    tokens: u32,
}

/// The request being generated.
pub(super) struct Running {
    choices: Vec<Choice>,
    ready: VecDeque<Update>,
    /// Where to look next, so that none is looked at last always.
    turn: usize,
    submitted: Instant,
    metrics: Arc<Metrics>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.break_off("cancelled");
    }
}

impl Running {
    /// Submits everything; if one is refused, those before are cancelled.
    pub(super) fn start(service: &Service, job: &Job) -> Result<Running, GenerateError> {
        if let Some(refusal) = service.cluster.refusal() {
            return Err(refusal);
        }
        let parameters = &job.parameters;
        let mut choices = Vec::with_capacity(job.prompts.len() * parameters.n as usize);
        for (prompt, max_tokens) in job.prompts.iter().zip(&job.max_tokens) {
            for index in 0..parameters.n {
                let mut sampling = parameters.sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(u64::from(index));
                let events = service.engine.submit(GenerateRequest {
                    prompt: prompt.clone(),
                    sampling,
                    max_tokens: *max_tokens,
                    min_tokens: parameters.min_tokens,
                    stop_tokens: parameters.stop_tokens.clone(),
                    logprobs: job.logprobs,
                    prompt_logprobs: job.prompt_logprobs,
                    logits_digest: parameters.logits_digest,
                })?;
                let detokenizer =
                    Detokenizer::new(service.prompt.vocabulary().clone(), parameters.skip_special);
                choices.push(Choice {
                    events: Some(events),
                    text: TextStream::new(detokenizer, parameters.stops.clone()),
                    first: None,
                    tokens: 0,
                });
            }
        }
        let (metrics, submitted) = (Arc::clone(&service.metrics), Instant::now());
        Ok(Running { choices, ready: VecDeque::new(), turn: 0, submitted, metrics })
    }

    /// The next update of any answer; `None` once all have ended. Safe to cancel.
    pub(super) async fn next(&mut self) -> Option<Update> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Some(update);
            }
            let (choice, event) = poll_fn(|context| self.poll(context)).await?;
            self.take(choice, event);
        }
    }

    /// Tokens generated so far by all answers.
    pub(super) fn generated(&self) -> u64 {
        self.choices.iter().map(|choice| u64::from(choice.tokens)).sum()
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Option<Event>)>> {
        let count = self.choices.len();
        let mut open = false;
        for step in 0..count {
            let index = (self.turn + step) % count;
            if let Some(events) = &mut self.choices[index].events {
                open = true;
                if let Poll::Ready(event) = events.poll_recv(context) {
                    self.turn = index + 1;
                    return Poll::Ready(Some((index, event)));
                }
            }
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }

    fn take(&mut self, choice: usize, event: Option<Event>) {
        match event {
            Some(Event::Prompt(logprobs)) => self.ready.push_back(Update::Prompt { choice, logprobs }),
            Some(Event::Token { id, logprobs }) => self.token(choice, id, logprobs),
            Some(Event::Finished { reason, timing, logits_digest }) => {
                let state = &mut self.choices[choice];
                state.events = None;
                let delta = state.text.finish();
                let reason = match reason {
                    _ if delta.stopped.is_some() => "stop",
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                };
                self.metrics.finished(reason, &timing);
                let end =
                    End { text: delta.text, reason, stop: delta.stopped, timing, digest: logits_digest };
                self.ready.push_back(Update::End { choice, end });
            }
            Some(Event::Failed(error)) => self.fail(error),
            // The engine thread is gone.
            None => self.fail(GenerateError::Stopping),
        }
    }

    fn token(&mut self, choice: usize, id: u32, logprobs: Option<TokenLogprobs>) {
        let submitted = self.submitted;
        let state = &mut self.choices[choice];
        let now = Instant::now();
        let first = *state.first.get_or_insert(now);
        state.tokens += 1;
        let offset = state.text.offset();
        let delta = state.text.push(id);
        self.ready.push_back(Update::Token { choice, id, text: delta.text, offset, logprobs });
        if delta.stopped.is_some() {
            // The engine is not asked how long it took: it has been told to stop.
            state.events = None;
            let timing = Timing { prefill: first - submitted, decode: now - first, ..Timing::default() };
            self.metrics.finished("stop", &timing);
            let end = End { text: String::new(), reason: "stop", stop: delta.stopped, timing, digest: None };
            self.ready.push_back(Update::End { choice, end });
        }
    }

    /// One failed sequence fails the request; the others are cancelled.
    fn fail(&mut self, error: GenerateError) {
        self.break_off("error");
        self.ready.push_back(Update::Failed(error));
    }

    /// Cancels what still runs.
    fn break_off(&mut self, reason: &str) {
        for choice in &mut self.choices {
            if choice.events.take().is_some() {
                self.metrics.broken_off(reason);
            }
        }
    }
}
