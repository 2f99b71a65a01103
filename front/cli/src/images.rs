//! Images: fetched, listed, looked into, removed.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use indicatif::HumanBytes;
use kiln::Digest;
use kiln::Disk;
use kiln::image::{self, Image, Platform, PullOptions, PullPolicy, Source, Summary};
use kiln::store::Store;
use serde_json::{Value, json};

use crate::args::{Pull, PullFlags, Pulling};
use crate::failure::Failure;
use crate::{Context, print, progress};

/// How many digits of a digest are shown; enough to name an image by.
const SHORT_DIGEST_DIGITS: usize = 12;

/// Opens the store the user chose. What crashes had left in it is removed then, which is said.
///
/// # Errors
/// When it cannot be made or read.
pub(crate) fn store(context: &Context) -> Result<Store, Failure> {
    let store = Store::open(context.root()?)?;
    if !store.swept().is_nothing() {
        context.note(&format!("removed {}", store.swept()));
    }
    Ok(store)
}

/// The folder of the store when nobody names one.
///
/// # Errors
/// When the environment names no home.
pub(crate) fn default_root() -> Result<PathBuf, Failure> {
    Ok(Store::default_root()?)
}

/// The image behind what a user typed, fetched when the flags say so.
///
/// # Errors
/// When there is no such image, or it cannot be had.
pub(crate) async fn obtain(
    context: &Context,
    store: &Store,
    name: &str,
    flags: &PullFlags,
    pulling: Pulling,
    verify: bool,
) -> Result<Image, Failure> {
    let source: Source = name.parse().map_err(Failure::caller)?;
    let options = PullOptions {
        policy: match pulling {
            Pulling::Missing => PullPolicy::Missing,
            Pulling::Always => PullPolicy::Always,
            Pulling::Never => PullPolicy::Never,
        },
        platform: flags.platform.as_deref().map(platform).transpose()?,
        allow_http: flags.allow_http,
        verify,
        ..PullOptions::default()
    };
    Ok(image::pull(store, &source, &options, progress::of_pull(context)).await?)
}

fn platform(text: &str) -> Result<Platform, Failure> {
    text.parse().map_err(Failure::caller)
}

/// The disk a machine has an image's files from.
///
/// # Errors
/// When the store's objects are missing or damaged.
pub(crate) fn disk(image: &Image) -> Result<Disk, Failure> {
    Ok(Disk::from_image(image)?)
}

/// `kiln pull`: prints the image's digest.
///
/// # Errors
/// As [`obtain`].
pub(crate) async fn pull(context: &Context, args: Pull) -> Result<(), Failure> {
    let store = store(context)?;
    let image = obtain(context, &store, &args.image, &args.source, Pulling::Always, args.verify).await?;
    if args.json {
        let object = json!({
            "name": image.name,
            "digest": image.digest.to_string(),
            "platform": image.platform.to_string(),
        });
        return print(&format!("{object:#}\n"));
    }
    print(&format!("{}\n", image.digest))
}

/// `kiln images`.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn list(context: &Context, as_json: bool) -> Result<(), Failure> {
    let images = image::list(&store(context)?)?;
    if as_json {
        let all: Vec<Value> = images.iter().map(describe).collect();
        return print(&format!("{:#}\n", Value::Array(all)));
    }
    print(&table(&images, SystemTime::now()))
}

fn describe(image: &Summary) -> Value {
    let mut object = json!({
        "name": image.name,
        "digest": image.digest.to_string(),
        "platform": image.platform,
        "pulled_unix_s": unix_seconds(image.pulled),
    });
    match &image.details {
        Ok(details) => {
            object["id"] = json!(details.id.to_string());
            object["created"] = json!(details.created);
            object["layers"] = json!(details.layers);
            object["disk_bytes"] = json!(details.disk_bytes);
        }
        Err(why) => object["damaged"] = json!(why),
    }
    object
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn table(images: &[Summary], now: SystemTime) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(["NAME", "PLATFORM", "ID", "SIZE", "PULLED"]);
    for image in images {
        table.add_row([
            image.name.clone(),
            image.platform.clone(),
            image.details.as_ref().map_or("damaged".to_owned(), |details| short(&details.id)),
            image
                .details
                .as_ref()
                .map_or("-".to_owned(), |details| HumanBytes(details.disk_bytes).to_string()),
            ago(now.duration_since(image.pulled).unwrap_or_default()),
        ]);
    }
    if let Some(size) = table.column_mut(3) {
        size.set_cell_alignment(CellAlignment::Right);
    }
    lines(&table)
}

/// A table as text, with no padding before the first column, so that lines begin with a name.
pub(crate) fn lines(table: &Table) -> String {
    table.lines().map(|line| line.trim().to_owned() + "\n").collect()
}

/// The digits of a digest that are shown.
pub(crate) fn short(id: &Digest) -> String {
    id.hex()[..SHORT_DIGEST_DIGITS].to_owned()
}

/// How long ago something was, in one unit.
pub(crate) fn ago(passed: Duration) -> String {
    let seconds = passed.as_secs();
    let (count, unit) = match seconds {
        0..60 => return "just now".to_owned(),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

/// `kiln rmi`: goes on to the next image when one cannot be removed. Returns the exit code.
///
/// # Errors
/// When the store cannot be opened.
pub(crate) fn remove(context: &Context, names: &[String]) -> Result<u8, Failure> {
    let store = store(context)?;
    let mut code = 0;
    for name in names {
        match image::remove(&store, name, None) {
            Ok(removed) => {
                for name in &removed.names {
                    print(&format!("removed {name}\n"))?;
                }
                if !context.global.quiet {
                    eprintln!("freed {}", HumanBytes(removed.bytes_freed));
                }
            }
            Err(error) => {
                let failure = Failure::from(error);
                eprint!("{}", failure.report());
                code = failure.exit_code().max(code);
            }
        }
    }
    Ok(code)
}

/// `kiln image inspect`: the configuration as its builder wrote it, and what Kiln knows of it.
///
/// # Errors
/// When the image is not in the store.
pub(crate) fn inspect(context: &Context, name: &str, wanted: Option<&str>) -> Result<(), Failure> {
    let wanted = wanted.map(platform).transpose()?;
    let image = image::find(&store(context)?, name, wanted.as_ref())?;
    let config: Value = serde_json::from_slice(&image.config_json)
        .map_err(|error| Failure::host(format!("the image's configuration is no JSON: {error}")))?;
    let layers: Vec<Value> =
        image.layers.iter().map(|layer| json!({"diff_id": layer.diff_id.to_string()})).collect();
    let object = json!({
        "name": image.name,
        "digest": image.digest.to_string(),
        "id": image.id.to_string(),
        "platform": image.platform.to_string(),
        "created": image.created,
        "layers": layers,
        "config": config,
    });
    print(&format!("{object:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_one_unit() {
        let at = |seconds| ago(Duration::from_secs(seconds));
        assert_eq!(at(59), "just now");
        assert_eq!(at(60), "1 minute ago");
        assert_eq!(at(7200), "2 hours ago");
        assert_eq!(at(86_400 * 3), "3 days ago");
    }
}
