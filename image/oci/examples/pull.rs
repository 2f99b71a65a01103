//! Pulls an image into a store and says how it went: `pull ROOT IMAGE [missing|always|never]`.
//!
//! For measurements and for trying things by hand; prints one line of JSON.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kiln_oci::{Event, Progress, PullOptions, Source, pull};
use kiln_store::Store;

/// Counts what travels, and says on stderr what is tried again.
#[derive(Default)]
struct Travelled(AtomicU64);

impl Progress for Travelled {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Resolved { layers, .. } => {
                let bytes = layers.iter().filter(|layer| !layer.present).map(|layer| layer.bytes).sum();
                self.0.store(bytes, Ordering::Relaxed);
            }
            Event::Retrying { what, why, after } => {
                eprintln!("{what}: {why}; again after {after:?}");
            }
            _ => {}
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (root, image, policy) = match &arguments[..] {
        [root, image] => (root, image, None),
        [root, image, policy] => (root, image, Some(policy)),
        _ => return Err("usage: pull ROOT IMAGE [missing|always|never]".into()),
    };
    let mut options = PullOptions::default();
    if let Some(policy) = policy {
        options.policy = policy.parse()?;
    }
    let source: Source = image.parse()?;
    let travelled = Arc::new(Travelled::default());
    let began = Instant::now();
    let store = Store::open(root)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let image = runtime.block_on(pull(&store, &source, &options, travelled.clone()))?;
    let parts = image.disk()?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = travelled.0.load(Ordering::Relaxed);
    println!(
        r#"{{"digest": "{}", "layers": {}, "disk_bytes": {}, "compressed_bytes": {bytes}, "seconds": {seconds:.4}}}"#,
        image.digest,
        image.layers.len(),
        parts.iter().map(|part| part.length).sum::<u64>(),
    );
    Ok(())
}
