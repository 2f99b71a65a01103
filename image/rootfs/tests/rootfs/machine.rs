//! What this machine's programs and kernel make of images and archives. These need root.

use std::fs::{self, File};
use std::io::{Cursor, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_rootfs::{LayerReader, MergeSummary};
use kiln_testkit::layout::{Layer, Layout};
use kiln_testkit::run;
use serde_json::json;
use tempfile::TempDir;

use crate::facts::{self, Facts};

/// The image of a layer.
pub(crate) fn layer(tar: &[u8]) -> Vec<u8> {
    let mut image = Cursor::new(Vec::new());
    let summary = kiln_rootfs::write_layer(tar, &mut image).unwrap();
    assert_eq!(summary.image_bytes, image.get_ref().len() as u64);
    image.into_inner()
}

/// Layers' images merged: the whole device.
pub(crate) fn merge(images: &[Vec<u8>]) -> (Vec<u8>, MergeSummary) {
    let readers: Vec<_> = images.iter().map(|image| LayerReader::open(Cursor::new(image)).unwrap()).collect();
    let mut device = Vec::new();
    let summary = kiln_rootfs::merge(&readers, &mut device).unwrap();
    assert_eq!(summary.metadata_bytes, device.len() as u64);
    for (image, start) in images.iter().zip(&summary.layer_starts) {
        assert_eq!(*start, device.len() as u64);
        device.extend_from_slice(image);
    }
    assert_eq!(summary.total_bytes, device.len() as u64);
    (device, summary)
}

/// Whole layer tars, merged: the device.
pub(crate) fn device(tars: &[Vec<u8>]) -> Vec<u8> {
    merge(&tars.iter().map(|tar| layer(tar)).collect::<Vec<_>>()).0
}

/// An image mounted by the kernel, until this is dropped.
pub(crate) struct Mount(TempDir);

impl Mount {
    /// Mounts an image file; `options` as `mount -o` has them.
    pub(crate) fn new(image: &Path, options: &str) -> Self {
        let mount = Self(TempDir::new().unwrap());
        run(Command::new("mount").arg("-o").arg(format!("loop,{options}")).arg(image).arg(mount.path()))
            .expect("the kernel mounts the image (needs root, loop devices, erofs and ext4: or `cargo xtask rig`)");
        mount
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A mount that stays would keep the directory from being removed, which then fails loudly enough.
        let _ = run(Command::new("umount").arg(self.path()));
    }
}

/// What the kernel sees in an EROFS image; `fsck.erofs` must agree that it is one.
pub(crate) fn kernel_facts(image: &[u8]) -> Facts {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    fsck(file.path());
    let mount = Mount::new(file.path(), "ro");
    facts::of_directory(mount.path())
}

/// Has `fsck.erofs` look at an image, file data and all.
pub(crate) fn fsck(image: &Path) {
    run(Command::new("fsck.erofs").arg("--extract").arg(image))
        .expect("fsck.erofs finds nothing (apt package erofs-utils)");
}

/// What umoci unpacks of an image of these layers.
pub(crate) fn umoci_facts(tars: &[Vec<u8>]) -> Facts {
    let dir = TempDir::new().unwrap();
    let mut layout = Layout::create(&dir.path().join("layout")).unwrap();
    let layers: Vec<_> = tars.iter().map(|tar| Layer::plain(tar.clone())).collect();
    layout.image("image", json!({}), &layers).unwrap();
    let image = format!("{}:image", layout.dir().display());
    let root = dir.path().join("root");
    run(Command::new("umoci").args(["raw", "unpack", "--image", &image]).arg(&root))
        .expect("umoci unpacks the image (apt package umoci; needs root)");
    facts::of_directory(&root)
}

/// What GNU tar unpacks of an archive.
pub(crate) fn tar_facts(tar: &[u8]) -> Facts {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut child = Command::new("tar")
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-", "-C"])
        .arg(&root)
        .stdin(Stdio::piped())
        .spawn()
        .expect("tar is installed");
    child.stdin.take().unwrap().write_all(tar).unwrap();
    assert!(child.wait().unwrap().success());
    facts::of_directory(&root)
}

/// An empty scratch file.
pub(crate) fn file() -> (TempDir, File) {
    let dir = TempDir::new().unwrap();
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(dir.path().join("disk")).unwrap();
    (dir, file)
}
