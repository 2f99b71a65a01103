//! Scratch disks: `e2fsck` and the kernel are the judges.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use kiln_rootfs::{SCRATCH_BYTES_MIN, scratch};
use kiln_testkit::run;

use crate::machine::{Mount, file};

const MIB: u64 = 1 << 20;

fn check(path: &std::path::Path) {
    run(Command::new("e2fsck").arg("-fn").arg(path)).expect("e2fsck finds nothing (apt package e2fsprogs)");
}

#[test]
fn any_size_is_a_file_system_without_faults() {
    // Around the ends of groups (128 MiB) and of sixteens of them (2 GiB).
    let sizes = [16, 17, 100, 127, 128, 129, 131, 256, 1000, 2047, 2048, 2049, 2051, 2178, 10_240];
    for bytes in sizes.map(|mib| mib * MIB).into_iter().chain([SCRATCH_BYTES_MIN + 1, 3_000_000_001, 1 << 40])
    {
        let (dir, file) = file();
        scratch(&file, bytes).unwrap();
        check(&dir.path().join("disk"));
        assert_eq!(file.metadata().unwrap().len(), bytes / 4096 * 4096);
    }
}

#[test]
fn ten_gibibytes_take_less_than_a_hundred_kibibytes() {
    let (_dir, file) = file();
    scratch(&file, 10 << 30).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 < 100 << 10);
}

#[test]
fn what_the_file_held_is_gone() {
    let (dir, file) = file();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xff; 1 << 20], 32 * MIB).unwrap();
    scratch(&file, 64 * MIB).unwrap();
    let whole = fs::read(dir.path().join("disk")).unwrap();
    assert!(whole[32 << 20..33 << 20].iter().all(|&b| b == 0));
}

#[test]
fn the_kernel_fills_it_to_the_last_groups_and_it_stays_without_faults() {
    let (dir, file) = file();
    let path = dir.path().join("disk");
    // Three sixteens of groups, the last of them short.
    scratch(&file, 4500 * MIB).unwrap();
    {
        let mount = Mount::new(&path, "noatime,no_prefetch_block_bitmaps");
        for number in 0..300 {
            let dir = mount.path().join(format!("dir-{number}"));
            fs::create_dir(&dir).unwrap();
            for name in 0..10 {
                fs::write(dir.join(format!("file-{name}")), format!("{number} {name}")).unwrap();
            }
        }
        // Space everywhere without writing it everywhere.
        let large = fs::File::create(mount.path().join("large")).unwrap();
        rustix::fs::fallocate(&large, rustix::fs::FallocateFlags::empty(), 0, 4000 << 20).unwrap();
    }
    check(&path);
    let mount = Mount::new(&path, "ro");
    assert_eq!(fs::read(mount.path().join("dir-299/file-9")).unwrap(), b"299 9");
}

#[test]
fn the_overlay_finds_what_it_needs_in_it() {
    let (dir, file) = file();
    scratch(&file, 64 * MIB).unwrap();
    let mount = Mount::new(&dir.path().join("disk"), "noatime");
    let of = |name: &str| mount.path().join(name);
    for name in ["lower", "merged"] {
        fs::create_dir(of(name)).unwrap();
    }
    fs::write(of("lower/file"), "lower").unwrap();
    fs::create_dir(of("lower/dir")).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        of("lower").display(),
        of("upper").display(),
        of("work").display()
    );
    run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(of("merged")))
        .expect("the kernel has overlayfs");
    let worked = fs::remove_file(of("merged/file"))
        .and_then(|()| {
            fs::rename(of("merged/dir"), of("merged/moved")).or_else(|_| fs::remove_dir(of("merged/dir")))
        })
        .and_then(|()| fs::write(of("merged/new"), "new"));
    run(Command::new("umount").arg(of("merged"))).unwrap();
    worked.unwrap();
    assert!(!fs::symlink_metadata(of("upper/file")).unwrap().is_file(), "a whiteout is not a file");
    assert_eq!(fs::read(of("upper/new")).unwrap(), b"new");
}
