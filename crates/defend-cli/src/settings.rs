//! `defend settings`

use anyhow::Result;

use crate::arguments::Settings;
use crate::exit::Exit;
use crate::say::tell;

pub(crate) fn run(arguments: &Settings) -> Result<Exit> {
    tell!(
        "{}",
        serde_json::to_string_pretty(&arguments.recipe.config())?
    )?;
    Ok(Exit::default())
}
