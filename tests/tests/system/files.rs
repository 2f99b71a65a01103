//! Files and trees go into a running guest and come out of it.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use kiln::{Copied, CopyOptions, FileError, Reason};
use kiln_tests::library::{block_on, kept, sh, start};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

/// More than what one message carried of a file that had to fit one; where KVM has no hardware to use, a MiB takes seconds.
const LARGE_BYTES: u64 = (4 << 20) + 1;
/// More than all buffers on the way hold.
const SOME_BYTES: u64 = 1 << 20;

/// Contents that tell where they are.
fn contents(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| (at / 7 % 251) as u8).collect()
}

/// A tree with one of each, as the host has it.
fn sample(root: &Path) {
    fs::create_dir_all(root.join("tree/sub/deep")).expect("directories");
    fs::write(root.join("tree/large"), contents(SOME_BYTES)).expect("a file");
    fs::write(root.join("tree/sub/deep/tool"), "#!/bin/sh\necho ran\n").expect("a file");
    fs::set_permissions(root.join("tree/sub/deep/tool"), fs::Permissions::from_mode(0o751)).expect("a mode");
    fs::set_permissions(root.join("tree/sub"), fs::Permissions::from_mode(0o555)).expect("a mode");
    symlink("sub/deep/tool", root.join("tree/link")).expect("a link");
    symlink("/etc/shadow", root.join("tree/away")).expect("a link");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("tree/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .expect("a fifo");
}

#[test]
fn files_of_any_size_stream_both_ways() {
    block_on(async {
        let vm = start().await;
        let sent = contents(LARGE_BYTES);
        let bytes = vm.write_file("/srv/made/large", 0o640, &sent[..]).await.expect("written");
        assert_eq!(bytes, LARGE_BYTES);
        assert_eq!(
            sh(&vm, "stat -c '%a %u %s' /srv/made/large; ls -A /srv/made").await,
            format!("640 0 {LARGE_BYTES}\nlarge")
        );
        let file = vm.read_file("/srv/made/large").await.expect("opened");
        assert_eq!((file.size(), file.mode()), (LARGE_BYTES, 0o640));
        assert!(file.contents(sent.len()).await.expect("read") == sent);

        let uptime = vm.read_file("/proc/uptime").await.expect("a file without a size");
        assert!(!uptime.contents(100).await.expect("read").is_empty());
        let missing = vm.read_file("/no/such").await.expect_err("nothing there");
        assert_eq!(missing.refusal(), Some(Reason::NotFound));
        assert!(vm.read_file("/srv").await.is_err());
        assert!(vm.write_file("/srv", 0o600, &b"x"[..]).await.is_err());

        // A reader that fails, and a writer that is given up, leave what was there.
        let failing = Failing { after: 100_000 };
        let failed = vm.write_file("/srv/made/large", 0o600, failing).await.expect_err("not all was read");
        assert!(matches!(failed, FileError::Source { .. }), "{failed:?}");
        let (reader, mut writer) = tokio::io::duplex(1 << 16);
        let mut writing = Box::pin(vm.write_file("/srv/made/other", 0o600, reader));
        let fed = tokio::io::AsyncWriteExt::write_all(&mut writer, &sent[..1 << 19]);
        tokio::select! {
            _ = &mut writing => panic!("it has not ended"),
            fed = fed => fed.expect("taken"),
        }
        drop(writing);
        let rest =
            "until [ \"$(ls -A /srv/made)\" = large ]; do usleep 1000; done; stat -c %s /srv/made/large";
        assert_eq!(sh(&vm, rest).await, LARGE_BYTES.to_string());
        vm.stop().await;
    });
}

#[test]
fn trees_go_in_and_come_out_by_the_rules_of_docker_cp() {
    block_on(async {
        let host = tempfile::tempdir().expect("a directory");
        let at = |path: &str| host.path().join(path);
        sample(host.path());
        let vm = start().await;
        let options = CopyOptions::default();
        let whole = Copied { files: 2, directories: 3, links: 2, skipped: 1, bytes: SOME_BYTES + 19 };
        let copied = vm.copy_in(at("tree"), "/srv", options).await.expect("as that directory");
        assert_eq!(copied, whole);
        assert_eq!(vm.copy_in(at("tree"), "/srv", options).await.expect("into that directory"), whole);
        assert_eq!(
            sh(&vm, "cd /srv; find . | sort; stat -c '%a %u:%g' sub sub/deep/tool; readlink away; ./link")
                .await,
            ".\n./away\n./large\n./link\n./sub\n./sub/deep\n./sub/deep/tool\n./tree\n./tree/away\n./tree/large\n\
             ./tree/link\n./tree/sub\n./tree/sub/deep\n./tree/sub/deep/tool\n555 0:0\n751 0:0\n/etc/shadow\nran"
        );
        vm.copy_in(at("tree/large"), "/tmp/name", options).await.expect("as that file");
        vm.copy_in(at("tree/sub/."), "/tmp", options).await.expect("what is in it");
        assert_eq!(
            sh(&vm, "ls /tmp; stat -c %Y /tmp/name").await,
            format!("deep\nname\n{}", mtime(&at("tree/large")))
        );
        assert!(vm.copy_in(at("tree/large"), "/no/such/place", options).await.is_err());
        assert!(matches!(vm.copy_in(at("missing"), "/tmp", options).await, Err(FileError::Host { .. })));

        let out = vm.copy_out("/srv/tree", at("out"), options).await.expect("as that directory");
        assert_eq!(out, Copied { skipped: 0, ..whole });
        assert!(fs::read(at("out/large")).expect("a file") == contents(SOME_BYTES));
        assert_eq!(fs::read_link(at("out/away")).expect("a link"), Path::new("/etc/shadow"));
        assert_eq!(fs::metadata(at("out/sub")).expect("it").mode() & 0o7777, 0o555);
        assert_eq!(mtime(&at("out/sub/deep/tool")), mtime(&at("tree/sub/deep/tool")));
        vm.copy_out("/srv/tree/sub/deep/.", host.path(), options).await.expect("what is in it");
        assert_eq!(fs::read(at("tool")).expect("a file"), b"#!/bin/sh\necho ran\n");
        let limited = CopyOptions { bytes_max: 1000, ..options };
        let large = vm.copy_out("/srv", at("few"), limited).await.expect_err("more than that");
        assert!(matches!(large, FileError::TooLarge { .. }), "{large:?}");
        sh(&vm, "chmod 6755 /srv/tree/sub/deep/tool").await;
        vm.copy_out("/srv/tree/sub/deep/tool", at("plain"), options).await.expect("a file");
        assert_eq!(fs::metadata(at("plain")).expect("it").mode() & 0o7777, 0o755);
        // What the kernel makes up as it is read is no part of a tree, and devices are left out.
        sh(&vm, "rm -r /srv /tmp/name").await;
        let all = vm.copy_out("/", at("all"), options).await.expect("all of it");
        assert!(all.skipped > 0 && at("all/bin/busybox").exists(), "{all:?}");
        assert_eq!(fs::read_dir(at("all/proc")).expect("it").count(), 0);
        assert_eq!(fs::read_dir(at("all/sys")).expect("it").count(), 0);
        vm.stop().await;
    });
}

#[test]
fn a_transfer_outlasts_a_snapshot_and_a_kept_machine_has_files_too() {
    let machine = kiln_tests::Vm::start("files-kept");
    block_on(async {
        let vm = kept(machine.name);
        vm.write_file("/srv/file", 0o600, &contents(SOME_BYTES)[..]).await.expect("written");
        let mut file = vm.read_file("/srv/file").await.expect("opened");
        let mut first = vec![0; 100_000];
        file.read_exact(&mut first).await.expect("the start");
        let (copy, _) = vm.copy().await.expect("a copy of it");
        let rest = file.contents(contents(SOME_BYTES).len()).await.expect("the rest");
        assert!([first, rest].concat() == contents(SOME_BYTES));
        vm.pause().await.expect("paused");
        assert!(vm.read_file("/srv/file").await.is_err(), "it would wait for ever");
        vm.resume().await.expect("resumed");
        drop(copy);
        let host = tempfile::tempdir().expect("a directory");
        let copied = vm.copy_out("/srv/file", host.path(), CopyOptions::default()).await.expect("copied");
        assert_eq!(copied.bytes, SOME_BYTES);
    });
}

#[test]
fn a_command_comes_with_its_files_and_with_what_follows_it() {
    block_on(async {
        let vm = start().await;
        // The second is more than a request carries.
        let output = vm
            .exec(["/srv/tool"])
            .stage_file("/srv/tool", "#!/bin/sh\nwc -c </srv/input; read line; echo $line", 0o755)
            .stage_file("/srv/input", contents(100_000), 0o600)
            .chain(["sh", "-c", "echo next >&2; exit 3"])
            .chain(["touch", "/srv/never"])
            .output()
            .await
            .expect("a command");
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_slice()),
            (&b"100000\n\n"[..], &b"next\n"[..])
        );
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(sh(&vm, "ls /srv; stat -c %a /srv/input").await, "input\ntool\n600");
        let refused =
            vm.exec(["true"]).stage_file("relative", "", 0o600).output().await.expect_err("no place");
        assert_eq!(refused.refusal(), Some(Reason::Invalid));
        vm.stop().await;
    });
}

fn mtime(path: &Path) -> i64 {
    fs::metadata(path).expect("it is there").mtime()
}

/// A reader that fails in the middle.
struct Failing {
    after: usize,
}

impl AsyncRead for Failing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.after == 0 {
            return Poll::Ready(Err(std::io::Error::other("no more")));
        }
        let count = self.after.min(into.remaining());
        into.put_slice(&vec![1; count]);
        self.after -= count;
        Poll::Ready(Ok(()))
    }
}
