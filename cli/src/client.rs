//! A small client of the router's own API: JSON requests and server-sent events.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// Longest wait for a connection; the router is on this machine or on the LAN.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A router.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    base: String,
    key: Option<String>,
    agent: ureq::Agent,
}

impl Client {
    /// `base` is `http://host:port`.
    pub(crate) fn new(base: &str, key: Option<String>) -> Client {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .build();
        let base = base.trim_end_matches('/');
        let base = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        Client { base, key, agent: config.into() }
    }

    /// Where it is.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// `GET path` as JSON.
    pub(crate) fn fetch(&self, path: &str) -> anyhow::Result<Value> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().with_context(|| self.unreachable())?;
        let value: Value = response.body_mut().read_json().context("read the answer")?;
        check(response.status().as_u16(), value)
    }

    /// `POST path` as JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut response = self.send(path, body)?;
        let value: Value = response.body_mut().read_json().context("read the answer")?;
        check(response.status().as_u16(), value)
    }

    /// `POST path` with `stream: true`; `on_chunk` sees each event and says whether to go on. Stopping closes
    /// the connection, which cancels the work.
    pub(crate) fn stream(
        &self,
        path: &str,
        body: &Value,
        mut on_chunk: impl FnMut(&Value) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let mut response = self.send(path, body)?;
        if !response.status().is_success() {
            let value: Value = response.body_mut().read_json().context("read the error")?;
            check(response.status().as_u16(), value)?;
            return Ok(());
        }
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line.context("the stream broke off")?;
            let Some(event) = line.strip_prefix("data: ") else { continue };
            if event == "[DONE]" {
                return Ok(());
            }
            let chunk: Value = serde_json::from_str(event).context("an event is not JSON")?;
            if let Some(message) = chunk.pointer("/error/message").and_then(Value::as_str) {
                bail!("{message}");
            }
            if !on_chunk(&chunk)? {
                return Ok(());
            }
        }
        bail!("the router closed the stream before its end")
    }

    fn send(&self, path: &str, body: &Value) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        request.send_json(body).with_context(|| self.unreachable())
    }

    fn unreachable(&self) -> String {
        format!(
            "no router answers at {}; start one with `moemesh router` or `moemesh demo --serve`",
            self.base
        )
    }
}

fn check(status: u16, value: Value) -> anyhow::Result<Value> {
    if (200..300).contains(&status) {
        return Ok(value);
    }
    let message = value.pointer("/error/message").and_then(Value::as_str).unwrap_or("no message");
    Err(anyhow!("{message} (HTTP {status})"))
}
