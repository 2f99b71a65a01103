//! `kiln version`.

use serde_json::json;

use crate::Context;
use crate::failure::Failure;

/// Prints what this build is: version, commit, and the hashes of kernel and agent.
///
/// # Errors
/// When the guest's files are there and cannot be read.
pub(crate) fn version(context: &Context, json: bool) -> Result<(), Failure> {
    let build = context.build;
    let guest = match context.guest() {
        Ok(bundle) => Some(bundle.digests().map_err(Failure::host)?),
        // A build without a guest still has a version.
        Err(_) => None,
    };
    let (kernel, agent) = match guest {
        Some((kernel, agent)) => (Some(kernel.to_string()), Some(agent.to_string())),
        None => (None, None),
    };
    let text = if json {
        let object = json!({
            "version": build.version, "commit": build.commit, "arch": std::env::consts::ARCH,
            "kernel": kernel, "agent": agent,
        });
        format!("{object:#}\n")
    } else {
        let shown = |digest: Option<String>| digest.unwrap_or_else(|| "none".to_owned());
        format!(
            "kiln    {} ({}, {})\nkernel  {}\nagent   {}\n",
            build.version,
            build.commit,
            std::env::consts::ARCH,
            shown(kernel),
            shown(agent)
        )
    };
    crate::print(&text)
}
