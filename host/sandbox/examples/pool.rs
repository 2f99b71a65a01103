//! Untrusted snippets, each in a machine that nobody had before: `pool IMAGE`.
//!
//! Machines wait, restored and parked; one that comes back gives way to a fresh guest, so nothing of one snippet reaches the next.

use std::error::Error;
use std::time::Duration;

use kiln::{Image, Pool};

const SNIPPETS: [&str; 6] =
    ["echo $((6 * 7))", "echo mine > /tmp/secret", "cat /tmp/secret", "exit 3", "hostname", "yes"];

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let reference = std::env::args().nth(1).unwrap_or_else(|| "busybox".to_owned());
    let image = Image::builder(reference).memory_mib(256).build().await?;
    let pool = image.pool().min(2).max(2).build();
    let mut running = tokio::task::JoinSet::new();
    for snippet in SNIPPETS {
        let pool = pool.clone();
        running.spawn(
            async move { (snippet, evaluate(&pool, snippet).await.map_err(|error| error.to_string())) },
        );
    }
    while let Some(done) = running.join_next().await {
        let (snippet, result) = done?;
        println!("{snippet}: {}", result.unwrap_or_else(|error| format!("failed: {error}")));
    }
    println!("{:?}", pool.stats());
    pool.shutdown().await;
    Ok(())
}

/// Runs a snippet with a limit on its time and on what it may write.
async fn evaluate(pool: &Pool, snippet: &str) -> Result<String, Box<dyn Error + Send + Sync>> {
    let vm = pool.acquire().await?;
    let output = vm
        .exec(["sh", "/tmp/snippet"])
        .stage_file("/tmp/snippet", snippet, 0o644)
        .timeout(Duration::from_secs(30))
        .output_limit(64 << 10)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(format!("ended with {}, said '{said}'", output.status.shell_code()))
}
