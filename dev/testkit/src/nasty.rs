//! Images that break builders of root file systems. Each function says what is nasty about its images.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::image::{Image, busybox_layer, once, with_probe};
use crate::layout::{Layer, Layout};
use crate::tar::{Entry, Tar};

/// The directory that these images fill, and that a test lists.
pub const PLACE: &str = "/t";
/// Layers an image may have, as with Docker.
const LAYERS: usize = 127;

/// Layers that take away what others brought: a file deleted and added again, opaque directories that hide lower
/// children only, an opaque marker in a new directory, a whiteout of nothing, files and directories that change place.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn deletions() -> Result<Image> {
    let first = Tar::new()
        .with(&Entry::dir("t/"))
        .with(&Entry::file("t/again", "first"))
        .with(&Entry::file("t/gone", "gone"))
        .with(&Entry::file("t/kept", "kept"))
        .with(&Entry::dir("t/opaque/"))
        .with(&Entry::file("t/opaque/lower", "lower"))
        .with(&Entry::dir("t/opaque/sub/"))
        .with(&Entry::file("t/opaque/sub/deep", "deep"))
        .with(&Entry::dir("t/tree/"))
        .with(&Entry::dir("t/tree/a/"))
        .with(&Entry::file("t/tree/a/b", "b"))
        .with(&Entry::file("t/becomes-dir", "file"))
        .with(&Entry::dir("t/becomes-file/"))
        .with(&Entry::file("t/becomes-file/child", "child"))
        .with(&Entry::symlink("t/link-becomes-dir", "kept"))
        .with(&Entry::file("t/one-name", "two names"))
        .with(&Entry::hard_link("t/other-name", "t/one-name"))
        .with(&Entry::dir("t/mode/").mode(0o700))
        .with(&Entry::file("t/mode/child", "child"));
    let second = Tar::new()
        .with(&Entry::marker("t/.wh.again"))
        .with(&Entry::marker("t/.wh.gone"))
        .with(&Entry::marker("t/.wh.never-was"))
        // The marker comes after a child of its own layer: it hides lower children only.
        .with(&Entry::dir("t/opaque/"))
        .with(&Entry::file("t/opaque/upper", "upper"))
        .with(&Entry::marker("t/opaque/.wh..wh..opq"))
        .with(&Entry::marker("t/.wh.tree"))
        .with(&Entry::dir("t/becomes-dir/"))
        .with(&Entry::file("t/becomes-dir/child", "child"))
        .with(&Entry::file("t/becomes-file", "file"))
        .with(&Entry::dir("t/link-becomes-dir/").mode(0o750))
        .with(&Entry::marker("t/.wh.other-name"))
        .with(&Entry::dir("t/mode/").mode(0o755).owner(5, 6).mtime(1_700_000_000));
    let third = Tar::new()
        .with(&Entry::file("t/again", "third"))
        .with(&Entry::dir("t/new/"))
        .with(&Entry::marker("t/new/.wh..wh..opq"))
        .with(&Entry::file("t/new/file", "new"))
        .with(&Entry::dir("t/tree/"))
        .with(&Entry::file("t/tree/c", "c"))
        .with(&Entry::dir("t/opaque/sub/"))
        .with(&Entry::file("t/opaque/sub/third", "third"));
    make("deletions", &[first, second, third])
}

/// As many layers as an image may have. Each adds a file and, but for each tenth, deletes that of the layer below it.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn deep() -> Result<Image> {
    let layers: Vec<Tar> = (1..LAYERS)
        .map(|layer| {
            let tar = if layer == 1 { Tar::new().with(&Entry::dir("t/")) } else { Tar::new() };
            let tar = tar.with(&Entry::file(format!("t/{layer}"), format!("layer {layer}")));
            if layer > 1 && !layer.is_multiple_of(10) {
                return tar.with(&Entry::marker(format!("t/.wh.{}", layer - 1)));
            }
            tar
        })
        .collect();
    make("deep", &layers)
}

/// Everything a file can be besides bytes: owners up to 32 bits, setuid, extended attributes and file capabilities,
/// pipes, devices, hard links across directories, odd and long names, long paths, sparse and empty files, file sizes
/// around the block size, times with nanoseconds.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn metadata() -> Result<Image> {
    // File capabilities, version 2: cap_net_raw, effective. capabilities(7), "File capability extended attribute".
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut tar = Tar::new()
        .with(&Entry::dir("t/").mode(0o1777).owner(7, 8))
        .with(&Entry::file("t/setuid", "s").mode(0o4755))
        .with(&Entry::file("t/setgid", "s").mode(0o2711).owner(0, 42))
        .with(&Entry::file("t/no-mode", "s").mode(0))
        .with(&Entry::file("t/owned", "o").owner(65_534, 100_000))
        .with(&Entry::file("t/owned-32-bit", "o").owner(4_000_000_000, 3_000_000_001))
        .with(&Entry::file("t/capable", "c").mode(0o755).xattr("security.capability", capability))
        .with(&Entry::file("t/attributes", "a").xattr("user.one", "1").xattr("user.bin", b"\0\xff\n"))
        .with(
            &Entry::file("t/many-attributes", "a").xattr("user.large", vec![b'x'; 2000]).xattr("user.b", "2"),
        )
        .with(&Entry::dir("t/dir-attributes/").xattr("user.dir", "d"))
        .with(&Entry::fifo("t/pipe").mode(0o640).owner(3, 4))
        .with(&Entry::char_device("t/null", 1, 3).mode(0o666))
        .with(&Entry::block_device("t/loop9", 7, 9))
        .with(&Entry::char_device("t/large-numbers", 259, 1_000_000))
        .with(&Entry::dir("t/a/"))
        .with(&Entry::dir("t/b/"))
        .with(&Entry::file("t/a/name", "linked").xattr("user.linked", "1"))
        .with(&Entry::hard_link("t/b/name", "t/a/name"))
        .with(&Entry::hard_link("t/b/third", "t/b/name"))
        .with(&Entry::symlink("t/absolute", "/etc/passwd"))
        .with(&Entry::symlink("t/dangling", "../../nowhere"))
        .with(&Entry::symlink("t/long-target", "x/".repeat(400)))
        .with(&Entry::file(b"t/not-utf8-\xff\xfe\x80", "n"))
        .with(&Entry::file("t/new\nline", "n"))
        .with(&Entry::file("t/ space and \"quotes\"", "n"))
        .with(&Entry::file("t/ünï-cødé-🔥", "n"))
        .with(&Entry::file(["t/", &"n".repeat(255)].concat(), "n"))
        .with(&Entry::file("t/epoch", "e").mtime(0))
        .with(&Entry::file("t/after-2106", "e").mtime(5_000_000_000))
        .with(&Entry::file("t/nanoseconds", "e").pax("mtime", "1600000000.123456789"))
        .with(&Entry::file("t/sparse", sparse()));
    for size in [0, 1, 4095, 4096, 4097, 8192, 65_535, 65_536, 65_537, 1_000_000] {
        let data: Vec<u8> = (0..size).map(|at| (at % 253) as u8).collect();
        tar = tar.with(&Entry::file(format!("t/size-{size}"), data));
    }
    tar = tar.with(&Entry::dir("t/many/"));
    for number in 0..2000 {
        tar = tar.with(&Entry::file(format!("t/many/entry-{number:05}"), number.to_string()));
    }
    let mut path = "t/deep".to_owned();
    for _ in 0..30 {
        tar = tar.with(&Entry::dir(format!("{path}/")));
        path.extend(["/", &"d".repeat(100)]);
    }
    make("metadata", &[tar.with(&Entry::file(&path, "deep"))])
}

/// A mebibyte with data at both ends only.
fn sparse() -> Vec<u8> {
    let mut data = vec![0; 1 << 20];
    data[..4].copy_from_slice(b"head");
    data[(1 << 20) - 4..].copy_from_slice(b"tail");
    data
}

/// Forms of the config, by tag, each on the busybox root.
pub const CONFIGS: [&str; 9] = [
    "plain",
    "user-1000",
    "user-name-group",
    "user-unknown",
    "workdir",
    "entrypoint",
    "shell-form",
    "stopsignal",
    "volume",
];

/// One image for each of [`CONFIGS`].
///
/// # Errors
/// When busybox or the probe is missing.
pub fn config(tag: &str) -> Result<Image> {
    let layout = once(&with_probe("configs")?, |dir| {
        let layers = [busybox_layer()?];
        let mut layout = Layout::create(dir)?;
        let path = "PATH=/bin";
        for (tag, config) in [
            ("plain", json!({"Env": [path], "Cmd": ["/bin/sh"]})),
            ("user-1000", json!({"Env": [path], "User": "1000", "Cmd": ["/probe", "identity"]})),
            ("user-name-group", json!({"Env": [path], "User": "ada:engine", "Cmd": ["/probe", "identity"]})),
            ("user-unknown", json!({"Env": [path], "User": "nobody-here", "Cmd": ["/probe", "identity"]})),
            ("workdir", json!({"Env": [path], "WorkingDir": "/made/for/this", "Cmd": ["/bin/pwd"]})),
            (
                "entrypoint",
                json!({"Env": [path, "FROM_IMAGE=yes"], "Entrypoint": ["/bin/echo", "entry"], "Cmd": ["default"]}),
            ),
            ("shell-form", json!({"Env": [path], "Entrypoint": ["/bin/sh", "-c", "echo shell-form $0 $#"]})),
            (
                "stopsignal",
                json!({
                    "Env": [path], "StopSignal": "SIGUSR1",
                    "Cmd": ["/bin/sh", "-c", "trap 'echo got USR1; exit 0' USR1; echo ready; while :; do sleep 1; done"],
                }),
            ),
            (
                "volume",
                json!({"Env": [path], "Volumes": {"/data": {}}, "Cmd": ["/bin/sh", "-c", "echo x > /data/x && cat /data/x"]}),
            ),
        ] {
            layout.image(tag, config, &layers)?;
        }
        Ok(())
    })?;
    Ok(Image::new(&layout, tag))
}

/// Layers that are broken, by tag: every one of these images must be refused.
pub const BROKEN: [&str; 6] =
    ["truncated-gzip", "truncated-tar", "flipped-bit", "wrong-diff-id", "not-a-tar", "missing-blob"];

/// One image for each of [`BROKEN`]: a layer cut off inside gzip or inside tar, a blob with a flipped bit, one that
/// is not what the config says, one that is no archive, one that is not there.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn broken(tag: &str) -> Result<Image> {
    let layout = once(&with_probe("broken")?, |dir| {
        let base = busybox_layer()?;
        let mut layout = Layout::create(dir)?;
        // Each has bytes of its own, so that no blob is shared with an image that is well.
        let archive = |tag: &str| {
            Tar::new()
                .with(&Entry::dir("t/"))
                .with(&Entry::file(format!("t/{tag}"), vec![b'x'; 300_000]))
                .finish()
        };
        for tag in BROKEN {
            let archive = archive(tag);
            let good = Layer::gzip(&archive);
            let layer = match tag {
                "truncated-gzip" => {
                    let cut = good.blob[..good.blob.len() / 2].to_vec();
                    good.with_blob(cut)
                }
                "truncated-tar" => Layer::plain(archive[..200_000].to_vec()),
                "flipped-bit" => {
                    let mut blob = good.blob.clone();
                    let middle = blob.len() / 2;
                    blob[middle] ^= 1;
                    good.damaged(blob)
                }
                "wrong-diff-id" => Layer { diff_id: crate::layout::digest(b"another archive"), ..good },
                "not-a-tar" => Layer::plain(b"this is no tar archive; ".repeat(100)),
                _ => good,
            };
            let missing = layer.digest.clone();
            layout.image(tag, json!({"Cmd": ["/bin/true"]}), &[base.clone(), layer])?;
            if tag == "missing-blob" {
                std::fs::remove_file(dir.join("blobs").join(missing.replace(':', "/")))?;
            }
        }
        Ok(())
    })?;
    Ok(Image::new(&layout, tag))
}

/// Paths that lead out, by tag: each image must be confined to its own root, or refused.
pub const ESCAPES: [&str; 6] =
    ["dot-dot", "absolute-name", "link-out", "through-link", "hard-link-out", "whiteout-dot-dot"];

/// One image for each of [`ESCAPES`], all aiming at `/escaped/file` outside and meaning harm by its presence.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn escape(tag: &str) -> Result<Image> {
    let layout = once(&with_probe("escapes")?, |dir| {
        let base = busybox_layer()?;
        let mut layout = Layout::create(dir)?;
        let up = "../".repeat(12);
        for tag in ESCAPES {
            let tar = match tag {
                "dot-dot" => Tar::new().with(&Entry::file(format!("{up}escaped/file"), "out")),
                "absolute-name" => Tar::new().with(&Entry::file("/escaped/file", "out")),
                "link-out" => {
                    Tar::new().with(&Entry::symlink("t", "/")).with(&Entry::file("t/escaped/file", "out"))
                }
                "through-link" => Tar::new()
                    .with(&Entry::dir("t/"))
                    .with(&Entry::symlink("t/up", up.as_bytes()))
                    .with(&Entry::file("t/up/escaped/file", "out")),
                "hard-link-out" => Tar::new().with(&Entry::hard_link("stolen", format!("{up}etc/shadow"))),
                _ => Tar::new().with(&Entry::marker(format!("t/{up}.wh.escaped"))),
            };
            layout.image(tag, json!({"Cmd": ["/bin/true"]}), &[base.clone(), Layer::of(tar)])?;
        }
        Ok(())
    })?;
    Ok(Image::new(&layout, tag))
}

/// An image of the busybox layer and these, under its own name.
fn make(name: &str, layers: &[Tar]) -> Result<Image> {
    let layout = once(&with_probe(name)?, |dir: &Path| {
        let mut all = vec![busybox_layer()?];
        all.extend(layers.iter().cloned().map(Layer::of));
        Layout::create(dir)?
            .image("latest", json!({"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}), &all)
            .map(drop)
    })?;
    Ok(Image::new(&layout, "latest"))
}
