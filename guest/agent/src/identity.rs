//! Who the guest is, in the files where programs look it up.
//!
//! They are files of a small file system of the agent's, bound over the image's paths as Docker does: a guest that is
//! restored under another name is given it by writing them in place, whatever the root is mounted as and whichever
//! process has them open.
//!
//! ```text
//! /run/kiln                         read-only: hostname, hosts, ...
//! /run/kiln/generation              how often the guest has been restored, and the id of its life
//! /etc/hostname, /etc/hosts         bound, writable for root
//! /etc/resolv.conf                  bound when the host gives one
//! /etc/machine-id                   bound when the image has one
//! /proc/sys/kernel/random/boot_id   bound, in each /proc
//! ```

use alloc::format;
use alloc::string::String;

use kiln_protocol::mailbox::Generation;
use kiln_protocol::{Failed, Setup};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::failure::{internal, invalid, text};
use crate::{files, mounts};

const HOSTNAME: &str = "/run/kiln/hostname";
const HOSTS: &str = "/run/kiln/hosts";
const RESOLV_CONF: &str = "/run/kiln/resolv.conf";
const MACHINE_ID: &str = "/run/kiln/machine-id";
/// Bound over the kernel's file of that name in each /proc.
pub(crate) const BOOT_ID: &str = "/run/kiln/boot_id";
const GENERATION: &str = "/run/kiln/generation";

const LOCAL_HOSTS: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::\tip6-localnet\n\
    ff00::\tip6-mcastprefix\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

/// A life of the guest: what tells it from all others that began with the same snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// How often the guest has been restored.
    pub counter: u64,
    id: [u8; 16],
    machine_id: [u8; 16],
    boot_id: [u8; 16],
}

impl Life {
    /// The first life of a guest that was booted: random, once the kernel's generator has been seeded.
    pub(crate) fn first() -> Result<Self, Errno> {
        let mut ids = [[0; 16]; 3];
        rustix::rand::getrandom(ids.as_flattened_mut(), GetRandomFlags::empty())?;
        // Random UUIDs. RFC 9562 §5.4 "UUID Version 4".
        for id in &mut ids {
            id[6] = id[6] & 0x0f | 0x40;
            id[8] = id[8] & 0x3f | 0x80;
        }
        let [id, machine_id, boot_id] = ids;
        Ok(Self { counter: 0, id, machine_id, boot_id })
    }

    /// The life that begins with `generation`, after `counter` restores.
    pub(crate) fn of(generation: &Generation, counter: u64) -> Self {
        let Generation { id, machine_id, boot_id, .. } = *generation;
        Self { counter, id, machine_id, boot_id }
    }

    /// The id, as hooks and /run/kiln/generation name it.
    pub(crate) fn id(&self) -> String {
        uuid(&self.id)
    }

    fn machine_id(&self) -> String {
        format!("{}\n", hex(&self.machine_id))
    }

    fn boot_id(&self) -> String {
        format!("{}\n", uuid(&self.boot_id))
    }

    fn generation(&self) -> String {
        format!("{} {}\n", self.counter, self.id())
    }
}

/// The files, open for writing.
pub struct Files {
    hostname: OwnedFd,
    hosts: OwnedFd,
    machine_id: OwnedFd,
    boot_id: OwnedFd,
    generation: OwnedFd,
}

impl Files {
    /// Makes the files and puts them where programs look.
    pub(crate) fn provide(setup: &Setup, life: &Life) -> Result<Self, Failed> {
        let make = |path: &str, mode, contents: &str| {
            create(path, mode, contents).map_err(|error| internal(&format!("write {path}"), error))
        };
        let files = Self {
            hostname: make(HOSTNAME, 0o644, &format!("{}\n", setup.hostname))?,
            hosts: make(HOSTS, 0o644, &hosts(&setup.hostname))?,
            machine_id: make(MACHINE_ID, 0o444, &life.machine_id())?,
            boot_id: make(BOOT_ID, 0o444, &life.boot_id())?,
            generation: make(GENERATION, 0o444, &life.generation())?,
        };
        bind(HOSTNAME, "/etc/hostname")?;
        bind(HOSTS, "/etc/hosts")?;
        if !setup.resolv_conf.is_empty() {
            make(RESOLV_CONF, 0o644, &setup.resolv_conf)?;
            bind(RESOLV_CONF, "/etc/resolv.conf")?;
        }
        if rustix::fs::lstat("/etc/machine-id").is_ok() {
            bind(MACHINE_ID, "/etc/machine-id")?;
        }
        mounts::seal_private()?;
        Ok(files)
    }

    /// Rewrites what `life` changes.
    pub(crate) fn live(&self, life: &Life) -> Result<(), Errno> {
        overwrite(&self.machine_id, &life.machine_id())?;
        overwrite(&self.boot_id, &life.boot_id())?;
        // A counter only gets longer.
        overwrite(&self.generation, &life.generation())
    }

    /// Rewrites what the host name changes.
    pub(crate) fn rename(&self, hostname: &str) -> Result<(), Errno> {
        for (file, contents) in [(&self.hostname, format!("{hostname}\n")), (&self.hosts, hosts(hostname))] {
            overwrite(file, &contents)?;
            rustix::fs::ftruncate(file, contents.len() as u64)?;
        }
        Ok(())
    }
}

fn hosts(hostname: &str) -> String {
    format!("{LOCAL_HOSTS}127.0.1.1\t{hostname}\n")
}

/// The text form of a UUID. RFC 9562 §4 "UUID Format".
fn uuid(id: &[u8; 16]) -> String {
    let mut text = hex(id);
    for dash in [8, 13, 18, 23] {
        text.insert(dash, '-');
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn create(path: &str, mode: u32, contents: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(mode))?;
    overwrite(&file, contents)?;
    Ok(file)
}

/// Writes a small file from its start; on a file system in memory that is one piece.
fn overwrite(file: &OwnedFd, contents: &str) -> Result<(), Errno> {
    match rustix::io::pwrite(file, contents.as_bytes(), 0) {
        Ok(bytes) if bytes == contents.len() => Ok(()),
        Ok(_) => Err(Errno::NOSPC),
        Err(error) => Err(error),
    }
}

/// Binds the file `from` over the file `to`, which is made when it is missing and, when it is a link, takes its place.
fn bind(from: &str, to: &str) -> Result<(), Failed> {
    let provided = (|| {
        let there = rustix::fs::lstat(to);
        if !there.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile) {
            files::replace(to, b"")?;
        }
        rustix::mount::mount_bind(from, to)
    })();
    provided.map_err(|error| invalid(format!("cannot write {to} in the image: {}", text(error))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_programs_expect_them() {
        let ids = |byte: u8| core::array::from_fn(|at| byte + at as u8);
        let life = Life { counter: 3, id: ids(0), machine_id: ids(0x10), boot_id: ids(0x20) };
        assert_eq!(life.generation(), "3 00010203-0405-0607-0809-0a0b0c0d0e0f\n");
        assert_eq!(life.machine_id(), "101112131415161718191a1b1c1d1e1f\n");
        assert_eq!(life.boot_id(), "20212223-2425-2627-2829-2a2b2c2d2e2f\n");
    }

    #[test]
    fn a_first_life_is_like_no_other() {
        let life = Life::first().expect("random bytes");
        assert_ne!(life, Life::first().expect("random bytes"));
        assert_eq!((life.id().as_bytes()[14], life.boot_id().as_bytes()[14]), (b'4', b'4'));
    }
}
