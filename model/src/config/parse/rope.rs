//! Rotary embedding settings, in the old spelling (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`).
//!
//! Reference: `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict` and `_compute_yarn_parameters` of
//! transformers 5.23. Default, linear and yarn are computed; every other type is refused by name.

use serde_json::{Map, Value};

use super::keys::{ConfigError, Keys, shorten};
use super::limits::MAX_CONTEXT;
use crate::config::{Rope, RopeScaling};

/// Rotations above which yarn keeps a dimension's frequency, where the file does not say (Peng et al. 2023).
const BETA_FAST: f64 = 32.0;
/// Rotations below which yarn interpolates fully.
const BETA_SLOW: f64 = 1.0;
/// Largest rope base; models use up to 1e8.
const MAX_THETA: f64 = 1e12;
/// Largest context extension factor.
const MAX_FACTOR: f64 = 1e6;

pub(super) fn rope(keys: &mut Keys, default_theta: f64, context: usize) -> Result<Rope, ConfigError> {
    let old = keys.object("rope_scaling")?;
    let new = keys.object("rope_parameters")?;
    if let (Some(old), Some(new)) = (&old, &new)
        && old != new
    {
        return Err(ConfigError("rope_scaling and rope_parameters differ; remove rope_scaling".to_string()));
    }
    let mut inner = Keys::new(old.or(new).unwrap_or_default());
    inner.family = keys.family;
    let outer_theta = keys.number("rope_theta", default_theta)?;
    let theta = inner.number("rope_theta", outer_theta)?;
    for factor in
        [keys.optional_number("partial_rotary_factor")?, inner.optional_number("partial_rotary_factor")?]
    {
        if let Some(factor) = factor.filter(|factor| *factor != 1.0) {
            return Err(keys.refuse("partial_rotary_factor", &Value::from(factor), "only 1.0 is"));
        }
    }
    let old_type = inner.text("type")?;
    let kind = inner.text("rope_type")?.or(old_type).unwrap_or_else(|| "default".to_string());
    let original = keys.optional_size("original_max_position_embeddings", 1..=MAX_CONTEXT)?;
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: inner.number("factor", f64::NAN)? },
        "yarn" => yarn(&mut inner, original, context)?,
        other => {
            return Err(keys.refuse(
                "rope_type",
                &Value::from(other),
                "use a model with default, linear or yarn",
            ));
        }
    };
    unused(inner.into_left(), &kind)?;
    let rope = Rope { theta, scaling };
    check(&rope)?;
    Ok(rope)
}

fn yarn(keys: &mut Keys, outer_original: Option<usize>, context: usize) -> Result<RopeScaling, ConfigError> {
    let inner_original = keys.optional_size("original_max_position_embeddings", 1..=MAX_CONTEXT)?;
    // A value outside rope_parameters has priority in transformers; without any, the context itself.
    let original_context = outer_original.or(inner_original).unwrap_or(context);
    let factor = keys.number("factor", context as f64 / original_context as f64)?;
    let (mscale, all_dim) = (keys.optional_number("mscale")?, keys.optional_number("mscale_all_dim")?);
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 };
    // In Python zero is false: an mscale of 0 counts as absent, and so do betas of 0.
    let nonzero = |value: &f64| *value != 0.0;
    let inferred = match (mscale.filter(nonzero), all_dim.filter(nonzero)) {
        (Some(mscale), Some(all_dim)) => magnitude(mscale) / magnitude(all_dim),
        _ => magnitude(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: keys.optional_number("beta_fast")?.filter(nonzero).unwrap_or(BETA_FAST),
        beta_slow: keys.optional_number("beta_slow")?.filter(nonzero).unwrap_or(BETA_SLOW),
        attention_factor: keys.number("attention_factor", inferred)?,
        truncate: keys.flag("truncate", true)?,
    })
}

fn unused(left: Map<String, Value>, kind: &str) -> Result<(), ConfigError> {
    match left.iter().find(|(_, value)| !value.is_null()) {
        None => Ok(()),
        Some((name, value)) => Err(ConfigError(format!(
            "rope parameter {} = {} has no meaning for rope type {kind}; remove it or correct the type",
            name.escape_debug(),
            shorten(value)
        ))),
    }
}

/// Checks ranges, wherever the values came from.
pub(super) fn check(rope: &Rope) -> Result<(), ConfigError> {
    let within = |name: &str, value: f64, low: f64, high: f64| {
        if value >= low && value <= high {
            return Ok(());
        }
        Err(ConfigError(format!("{name} = {value} is out of range, it must be {low} to {high}")))
    };
    // Yarn divides by the logarithm of theta, which must stay away from zero.
    within("rope_theta", rope.theta, 1.5, MAX_THETA)?;
    match rope.scaling {
        RopeScaling::Default => Ok(()),
        RopeScaling::Linear { factor } => within("rope factor", factor, 1e-3, MAX_FACTOR),
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: _,
        } => {
            within("rope factor", factor, 1e-3, MAX_FACTOR)?;
            within("original_max_position_embeddings", original_context as f64, 1.0, MAX_CONTEXT as f64)?;
            within("beta_fast", beta_fast, 1e-6, 1e6)?;
            within("beta_slow", beta_slow, 1e-6, beta_fast)?;
            within("attention_factor", attention_factor, 1e-6, 1e6)
        }
    }
}
