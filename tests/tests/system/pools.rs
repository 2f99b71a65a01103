//! Pools of machines, as the library's users meet them.

use std::time::Duration;

use kiln::{Pool, PoolError, PoolStats, Vm};
use kiln_tests::{busybox, library};

async fn output(vm: &Vm, script: &str) -> String {
    let output = vm.exec(["sh", "-c", script]).output().await.expect("a shell runs");
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// Waits until a pool is as it is to be; it is told of nothing, so it is looked at.
async fn until(pool: &Pool, is_so: impl Fn(&PoolStats) -> bool) {
    for _ in 0..6000 {
        if is_so(&pool.stats()) {
            return;
        }
        tokio::time::timeout(Duration::from_millis(10), std::future::pending::<()>()).await.ok();
    }
    panic!("{:?}", pool.stats());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_comes_back_as_new() {
    let image = library::image(&busybox()).build().await.expect("an image");
    let pool = image.pool().min(1).max(1).build();
    let mut names = Vec::new();
    for round in 0..4 {
        let vm = pool.acquire().await.expect("a machine");
        let name =
            output(&vm, "cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id; hostname").await;
        assert!(!names.contains(&name), "{name}");
        names.push(name);
        // What the one before left is not there.
        let found = output(
            &vm,
            "cat /left /tmp/left /dev/shm/left 2>/dev/null; ps -o args | grep -c '[s]leep 1234'; true",
        );
        assert_eq!(found.await, "0", "round {round}");
        output(&vm, "echo left > /left; echo left > /tmp/left; echo left > /dev/shm/left; sleep 1234 >/dev/null 2>&1 &").await;
        assert_eq!(pool.stats().leased, 1);
        drop(vm);
    }
    until(&pool, |stats| stats.idle == 1).await;
    let stats = pool.stats();
    assert_eq!((stats.made, stats.recycled, stats.acquired, stats.failed), (1, 4, 4, 0), "{stats:?}");
    pool.shutdown().await;
    assert!(matches!(pool.acquire().await, Err(PoolError::Closed)));
}
