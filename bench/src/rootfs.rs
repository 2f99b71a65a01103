//! From a layer's tar to something that can be mounted: our writer, mkfs.erofs, and umoci's unpacked tree.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use kiln_testkit::{image, run as run_tool};

use crate::report::Report;

/// Makes an image of a tar archive; the tree is a place for whoever needs one.
type Mkfs = fn(tar: &Path, tree: &Path, out: &Path) -> Result<()>;

pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let debian = image::debian()?;
    let place = tempfile::tempdir().context("a directory")?;
    let tar = place.path().join("layer.tar");
    largest_layer(&debian.layout, &tar)?;
    let bytes = fs::metadata(&tar).context("the layer")?.len();
    let mib = bytes as f64 / f64::from(1 << 20);
    report.note(format!(
        "layer: Debian minimal, {mib:.1} MiB of uncompressed tar; times end with the data on disk"
    ));
    let out = place.path().join("out");
    let tree = place.path().join("tree");
    let mkfs: (&str, Mkfs) = if mkfs_reads_tar()? {
        ("mkfs.erofs --tar=f: tar -> EROFS", mkfs_from_tar)
    } else {
        report.note("this mkfs.erofs has no --tar, so the archive is unpacked for it".into());
        ("tar -x, mkfs.erofs: tar -> tree -> EROFS", mkfs_from_tree)
    };
    for _ in 0..runs {
        report.timed("kiln: tar -> EROFS", mib, || {
            let file = File::create(&out).context("the image")?;
            kiln_rootfs::write_layer(File::open(&tar).context("the layer")?, &file)?;
            file.sync_all().context("the image")
        })?;
        fs::remove_file(&out).context("the image")?;
        report.timed(mkfs.0, mib, || {
            mkfs.1(&tar, &tree, &out)?;
            File::open(&out).and_then(|file| file.sync_all()).context("the image")
        })?;
        fs::remove_file(&out).context("the image")?;
        if tree.exists() {
            fs::remove_dir_all(&tree).context("the tree")?;
        }
        // umoci has no other source than the compressed image, so it inflates and verifies as well.
        report.timed("umoci: image -> unpacked tree", mib, || {
            debian.unpack(&out)?;
            run_tool(Command::new("sync").arg("-f").arg(&out))
        })?;
        fs::remove_dir_all(&out).context("the tree")?;
    }
    Ok(())
}

fn mkfs_reads_tar() -> Result<bool> {
    let help = Command::new("mkfs.erofs").arg("--help").output();
    let help =
        help.context("cannot start mkfs.erofs\nhint: `cargo xtask setup test` installs erofs-utils")?;
    Ok([help.stdout, help.stderr].iter().any(|text| String::from_utf8_lossy(text).contains("--tar")))
}

fn mkfs_from_tar(tar: &Path, _tree: &Path, out: &Path) -> Result<()> {
    run_tool(Command::new("mkfs.erofs").args(["--quiet", "--tar=f"]).arg(out).arg(tar))
}

fn mkfs_from_tree(tar: &Path, tree: &Path, out: &Path) -> Result<()> {
    fs::create_dir(tree).context("the tree")?;
    run_tool(Command::new("tar").args(["--xattrs", "-xpf"]).arg(tar).arg("-C").arg(tree))?;
    run_tool(Command::new("mkfs.erofs").arg("--quiet").arg(out).arg(tree))
}

/// Inflates the largest blob of a layout.
fn largest_layer(layout: &Path, to: &Path) -> Result<()> {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).context("the blobs")?;
    let blobs = blobs.map(|blob| blob.and_then(|blob| Ok((blob.metadata()?.len(), blob.path()))));
    let blobs = blobs.collect::<std::io::Result<Vec<_>>>().context("the blobs")?;
    let (_, largest) = blobs.into_iter().max().context("no blobs")?;
    let to = File::create(to).context("the layer")?;
    let status =
        Command::new("gzip").arg("-dc").stdin(File::open(largest).context("the blob")?).stdout(to).status();
    anyhow::ensure!(status.context("gzip")?.success(), "the largest blob is not gzip");
    Ok(())
}
