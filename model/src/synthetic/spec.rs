//! `synthetic:<shape>?layers=N&seed=S`, parsed. Anything else is refused, with the list of what there is.

use serde_json::Value;

use super::shapes::SHAPES;
use crate::config::parse::limits::MAX_LAYERS;
use crate::config::{ModelConfig, parse};

/// How names of synthetic models start.
pub const PREFIX: &str = "synthetic:";

/// Why a spec is refused; lists what there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SyntheticError(pub String);

/// A parsed spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) shape: &'static str,
    pub(super) config: &'static str,
    pub(super) layers: Option<usize>,
    pub(super) seed: u64,
}

impl Spec {
    pub(super) fn parse(text: &str) -> Result<Spec, SyntheticError> {
        let fail = |what: String| Err(SyntheticError(format!("'{}': {what}", text.escape_debug())));
        let Some(rest) = text.strip_prefix(PREFIX) else {
            return fail(format!("a synthetic model is named {PREFIX}<shape>?layers=N&seed=S"));
        };
        let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
        let Some((shape, config)) = SHAPES.into_iter().find(|(shape, _)| *shape == name) else {
            let shapes = SHAPES.map(|(shape, _)| shape).join(", ");
            return fail(format!("there is no shape '{}'; shapes are {shapes}", name.escape_debug()));
        };
        let (mut layers, mut seed) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let repeated = match key {
                "layers" => match value.parse() {
                    Ok(count) if (1..=MAX_LAYERS).contains(&count) => layers.replace(count).is_some(),
                    _ => return fail(format!("layers must be a number from 1 to {MAX_LAYERS}")),
                },
                "seed" => match value.parse::<u64>() {
                    Ok(value) => seed.replace(value).is_some(),
                    Err(_) => return fail("seed must be a whole number below 2^64".to_string()),
                },
                _ => {
                    return fail(format!(
                        "there is no key '{}'; keys are layers and seed",
                        key.escape_debug()
                    ));
                }
            };
            if repeated {
                return fail(format!("{key} is given twice"));
            }
        }
        Ok(Spec { shape, config, layers, seed: seed.unwrap_or(0) })
    }

    /// The shape's `config.json` with the number of layers asked for.
    pub(super) fn config_json(&self) -> Result<Value, SyntheticError> {
        let broken = |error: serde_json::Error| SyntheticError(format!("shape {}: {error}", self.shape));
        let mut json: Value = serde_json::from_str(self.config).map_err(broken)?;
        if let Some(layers) = self.layers {
            json["num_hidden_layers"] = layers.into();
        }
        Ok(json)
    }

    pub(super) fn model_config(&self) -> Result<ModelConfig, SyntheticError> {
        let text = self.config_json()?.to_string();
        parse::parse(&text).map_err(|error| SyntheticError(format!("shape {}: {error}", self.shape)))
    }
}
