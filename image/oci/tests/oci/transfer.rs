//! Transfers that break, stall, lie or are refused for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_oci::{PullError, PullOptions, Source, pull};
use kiln_testkit::http::{Request, Response, Server};
use kiln_testkit::layout::Layer;
use kiln_testkit::registry::{Access, Registry};
use kiln_testkit::tar::{Entry, Tar};

use crate::redirects::Served;
use crate::{Place, Told, assert_has, layer, noise, push};

/// How a server answers a request for a part of a blob.
#[derive(Clone, Copy, Debug)]
enum Ranges {
    /// As asked.
    Honoured,
    /// With the whole blob.
    Ignored,
    /// With a part that starts before what was asked for.
    Early,
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_broke() {
    for ranges in [Ranges::Honoured, Ranges::Ignored, Ranges::Early] {
        let place = Place::new();
        let content = noise(1, 900_000);
        let served = Served::new(&place, &[layer("big", &content)]);
        let registry = Server::start("127.0.0.1", move |request| {
            let answer = served.answer(request);
            if answer.body.len() < 500_000 {
                return answer;
            }
            // Breaks twice: after 300,000 bytes, and 300,000 bytes later.
            let asked = request.range_start();
            match (asked, ranges) {
                (None, _) => answer.cut_after(300_000),
                (Some(start), Ranges::Ignored) => {
                    if start < 500_000 {
                        answer.cut_after(600_000)
                    } else {
                        answer
                    }
                }
                (Some(start), _) => {
                    let first = if matches!(ranges, Ranges::Early) { start - 1000 } else { start };
                    let total = answer.body.len();
                    let part = Response::new(206, &answer.body[first..])
                        .header("Content-Range", format!("bytes {first}-{}/{total}", total - 1));
                    if start < 500_000 { part.cut_after(300_000) } else { part }
                }
            }
        })
        .expect("a server");
        let told = Arc::new(Told::default());
        let source: Source = format!("{}/app:1", registry.address()).parse().expect("a name");
        let image = pull(&place.store, &source, &PullOptions::default(), told.clone()).await.expect("pulled");
        assert_has(&image, &content);
        assert_eq!(told.count("Retrying"), 2, "{ranges:?}: {:?}", told.lines());
        let starts: Vec<_> = registry.requests().iter().filter_map(Request::range_start).collect();
        assert_eq!(starts.len(), 2, "{ranges:?}");
        assert!(starts[0] >= 200_000 && starts[1] > starts[0], "{ranges:?}: {starts:?}");
    }
}

#[tokio::test]
async fn a_download_that_always_breaks_is_given_up() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("big", &noise(1, 100_000))]);
    let registry = Server::start("127.0.0.1", move |request| {
        let answer = served.answer(request);
        if answer.body.len() < 50_000 { answer } else { answer.cut_after(10) }
    })
    .expect("a server");
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("given up");
    assert!(matches!(&error, PullError::Corrupt { why, .. } if why.contains("truncated")), "{error}");
    let tries = registry.requests().iter().filter(|request| request.path.contains("/blobs/")).count();
    assert!((5..10).contains(&tries), "{tries}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn another_part_than_was_asked_for_is_refused() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("big", &noise(1, 100_000))]);
    let registry = Server::start("127.0.0.1", move |request| {
        let answer = served.answer(request);
        match request.range_start() {
            _ if answer.body.len() < 50_000 => answer,
            None => answer.cut_after(20_000),
            Some(_) => {
                Response::new(206, &answer.body[90_000..]).header("Content-Range", "bytes 90000-99999/100000")
            }
        }
    })
    .expect("a server");
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("refused");
    assert!(error.to_string().contains("another part"), "{error}");
    place.assert_nothing_is_left();
}

/// Pulls from a registry that says 429 twice at first, and gives the waits that were told and the whole time.
async fn after_429(
    retry_after: impl Fn() -> Option<String> + Send + Sync + 'static,
) -> (Vec<String>, Duration) {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"x")]);
    let refused = AtomicUsize::new(0);
    let registry = Server::start("127.0.0.1", move |request| {
        if request.path != "/v2/" && refused.fetch_add(1, Ordering::SeqCst) < 2 {
            let answer =
                Response::new(429, r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#);
            return match retry_after() {
                Some(value) => answer.header("Retry-After", value),
                None => answer,
            };
        }
        served.answer(request)
    })
    .expect("a server");
    let told = Arc::new(Told::default());
    let source: Source = format!("{}/app:1", registry.address()).parse().expect("a name");
    let began = std::time::Instant::now();
    pull(&place.store, &source, &PullOptions::default(), told.clone()).await.expect("pulled in the end");
    (told.lines().into_iter().filter(|line| line.starts_with("Retrying")).collect(), began.elapsed())
}

#[tokio::test]
async fn a_registry_that_asks_to_wait_is_waited_for() {
    let (waits, took) = after_429(|| Some("1".to_owned())).await;
    assert_eq!(waits.len(), 2, "{waits:?}");
    assert!(
        waits.iter().all(|wait| wait.contains("after 1000 ms") && wait.contains("slow down")),
        "{waits:?}"
    );
    assert!(took >= Duration::from_secs(2), "{took:?}");

    let date = || {
        let soon = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() + 2;
        Some(http_date(soon))
    };
    let (waits, took) = after_429(date).await;
    assert_eq!(waits.len(), 2, "{waits:?}");
    // The date has whole seconds: two of them ahead are more than one to wait.
    assert!(took >= Duration::from_secs(2), "{took:?}");

    let (waits, _) = after_429(|| None).await;
    assert_eq!(waits.len(), 2, "{waits:?}");
}

/// RFC 9110 §5.6.7 "Date/Time Formats", for a time in seconds since 1970; written anew to check the reader.
fn http_date(seconds: u64) -> String {
    let output = kiln_testkit::capture(
        std::process::Command::new("date")
            .env("LC_ALL", "C")
            .args(["-u", "+%a, %d %b %Y %H:%M:%S GMT", "-d"])
            .arg(format!("@{seconds}")),
    );
    String::from_utf8(output.expect("date")).expect("text").trim().to_owned()
}

#[tokio::test]
async fn a_registry_that_asks_for_an_hour_is_not_waited_for() {
    let place = Place::new();
    let registry = Server::start("127.0.0.1", |request| match request.path.as_str() {
        "/v2/" => Response::new(200, ""),
        _ => Response::new(429, "").header("Retry-After", "3600"),
    })
    .expect("a server");
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("too long");
    assert!(error.to_string().contains("429"), "{error}");
    assert_eq!(registry.requests().iter().filter(|request| request.path != "/v2/").count(), 1);
}

#[tokio::test]
async fn only_what_may_pass_is_tried_again() {
    for (status, tries) in [(400, 1), (403, 1), (404, 1), (500, 5), (503, 5)] {
        let place = Place::new();
        let registry = Server::start("127.0.0.1", move |request| match request.path.as_str() {
            "/v2/" => Response::new(200, ""),
            _ => Response::new(status, "").header("Retry-After", "0"),
        })
        .expect("a server");
        place.pull(&format!("{}/app:1", registry.address())).await.expect_err("an error");
        let asked = registry.requests().iter().filter(|request| request.path != "/v2/").count();
        assert_eq!(asked, tries, "{status}");
    }
}

#[tokio::test]
async fn a_flipped_bit_in_transfer_or_in_the_registry_is_corrupt() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let damaged = layer("a", &noise(2, 200_000));
    push(&registry, &place, "app:1", &[layer("b", b"sound"), damaged.clone()]);
    let path = registry.blob_path(&damaged.digest);
    let mut content = std::fs::read(&path).expect("the blob");
    content[100_000] ^= 1;
    std::fs::write(&path, content).expect("damaged");
    let error = place.pull(&registry.image("app:1")).await.expect_err("corrupt");
    assert!(matches!(&error, PullError::Corrupt { what, .. } if what.contains(&damaged.digest)), "{error}");
    assert_eq!(place.store.tags().expect("sound"), []);
}

#[tokio::test]
async fn more_than_was_announced_is_refused() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", b"x")]);
    let registry = Server::start("127.0.0.1", move |request| {
        let mut answer = served.answer(request);
        if request.path.contains("/blobs/") {
            answer.body.extend([0; 5000]);
        }
        answer
    })
    .expect("a server");
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("refused");
    assert!(matches!(error, PullError::Corrupt { .. }), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn a_layer_longer_than_its_manifest_says_is_not_read_to_its_end() {
    let place = Place::new();
    let long = layer("a", b"x");
    let (digest, size) = (long.digest.clone(), long.blob.len());
    let served = Served::new(&place, &[long]);
    let registry = Server::start("127.0.0.1", move |request| {
        let mut answer = served.answer(request);
        if request.path.ends_with(&digest) {
            answer.body.extend(vec![0; 8 << 20]);
        }
        answer
    })
    .expect("a server");
    let error = place.pull(&format!("{}/app:1", registry.address())).await.expect_err("refused").to_string();
    assert!(error.contains(&format!("more than the {size} bytes")), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn endless_answers_are_cut_off() {
    for path in ["/manifests/", "/blobs/"] {
        let place = Place::new();
        let served = Served::new(&place, &[layer("a", b"x")]);
        let registry = Server::start("127.0.0.1", move |request| {
            let answer = served.answer(request);
            if request.path.contains(path) { Response::new(200, vec![b' '; 20 << 20]) } else { answer }
        })
        .expect("a server");
        let error =
            place.pull(&format!("{}/app:1", registry.address())).await.expect_err("refused").to_string();
        assert!(error.contains("more than"), "{path}: {error}");
        place.assert_nothing_is_left();
    }
}

#[tokio::test]
async fn a_bomb_stops_at_the_limit_and_leaves_nothing() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    push(&registry, &place, "bomb:1", &[layer("zeros", &vec![0; 30 << 20])]);
    let options = PullOptions { max_layer_bytes: 10 << 20, ..PullOptions::default() };
    let error = place.pull_as(&registry.image("bomb:1"), &options).await.expect_err("refused");
    assert!(error.to_string().contains("more than 10485760 bytes"), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn a_pull_given_up_leaves_nothing_under_way() {
    let place = Place::new();
    let served = Served::new(&place, &[layer("a", &noise(3, 2 << 20)), layer("b", &noise(4, 2 << 20))]);
    let (reached, wait) = std::sync::mpsc::channel::<()>();
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let (reached, hold) = (std::sync::Mutex::new(reached), std::sync::Mutex::new(hold));
    let registry = Server::start("127.0.0.1", move |request| {
        if request.path.contains("/blobs/") && request.header("range").is_none() {
            let answer = served.answer(request);
            if answer.body.len() > 1 << 20 {
                // Says that a layer is asked for, and lets it wait.
                let _ = reached.lock().map(|reached| reached.send(()));
                let _ = hold.lock().map(|hold| hold.recv());
            }
            return answer;
        }
        served.answer(request)
    })
    .expect("a server");
    let source: Source = format!("{}/app:1", registry.address()).parse().expect("a name");
    let store = place.store.clone();
    let pulling =
        tokio::spawn(async move { pull(&store, &source, &PullOptions::default(), Arc::new(())).await });
    tokio::task::spawn_blocking(move || wait.recv()).await.expect("joined").expect("a layer is under way");
    pulling.abort();
    assert!(pulling.await.expect_err("aborted").is_cancelled());
    drop(release);
    // The conversions run on threads of their own; the store is theirs until they notice.
    let tmp = place.store.root().join("tmp");
    let gone = tokio::task::spawn_blocking(move || {
        for _ in 0..10_000 {
            if std::fs::read_dir(&tmp).expect("a folder").count() == 0 {
                return true;
            }
            std::thread::yield_now();
            #[expect(
                clippy::disallowed_methods,
                reason = "nothing tells when another thread has removed a folder"
            )]
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    });
    assert!(gone.await.expect("joined"), "the session of a pull given up stays");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn layers_arrive_in_every_compression() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let content = noise(5, 70_000);
    let archive = Tar::new().with(&Entry::file("f", &content)).finish();
    let folder = place.path("layout");
    crate::one_image(&folder, &[Layer::plain(archive.clone()), layer("g", b"second")]);
    let from = format!("oci:{}:latest", folder.display());
    let mut objects = Vec::new();
    for (name, options) in [
        ("gzip", &["--dest-compress-format", "gzip", "--dest-compress"][..]),
        ("zstd", &["--dest-compress-format", "zstd", "--dest-compress"]),
        ("schema2", &["--format", "v2s2"]),
    ] {
        registry.push_with(&from, name, options).expect(name);
        let fresh = Place::new();
        let image = fresh.pull(&registry.image(name)).await.expect(name);
        assert_has(&image, &content);
        objects.push(image.layers);
    }
    let image =
        Place::new().pull(&format!("oci-layout:{}:latest", folder.display())).await.expect("uncompressed");
    objects.push(image.layers);
    objects.dedup();
    assert_eq!(objects.len(), 1, "one layer gives one object however it was packed");
}

#[tokio::test]
async fn two_pulls_at_once_share_a_store() {
    let place = Place::new();
    let registry = Registry::start(Access::Open).expect("a registry");
    let layers: Vec<Layer> = (0..6).map(|seed| layer(&format!("f{seed}"), &noise(seed, 300_000))).collect();
    push(&registry, &place, "a:1", &layers);
    push(&registry, &place, "b:1", &layers[..4]);
    let (a, b) = (registry.image("a:1"), registry.image("b:1"));
    let (first, second, third) = tokio::join!(place.pull(&a), place.pull(&b), place.pull(&a));
    assert_eq!(first.expect("pulled").layers, third.expect("pulled").layers);
    assert_eq!(second.expect("pulled").layers.len(), 4);
    assert_eq!(place.objects(), 6 + 2);
    for seed in 0..6 {
        assert_has(&place.pull(&a).await.expect("there"), &noise(seed, 300_000)[..5000]);
    }
}

#[tokio::test]
async fn an_unreachable_registry_is_named() {
    let place = Place::new();
    let error = place.pull("127.0.0.1:1/app:1").await.expect_err("nobody listens there");
    assert!(matches!(&error, PullError::Unreachable { host, .. } if host == "127.0.0.1:1"), "{error}");
    let registry = Registry::start(Access::Open).expect("a registry");
    let error = place.pull(&registry.image("absent:1")).await.expect_err("no such image");
    assert!(
        matches!(&error, PullError::NotFound { .. }) && error.to_string().contains("absent:1"),
        "{error}"
    );
    place.assert_nothing_is_left();
}
