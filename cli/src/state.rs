//! Where router and node keep who they are.

use std::path::PathBuf;

use anyhow::Context;

/// The state folder of a role: what was given, else below the user's data folder.
pub(crate) fn folder(given: Option<PathBuf>, role: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path);
    }
    let from = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    // As the XDG base directory specification has it: relative paths do not count.
    let base = from("XDG_DATA_HOME").filter(|path| path.is_absolute());
    let base = base.or_else(|| from("HOME").map(|home| home.join(".local/share")));
    let base =
        base.context("neither HOME nor XDG_DATA_HOME is set; say where to keep the state with --state DIR")?;
    Ok(base.join("moemesh").join(role))
}
