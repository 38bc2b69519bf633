//! What the router counts.
//!
//! Names follow Prometheus's rules (base units, `_total`, no colons; `promtool check metrics` is content) under
//! the prefix `moemesh_`. Times are measured by the engine at its steps, not at sockets. Labels are few and
//! bounded: nodes, routes, statuses, reasons. There is none per expert or request: fine-grained routing figures
//! would tell about the text.

use std::time::Duration;

use mesh_net::hub::HubCounters;
use mesh_proto::attempts::Counts;
use mesh_wire::control::Vitals;
use prometheus::{
    Encoder, Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::audit::AuditCounts;
use crate::request::Timing;

/// Seconds; from a token on one fast machine to a long prompt on slow ones.
const TOKEN_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 2.5, 10.0];
/// Seconds; of phases and whole requests.
const REQUEST_BUCKETS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];
/// Rows of a step.
const ROW_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
/// Seconds; of one call to a node.
const CALL_BUCKETS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0];

/// How full the engine is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Sequences with KV blocks.
    pub running: usize,
    /// Sequences without.
    pub waiting: usize,
    /// Bytes of KV blocks owned by sequences.
    pub kv_used_bytes: u64,
    /// Bytes of KV blocks there are.
    pub kv_capacity_bytes: u64,
}

/// One call to a node that was answered.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeCall {
    /// Rows sent.
    pub rows: usize,
    /// Bytes of the call frame.
    pub sent_bytes: u64,
    /// Bytes of the reply frame.
    pub received_bytes: u64,
    /// First byte out to last byte in.
    pub duration: Duration,
}

/// All series. Recording is an atomic addition; share it in an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests_running: IntGauge,
    requests_waiting: IntGauge,
    requests_finished: IntCounterVec,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    steps: IntCounter,
    step_rows: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    expert_wait: Histogram,
    preemptions: IntCounter,
    kv_used: IntGauge,
    kv_capacity: IntGauge,
    wire_bytes: IntCounterVec,
    node_calls: IntCounterVec,
    node_rows: IntCounterVec,
    node_call_duration: HistogramVec,
    node_failures: IntCounterVec,
    node_up: IntGaugeVec,
    node_malformed: IntCounterVec,
    node_stale: IntCounterVec,
    machines: Machines,
    guard: Guard,
    hedged_calls: IntCounter,
    hedges_won: IntCounter,
    retried_calls: IntCounter,
    fallback_calls: IntCounter,
    fallback_rows: IntCounter,
    http_requests: IntCounterVec,
    http_in_flight: IntGauge,
    http_duration: Histogram,
}

/// Registers series under the prefix.
struct Registrar(Registry);

impl Registrar {
    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: Result<C, Error>,
    ) -> Result<C, Error> {
        let collector = made?;
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.add(IntCounter::with_opts(opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::with_opts(opts(name, help)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, Error> {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(opts))
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("moemesh")
}

/// Who is kept out.
#[derive(Debug)]
struct Guard {
    node_quarantined: IntGaugeVec,
    handshakes_failed: IntCounter,
    joins_refused: IntCounter,
    connections_deferred: IntCounter,
}

impl Guard {
    fn new(r: &Registrar) -> Result<Guard, Error> {
        Ok(Guard {
            node_quarantined: r.add(IntGaugeVec::new(
                opts(
                    "node_quarantined",
                    "1 if a node gets no work, as it answered what no correct node does.",
                ),
                &["node"],
            ))?,
            handshakes_failed: r.counter(
                "handshakes_failed_total",
                "Peers that did not get in: unknown or revoked keys, other protocols, silence.",
            )?,
            joins_refused: r.counter("joins_refused_total", "Machines that came to join and did not.")?,
            connections_deferred: r.counter(
                "connections_deferred_total",
                "First packets put off or turned away, as too many came at once.",
            )?,
        })
    }
}

/// What nodes' machines show, and what audits of them came to.
#[derive(Debug)]
struct Machines {
    audits: IntCounterVec,
    temperature: IntGaugeVec,
    throttled: IntGaugeVec,
    energy: IntCounterVec,
}

impl Machines {
    fn new(r: &Registrar) -> Result<Machines, Error> {
        let gauge = |name, help| r.add(IntGaugeVec::new(opts(name, help), &["node"]));
        Ok(Machines {
            audits: r.counters(
                "audits_total",
                "Answers of a node that were audited.",
                &["node", "outcome"],
            )?,
            temperature: gauge("node_temperature_celsius", "The processor's; absent where it is not known.")?,
            throttled: gauge(
                "node_throttled",
                "1 if the machine slows its processor down; absent where it is not known.",
            )?,
            energy: r.counters(
                "node_energy_joules_total",
                "Used while this router ran, as far as the machine measures it; absent where it does not.",
                &["node"],
            )?,
        })
    }
}

impl Metrics {
    /// All series at zero. Fails only if two had one name.
    pub fn new() -> Result<Metrics, Error> {
        let r = Registrar(Registry::new());
        let calls = HistogramOpts::from(opts("node_call_duration_seconds", "Answered calls to a node."))
            .buckets(CALL_BUCKETS.to_vec());
        Ok(Metrics {
            requests_running: r.gauge("requests_running", "Sequences being computed.")?,
            requests_waiting: r.gauge("requests_waiting", "Sequences waiting for KV memory.")?,
            requests_finished: r.counters("requests_finished_total", "Sequences that ended.", &["reason"])?,
            prompt_tokens: r.counter("prompt_tokens_total", "Prompt tokens computed.")?,
            generation_tokens: r.counter("generation_tokens_total", "Tokens generated.")?,
            steps: r.counter("steps_total", "Passes over all layers.")?,
            step_rows: r.histogram("step_rows", "Rows computed by a step.", &ROW_BUCKETS)?,
            first_token: r.histogram(
                "time_to_first_token_seconds",
                "Submission to first token.",
                &REQUEST_BUCKETS,
            )?,
            inter_token: r.histogram("inter_token_latency_seconds", "Between tokens.", &TOKEN_BUCKETS)?,
            queue: r.histogram("queue_duration_seconds", "Submission to first step.", &REQUEST_BUCKETS)?,
            prefill: r.histogram(
                "prefill_duration_seconds",
                "First step to first token.",
                &REQUEST_BUCKETS,
            )?,
            decode: r.histogram("decode_duration_seconds", "First token to last.", &REQUEST_BUCKETS)?,
            expert_wait: r.histogram(
                "expert_wait_seconds",
                "Waiting for nodes, per request.",
                &REQUEST_BUCKETS,
            )?,
            preemptions: r.counter("preemptions_total", "Sequences that gave up their KV blocks.")?,
            kv_used: r.gauge("kv_cache_used_bytes", "KV blocks owned by sequences.")?,
            kv_capacity: r.gauge("kv_cache_capacity_bytes", "KV blocks there are.")?,
            wire_bytes: r.counters(
                "wire_bytes_total",
                "Frames to and from nodes.",
                &["node", "direction"],
            )?,
            node_calls: r.counters("node_calls_total", "Calls answered by a node.", &["node"])?,
            node_rows: r.counters("node_rows_total", "Rows answered by a node.", &["node"])?,
            node_call_duration: r.add(HistogramVec::new(calls, &["node"]))?,
            node_failures: r.counters("node_failures_total", "Calls not answered.", &["node", "reason"])?,
            node_up: r.add(IntGaugeVec::new(opts("node_up", "1 if a node answers."), &["node"]))?,
            node_malformed: r.counters(
                "node_malformed_total",
                "Messages of a node that no correct node sends.",
                &["node"],
            )?,
            node_stale: r.counters("node_stale_replies_total", "Replies nobody waited for.", &["node"])?,
            machines: Machines::new(&r)?,
            guard: Guard::new(&r)?,
            hedged_calls: r.counter("hedged_calls_total", "Calls sent beside others that were late.")?,
            hedges_won: r.counter("hedges_won_total", "Late calls that others answered first.")?,
            retried_calls: r.counter("retried_calls_total", "Calls sent for others that had failed.")?,
            fallback_calls: r
                .counter("fallback_calls_total", "Times the router ran what was sent to a node.")?,
            fallback_rows: r
                .counter("fallback_rows_total", "Rows the router ran that were sent to a node.")?,
            http_requests: r.counters("http_requests_total", "HTTP answers.", &["route", "status"])?,
            http_in_flight: r.gauge("http_requests_in_flight", "HTTP requests being answered.")?,
            http_duration: r.histogram(
                "http_request_duration_seconds",
                "To the last byte.",
                &REQUEST_BUCKETS,
            )?,
            registry: r.0,
        })
    }

    /// The exposition text of `/metrics`.
    pub fn render(&self) -> Result<String, Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| Error::Msg(error.to_string()))
    }

    /// After each step: how full the engine is.
    pub fn load(&self, load: Load) {
        self.requests_running.set(load.running as i64);
        self.requests_waiting.set(load.waiting as i64);
        self.kv_used.set(load.kv_used_bytes as i64);
        self.kv_capacity.set(load.kv_capacity_bytes as i64);
    }

    /// After each step: rows computed, those of prompts among them, tokens chosen.
    pub fn step(&self, rows: usize, prompt_rows: usize, generated: usize) {
        self.steps.inc();
        self.step_rows.observe(rows as f64);
        self.prompt_tokens.inc_by(prompt_rows as u64);
        self.generation_tokens.inc_by(generated as u64);
    }

    /// A sequence's first token, `since` its submission.
    pub fn first_token(&self, since: Duration) {
        self.first_token.observe(since.as_secs_f64());
    }

    /// A sequence's further token, `since` the one before.
    pub fn next_token(&self, since: Duration) {
        self.inter_token.observe(since.as_secs_f64());
    }

    /// A sequence was broken off: `cancelled`, `error`. Its times say nothing.
    pub fn broken_off(&self, reason: &str) {
        self.requests_finished.with_label_values(&[reason]).inc();
    }

    /// A sequence came to its end: `stop`, `length`.
    pub fn finished(&self, reason: &str, timing: &Timing) {
        self.requests_finished.with_label_values(&[reason]).inc();
        self.queue.observe(timing.queued.as_secs_f64());
        self.prefill.observe(timing.prefill.as_secs_f64());
        self.decode.observe(timing.decode.as_secs_f64());
        self.expert_wait.observe(timing.waiting.as_secs_f64());
    }

    /// A sequence gave up its blocks.
    pub fn preempted(&self) {
        self.preemptions.inc();
    }

    /// A node answered a call.
    pub fn node_call(&self, node: &str, call: NodeCall) {
        self.wire_bytes.with_label_values(&[node, "sent"]).inc_by(call.sent_bytes);
        self.wire_bytes.with_label_values(&[node, "received"]).inc_by(call.received_bytes);
        self.node_calls.with_label_values(&[node]).inc();
        self.node_rows.with_label_values(&[node]).inc_by(call.rows as u64);
        self.node_call_duration.with_label_values(&[node]).observe(call.duration.as_secs_f64());
    }

    /// A node did not answer a call: `timeout`, `closed`, `refused`, `damaged`.
    pub fn node_failed(&self, node: &str, reason: &str) {
        self.node_failures.with_label_values(&[node, reason]).inc();
    }

    /// Whether a node answers.
    pub fn node_up(&self, node: &str, up: bool) {
        self.node_up.with_label_values(&[node]).set(i64::from(up));
    }

    /// Whether a node is in quarantine.
    pub fn node_quarantined(&self, node: &str, quarantined: bool) {
        self.guard.node_quarantined.with_label_values(&[node]).set(i64::from(quarantined));
    }

    /// What came of audits of a node so far.
    pub fn node_audits(&self, node: &str, counts: &AuditCounts) {
        let AuditCounts { right, wrong, unchecked, skipped } = *counts;
        for (outcome, now) in
            [("right", right), ("wrong", wrong), ("unchecked", unchecked), ("skipped", skipped)]
        {
            let counter = self.machines.audits.with_label_values(&[node, outcome]);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    /// What a node's machine shows. What it does not show has no series.
    pub fn node_vitals(&self, node: &str, vitals: &Vitals) {
        let Machines { temperature, throttled, .. } = &self.machines;
        let degrees = vitals.temperature_mc.map(|mc| i64::from(mc).div_euclid(1000));
        for (gauge, now) in [(temperature, degrees), (throttled, vitals.throttled.map(i64::from))] {
            match now {
                Some(now) => gauge.with_label_values(&[node]).set(now),
                // Fails where there was none.
                None => drop(gauge.remove_label_values(&[node])),
            }
        }
    }

    /// Whole joules that a node used so far; none where it does not say.
    pub fn node_energy(&self, node: &str, joules: Option<u64>) {
        if let Some(joules) = joules {
            let counter = self.machines.energy.with_label_values(&[node]);
            counter.inc_by(joules.saturating_sub(counter.get()));
        }
    }

    /// Who knocked at the router's door so far and was not let in.
    pub fn strangers(&self, counters: &HubCounters) {
        for (series, now) in [
            (&self.guard.handshakes_failed, counters.handshakes_failed),
            (&self.guard.joins_refused, counters.joins_refused),
            (&self.guard.connections_deferred, counters.deferred),
        ] {
            series.inc_by(now.saturating_sub(series.get()));
        }
    }

    /// What a node has sent so far that no correct node sends, and replies nobody waited for.
    pub fn node_nonsense(&self, node: &str, malformed: u64, stale: u64) {
        for (series, now) in [(&self.node_malformed, malformed), (&self.node_stale, stale)] {
            let counter = series.with_label_values(&[node]);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    /// What was done about calls of one layer that were late or failed.
    pub fn calls_repeated(&self, counts: &Counts) {
        self.hedged_calls.inc_by(counts.hedges);
        self.hedges_won.inc_by(counts.hedges_won);
        self.retried_calls.inc_by(counts.retries);
    }

    /// The router ran itself what was sent to a node.
    pub fn fallback(&self, rows: usize) {
        self.fallback_calls.inc();
        self.fallback_rows.inc_by(rows as u64);
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> u64 {
        self.generation_tokens.get()
    }

    /// An HTTP request came in.
    pub fn http_started(&self) {
        self.http_in_flight.inc();
    }

    /// An HTTP request was answered to the last byte, or its client went away (status 499).
    pub fn http_finished(&self, route: &str, status: u16, took: Duration) {
        self.http_in_flight.dec();
        self.http_requests.with_label_values(&[route, &status.to_string()]).inc();
        self.http_duration.observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_named_by_the_rules_and_shows_what_was_counted() {
        let metrics = Metrics::new().unwrap();
        metrics.load(Load { running: 2, waiting: 3, kv_used_bytes: 10, kv_capacity_bytes: 20 });
        metrics.step(7, 5, 2);
        metrics.first_token(Duration::from_millis(30));
        metrics.next_token(Duration::from_millis(3));
        metrics.finished("stop", &Timing::default());
        metrics.preempted();
        let call =
            NodeCall { rows: 4, sent_bytes: 100, received_bytes: 50, duration: Duration::from_micros(70) };
        metrics.node_call("a", call);
        metrics.node_failed("a", "timeout");
        metrics.node_up("a", true);
        metrics.fallback(4);
        metrics.node_nonsense("a", 2, 5);
        metrics.node_nonsense("a", 2, 7);
        metrics.node_quarantined("a", true);
        let knocks =
            HubCounters { handshakes_failed: 4, joins_refused: 3, deferred: 9, ..HubCounters::default() };
        metrics.strangers(&HubCounters { handshakes_failed: 2, ..knocks });
        metrics.strangers(&knocks);
        metrics.calls_repeated(&Counts { hedges: 3, hedges_won: 2, retries: 1, ..Counts::default() });
        metrics.http_started();
        metrics.http_finished("/v1/models", 200, Duration::from_millis(1));
        let text = metrics.render().unwrap();
        for line in [
            "moemesh_requests_running 2",
            "moemesh_generation_tokens_total 2",
            "moemesh_prompt_tokens_total 5",
            "moemesh_requests_finished_total{reason=\"stop\"} 1",
            "moemesh_wire_bytes_total{direction=\"sent\",node=\"a\"} 100",
            "moemesh_node_rows_total{node=\"a\"} 4",
            "moemesh_time_to_first_token_seconds_count 1",
            "moemesh_http_requests_total{route=\"/v1/models\",status=\"200\"} 1",
            "moemesh_http_requests_in_flight 0",
            "moemesh_node_malformed_total{node=\"a\"} 2",
            "moemesh_node_stale_replies_total{node=\"a\"} 7",
            "moemesh_hedged_calls_total 3",
            "moemesh_node_quarantined{node=\"a\"} 1",
            "moemesh_handshakes_failed_total 4",
            "moemesh_joins_refused_total 3",
            "moemesh_connections_deferred_total 9",
            "moemesh_hedges_won_total 2",
            "moemesh_retried_calls_total 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        let mut helped = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                helped.insert(rest.split(' ').next().unwrap());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(
                    helped.contains(name) && name.starts_with("moemesh_") && !name.contains(':'),
                    "{name}"
                );
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            }
        }
    }

    #[test]
    fn what_a_machine_does_not_show_has_no_series() {
        let metrics = Metrics::new().unwrap();
        metrics.node_audits("a", &AuditCounts { right: 3, ..AuditCounts::default() });
        metrics.node_audits("a", &AuditCounts { right: 5, wrong: 1, ..AuditCounts::default() });
        let shown = Vitals { temperature_mc: Some(71_900), throttled: Some(true), ..Vitals::default() };
        metrics.node_vitals("a", &shown);
        metrics.node_vitals("b", &shown);
        metrics.node_vitals("b", &Vitals::default());
        metrics.node_energy("a", Some(12));
        metrics.node_energy("b", None);
        let text = metrics.render().unwrap();
        for line in [
            "moemesh_audits_total{node=\"a\",outcome=\"right\"} 5",
            "moemesh_audits_total{node=\"a\",outcome=\"wrong\"} 1",
            "moemesh_audits_total{node=\"a\",outcome=\"skipped\"} 0",
            "moemesh_node_temperature_celsius{node=\"a\"} 71",
            "moemesh_node_throttled{node=\"a\"} 1",
            "moemesh_node_energy_joules_total{node=\"a\"} 12",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("{node=\"b\"}"), "what is not known has no series\n{text}");
    }
}
