//! Images made here by the tools people make images with: umoci, debootstrap, buildah, skopeo. No registry is asked.
//!
//! Each is made once and kept under `target/test-images`; a change of recipe or program changes the name, so nothing
//! stale is ever used.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::layout::{Layer, digest};
use crate::tar::{Entry, Tar};
use crate::tool::{capture, run};

/// Part of every image's name; another number makes all of them anew.
const RECIPES_VERSION: u32 = 2;

/// An image in an OCI layout on this machine.
#[derive(Clone, Debug)]
pub struct Image {
    /// The layout's directory.
    pub layout: PathBuf,
    /// The image's name in the layout.
    pub tag: String,
}

impl Image {
    /// An image of a layout.
    pub fn new(layout: &Path, tag: &str) -> Self {
        Self { layout: layout.to_owned(), tag: tag.to_owned() }
    }

    /// The image as a user names it to Kiln.
    pub fn reference(&self) -> String {
        format!("oci-layout:{}:{}", self.layout.display(), self.tag)
    }

    /// The image as umoci names it.
    pub fn umoci(&self) -> String {
        format!("{}:{}", self.layout.display(), self.tag)
    }

    /// The image as skopeo and buildah name it.
    pub fn skopeo(&self) -> String {
        format!("oci:{}:{}", self.layout.display(), self.tag)
    }

    /// Unpacks the image with umoci, and returns the root file system's directory.
    ///
    /// # Errors
    /// When umoci does not take the image. Needs root.
    pub fn unpack(&self, bundle: &Path) -> Result<PathBuf> {
        run(Command::new("umoci").arg("unpack").arg("--image").arg(self.umoci()).arg(bundle))?;
        Ok(bundle.join("rootfs"))
    }

    /// Copies the image with skopeo, to be named as skopeo names things; `options` go before.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn copy_to(&self, destination: &str, options: &[&str]) -> Result<()> {
        let mut skopeo = Command::new("skopeo");
        run(skopeo
            .args(["--insecure-policy", "copy", "-q"])
            .args(options)
            .arg(self.skopeo())
            .arg(destination))
    }
}

/// Where images are kept.
pub fn cache() -> PathBuf {
    target().join("test-images")
}

fn target() -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// The directory `name` of the cache, filled by `make` the first time. Processes that want the same wait for each
/// other, and a maker that dies leaves nothing that counts.
pub(crate) fn once(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let place = cache().join(format!("{name}-{RECIPES_VERSION}"));
    if place.exists() {
        return Ok(place);
    }
    fs::create_dir_all(cache()).context("the cache of test images")?;
    let lock = File::create(place.with_extension("lock")).context("the cache's lock")?;
    lock.lock().context("the cache's lock")?;
    if !place.exists() {
        let aside = place.with_extension("new");
        if aside.exists() {
            fs::remove_dir_all(&aside).context("what an earlier maker left")?;
        }
        make(&aside).with_context(|| format!("test image {name}"))?;
        fs::rename(&aside, &place).context("the cache of test images")?;
    }
    Ok(place)
}

/// The probe: a static program that says what a guest looks like from inside. See `dev/probe`.
///
/// # Errors
/// When it cannot be built.
pub fn probe() -> Result<PathBuf> {
    if let Some(built) = std::env::var_os("KILN_PROBE") {
        return Ok(built.into());
    }
    // `cargo xtask test` builds it beforehand and says where it is; this is for whoever runs cargo by hand.
    let target = target().join("probe");
    let triple = "x86_64-unknown-linux-gnu";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    build
        .args(["build", "--release", "--package", "kiln-probe", "--target", triple, "--target-dir"])
        .arg(&target);
    run(build.env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(target.join(triple).join("release/kiln-probe"))
}

/// The name of an image that has the probe in it.
pub(crate) fn with_probe(name: &str) -> Result<String> {
    let bytes = fs::read(probe()?).context("the probe")?;
    Ok(format!("{name}-{}", &digest(&bytes)["sha256:".len()..][..12]))
}

/// Busybox with all of its commands, and `/probe`; made by umoci. Its default command is a shell.
///
/// # Errors
/// When a tool is missing or fails.
pub fn busybox() -> Result<Image> {
    let layout = once(&with_probe("busybox")?, |dir| {
        umoci_image(dir, "latest", |root| {
            for name in
                ["bin", "etc", "tmp", "root", "home/ada", "proc", "sys", "dev", "run", "var", "usr/bin"]
            {
                fs::create_dir_all(root.join(name)).context("a directory")?;
            }
            install_busybox(root)?;
            program(&probe()?, &root.join("probe"))?;
            fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).context("/tmp")?;
            fs::write(root.join("etc/passwd"), PASSWD).context("passwd")?;
            fs::write(root.join("etc/group"), GROUP).context("group")
        })?;
        umoci_config(dir, "latest", &["--config.cmd", "/bin/sh", "--config.env", "PATH=/bin:/usr/bin"])
    })?;
    Ok(Image::new(&layout, "latest"))
}

/// The users of the busybox images: root, and one with a group and two supplementary groups.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000:Ada:/home/ada:/bin/sh\n";
const GROUP: &str = "root:x:0:\nada:x:1000:\nwheel:x:10:ada\nstaff:x:50:ada\nengine:x:1843:\n";

/// The same as [`busybox`] as one archive, for layouts written by hand.
///
/// # Errors
/// When busybox or the probe is missing.
pub fn busybox_layer() -> Result<Layer> {
    let mut tar = Tar::new();
    for dir in ["bin/", "etc/", "root/", "home/", "proc/", "sys/", "dev/", "run/", "var/"] {
        tar = tar.with(&Entry::dir(dir));
    }
    tar = tar.with(&Entry::dir("tmp/").mode(0o1777)).with(&Entry::dir("home/ada/").owner(1000, 1000));
    let busybox = busybox_program()?;
    tar = tar.with(&Entry::file("bin/busybox", fs::read(&busybox).context("busybox")?).mode(0o755));
    for name in applets(&busybox)? {
        tar = tar.with(&Entry::symlink(format!("bin/{name}"), "busybox"));
    }
    tar = tar.with(&Entry::file("probe", fs::read(probe()?).context("the probe")?).mode(0o755));
    tar = tar.with(&Entry::file("etc/passwd", PASSWD)).with(&Entry::file("etc/group", GROUP));
    Ok(Layer::of(tar))
}

/// Nothing but one static program, `/probe`, which is the entrypoint; made by umoci.
///
/// # Errors
/// When a tool is missing or fails.
pub fn scratch() -> Result<Image> {
    let layout = once(&with_probe("scratch")?, |dir| {
        umoci_image(dir, "latest", |root| program(&probe()?, &root.join("probe")))?;
        umoci_config(dir, "latest", &["--config.entrypoint", "/probe", "--config.cmd", "identity"])
    })?;
    Ok(Image::new(&layout, "latest"))
}

/// This release of Debian, minimal; made by debootstrap and umoci.
///
/// # Errors
/// When a tool is missing or fails, or the mirror that apt uses does not answer.
pub fn debian() -> Result<Image> {
    let layout = once("debian", |dir| {
        let (release, mirror) = mirror()?;
        umoci_image(dir, "debian", |root| {
            // debootstrap wants to make the root itself.
            let tree = dir.join("tree");
            let mut debootstrap = Command::new("debootstrap");
            run(debootstrap.args(["--variant=minbase", &release]).arg(&tree).arg(&mirror))?;
            run(Command::new("sh")
                .arg("-c")
                .arg("rm -rf \"$1\"/var/cache/apt/archives/*.deb")
                .arg("sh")
                .arg(&tree))?;
            fs::remove_dir(root).context("the empty root")?;
            fs::rename(&tree, root).context("the tree")
        })?;
        umoci_config(dir, "debian", &["--config.cmd", "bash", "--config.env", DEBIAN_PATH])
    })?;
    Ok(Image::new(&layout, "debian"))
}

/// [`debian`] and `/probe` in a second layer.
///
/// # Errors
/// When a tool is missing or fails, or the mirror that apt uses does not answer.
pub fn debian_with_probe() -> Result<Image> {
    let base = debian()?;
    let layout = once(&with_probe("debian-with-probe")?, |dir| {
        let image = Image::new(dir, "debian");
        base.copy_to(&image.skopeo(), &[])?;
        run(Command::new("umoci").args(["insert", "--image"]).arg(image.umoci()).arg(probe()?).arg("/probe"))
    })?;
    Ok(Image::new(&layout, "debian"))
}

const DEBIAN_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Python on Debian: a second layer on [`debian`], made by installing the package in a chroot and repacking by umoci.
///
/// # Errors
/// When a tool is missing or fails, or the mirror that apt uses does not answer.
pub fn python() -> Result<Image> {
    let base = debian()?;
    let layout = once("python", |dir| {
        base.copy_to(&Image::new(dir, "python").skopeo(), &[])?;
        let bundle = dir.join("bundle");
        let root = Image::new(dir, "python").unpack(&bundle)?;
        install_in_chroot(&root, "python3-minimal")?;
        run(Command::new("umoci")
            .args(["repack", "--image"])
            .arg(format!("{}:python", dir.display()))
            .arg(&bundle))?;
        umoci_config(dir, "python", &["--config.cmd", "python3"])?;
        fs::remove_dir_all(&bundle).context("the bundle")
    })?;
    Ok(Image::new(&layout, "python"))
}

/// Node on Debian: a layer on [`debian`] made by buildah, in zstd.
///
/// # Errors
/// When a tool is missing or fails, or the mirror that apt uses does not answer.
pub fn node() -> Result<Image> {
    let base = debian()?;
    let layout = once("node", |dir| {
        let storage = dir.join("storage");
        let buildah = |args: &[&str]| {
            let mut command = Command::new("buildah");
            command.args(["--storage-driver", "vfs", "--root"]).arg(storage.join("root"));
            command.arg("--runroot").arg(storage.join("run")).args(args);
            capture(&mut command).map(|text| String::from_utf8_lossy(&text).trim().to_owned())
        };
        let container = buildah(&["from", "--signature-policy", &policy(dir)?, &base.skopeo()])?;
        let root = buildah(&["mount", &container])?;
        install_in_chroot(Path::new(&root), "nodejs")?;
        buildah(&["umount", &container])?;
        buildah(&["config", "--cmd", r#"["node"]"#, &container])?;
        let made = dir.join("gzip");
        let image = Image::new(&made, "node");
        buildah(&["commit", "-q", "--signature-policy", &policy(dir)?, &container, &image.skopeo()])?;
        image.copy_to(&Image::new(dir, "node").skopeo(), &["--dest-compress-format", "zstd"])?;
        fs::remove_file(policy(dir)?).context("the policy")?;
        fs::remove_dir_all(&made).context("the image in gzip")?;
        fs::remove_dir_all(&storage).context("buildah's storage")
    })?;
    Ok(Image::new(&layout, "node"))
}

/// A signature policy that takes every image, which buildah will not start without.
fn policy(dir: &Path) -> Result<String> {
    let path = dir.join("policy.json");
    fs::create_dir_all(dir).context("the image's directory")?;
    fs::write(&path, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).context("the policy")?;
    Ok(path.display().to_string())
}

/// Makes an image of one layer in a new layout: `fill` gets the empty root.
fn umoci_image(layout: &Path, tag: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let image = Image::new(layout, tag);
    run(Command::new("umoci").args(["init", "--layout"]).arg(layout))?;
    run(Command::new("umoci").args(["new", "--image"]).arg(image.umoci()))?;
    let bundle = layout.join("bundle");
    fill(&image.unpack(&bundle)?)?;
    run(Command::new("umoci").args(["repack", "--image"]).arg(image.umoci()).arg(&bundle))?;
    fs::remove_dir_all(&bundle).context("the bundle")
}

fn umoci_config(layout: &Path, tag: &str, options: &[&str]) -> Result<()> {
    let image = Image::new(layout, tag).umoci();
    run(Command::new("umoci").args(["config", "--image", &image]).args(options))
}

/// This release's name and the mirror from which this machine takes it.
fn mirror() -> Result<(String, String)> {
    let os = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let release =
        os.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).context("not a Debian release")?;
    let format = "$(CODENAME) $(REPO_URI)";
    let targets =
        capture(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let targets = String::from_utf8_lossy(&targets).into_owned();
    let mirror = targets.lines().find_map(|line| line.strip_prefix(release)?.strip_prefix(' '));
    let mirror =
        mirror.with_context(|| format!("apt has no mirror of {release}\nhint: run `apt-get update`"))?;
    Ok((release.to_owned(), mirror.to_owned()))
}

/// Installs a package in a root file system with its own apt, which finds the mirror by this machine's resolver.
fn install_in_chroot(root: &Path, package: &str) -> Result<()> {
    let resolver = root.join("etc/resolv.conf");
    fs::copy("/etc/resolv.conf", &resolver).context("resolv.conf")?;
    let script = "set -e; export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin; \
                  apt-get -qq update; apt-get -qq install -y --no-install-recommends \"$1\"; \
                  rm -rf /var/lib/apt/lists/* /var/cache/apt/*";
    run(Command::new("chroot").arg(root).args(["/bin/sh", "-c", script, "sh", package]))?;
    fs::remove_file(&resolver).context("resolv.conf")
}

fn busybox_program() -> Result<PathBuf> {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    let found = places.into_iter().find(|place| place.exists());
    found.context("no busybox\nhint: `cargo xtask setup test` installs busybox-static")
}

fn applets(busybox: &Path) -> Result<Vec<String>> {
    let names = capture(Command::new(busybox).arg("--list"))?;
    Ok(String::from_utf8_lossy(&names).lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}

fn install_busybox(root: &Path) -> Result<()> {
    let busybox = busybox_program()?;
    program(&busybox, &root.join("bin/busybox"))?;
    for name in applets(&busybox)? {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).context("an applet")?;
    }
    Ok(())
}

fn program(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).with_context(|| to.display().to_string())
}
