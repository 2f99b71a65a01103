//! Pulls from a registry on this machine, cold and warm, beside `skopeo copy` into an OCI layout.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use kiln_testkit::registry::{Access, Registry};
use kiln_testkit::{image, run as run_tool};

use crate::kiln;
use crate::report::Report;

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let registry = Registry::start(Access::Open)?;
    let python = image::python()?;
    registry.push(&python.skopeo(), "python:1")?;
    let name = registry.image("python:1");
    let place = tempfile::tempdir().context("a directory")?;
    let bytes = blob_bytes(&place.path().join("alone"), &python)?;
    let mib = bytes as f64 / f64::from(1 << 20);
    report
        .note(format!("image: Python on Debian, {mib:.1} MiB compressed, from docker-registry on loopback"));
    report.note(
        "kiln ends with EROFS images on disk, skopeo with the compressed blobs as they came".to_owned(),
    );
    let (kiln, store, layout) = (kiln()?, place.path().join("store"), place.path().join("layout"));
    for _ in 0..runs {
        for temperature in ["cold", "warm"] {
            report.timed(&format!("kiln pull, {temperature}"), mib, || {
                run_tool(Command::new(&kiln).args(["pull", "-q", &name]).env("KILN_ROOT", &store))
            })?;
            report.timed(&format!("skopeo copy, {temperature}"), mib, || {
                let mut skopeo = Command::new("skopeo");
                skopeo.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"]);
                run_tool(
                    skopeo.arg(format!("docker://{name}")).arg(format!("oci:{}:python", layout.display())),
                )
            })?;
        }
        fs::remove_dir_all(&store).context("the store")?;
        fs::remove_dir_all(&layout).context("the layout")?;
    }
    Ok(())
}

/// The bytes of an image's blobs alone, without what its layout has of earlier steps.
fn blob_bytes(alone: &Path, image: &image::Image) -> Result<u64> {
    image.copy_to(&format!("oci:{}:alone", alone.display()), &[])?;
    let mut bytes = 0;
    for blob in fs::read_dir(alone.join("blobs/sha256")).context("the blobs")? {
        bytes += blob.and_then(|blob| blob.metadata()).context("a blob")?.len();
    }
    Ok(bytes)
}
