//! Where in a layer's tree the paths of its entries lead.
//!
//! Paths are confined: `..` at the root stays there, a leading `/` means the root. A symlink that an earlier entry of
//! the *same* layer put in the way is followed inside the tree, as runtimes do that unpack into a directory; nothing
//! of the host or of another layer is ever looked at.

use std::collections::BTreeSet;

use crate::tree::{Directory, Kind, Meta, Node, NodeId, ROOT, Tree, TreeFull};

/// Bytes of a path: Linux's `PATH_MAX` without its NUL.
const PATH_BYTES_MAX: usize = 4095;

/// Bytes of a name.
const NAME_BYTES_MAX: usize = 255;

/// Symlinks followed on one path, as Linux has it.
const SYMLINKS_MAX: usize = 40;

/// Names looked up for one path, those in symlinks included: a path of the longest kind has half as many.
const STEPS_MAX: usize = 4096;

/// Why a path leads nowhere.
#[derive(Clone, Copy)]
pub(crate) enum PathFault {
    Refused(&'static str),
    Full,
}

impl From<TreeFull> for PathFault {
    fn from(_: TreeFull) -> Self {
        Self::Full
    }
}

/// What is known of a layer's paths besides its tree.
#[derive(Default)]
pub(crate) struct Paths {
    /// The directory that the last entry was put into, by its path: entries of a directory come one after the other.
    last: Option<(Vec<u8>, NodeId)>,
    /// Whiteouts. They hide what lower layers have, never what this one has, wherever in the archive they stand. OCI
    /// image-spec, layer.md, "Whiteouts".
    hidden: BTreeSet<(NodeId, Box<[u8]>)>,
}

impl Paths {
    /// The directory and the name for an entry; `None` for the root. Parents that are missing are made.
    pub(crate) fn place(
        &mut self,
        tree: &mut Tree,
        path: &[u8],
    ) -> Result<Option<(NodeId, Vec<u8>)>, PathFault> {
        let mut clean = clean(path)?;
        if clean.is_empty() {
            return Ok(None);
        }
        let (parent, name) = match clean.iter().rposition(|&b| b == b'/') {
            Some(slash) => {
                let name = clean.split_off(slash + 1);
                clean.truncate(slash);
                (clean, name)
            }
            None => (Vec::new(), clean),
        };
        if let Some((last, id)) = &self.last
            && *last == parent
        {
            return Ok(Some((*id, name)));
        }
        let mut walk = Walk::new(&parent);
        while let Some(missing) = walk.run(tree)? {
            let directory = Directory { implicit: true, ..Directory::default() };
            let node = Node { meta: Meta::IMPLICIT_DIRECTORY, kind: Kind::Directory(Box::new(directory)) };
            let id = tree.add(node)?;
            tree.link(walk.at(), &missing, id)?;
            walk.enter(missing, id);
        }
        let id = walk.at();
        self.last = Some((parent, id));
        Ok(Some((id, name)))
    }

    /// A directory was taken away: what was remembered of paths may be wrong.
    pub(crate) fn forget(&mut self) {
        self.last = None;
    }

    /// Notes that lower layers' `name` in `directory` is hidden.
    pub(crate) fn hide(&mut self, tree: &mut Tree, directory: NodeId, name: &[u8]) -> Result<(), TreeFull> {
        tree.charge(64 + name.len() as u64)?;
        self.hidden.insert((directory, name.into()));
        Ok(())
    }

    /// The node at `path`, or where from the root it would have to be in the lower layers. The last name is not
    /// followed if it is a symlink's.
    pub(crate) fn find(tree: &Tree, path: &[u8]) -> Result<Result<NodeId, Vec<u8>>, PathFault> {
        let clean = clean(path)?;
        let (parent, name) = match clean.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&clean[..slash], &clean[slash + 1..]),
            None => (&[][..], clean.as_slice()),
        };
        if name.is_empty() {
            return Ok(Ok(ROOT));
        }
        let mut walk = Walk::new(parent);
        let missing = walk.run(tree)?;
        if missing.is_none()
            && let Some(&id) = tree.directory(walk.at()).and_then(|dir| dir.children.get(name))
        {
            return Ok(Ok(id));
        }
        let lower = walk.path(missing.as_ref(), name);
        if lower.len() > PATH_BYTES_MAX {
            return Err(PathFault::Refused("the path it links to is too long"));
        }
        Ok(Err(lower))
    }

    /// Puts the whiteouts into the tree and takes aufs's own files out; how many whiteouts and opaque directories
    /// there are.
    pub(crate) fn finish(self, tree: &mut Tree) -> Result<u64, TreeFull> {
        let mut whiteout = None;
        for (directory, name) in &self.hidden {
            let child = tree.directory(*directory).and_then(|dir| dir.children.get(name).copied());
            if let Some(child) = child {
                if let Some(directory) = tree.directory_mut(child) {
                    // The lower layers' directory is gone, so this is a new one, even if no entry describes it.
                    directory.opaque = true;
                    directory.implicit = false;
                }
                continue;
            }
            let id = if let Some(id) = whiteout {
                id
            } else {
                let meta = Meta { mode: 0, ..Meta::IMPLICIT_DIRECTORY };
                tree.add(Node { meta, kind: Kind::Whiteout })?
            };
            whiteout = Some(id);
            tree.link(*directory, name, id)?;
        }
        let mut count = 0;
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            let Some(directory) = tree.directory_mut(id) else { continue };
            directory.children.retain(|name, _| !name.starts_with(b".wh..wh."));
            count += u64::from(directory.opaque);
            count += directory.children.values().filter(|&&child| Some(child) == whiteout).count() as u64;
            todo.extend(directory.children.values());
        }
        Ok(count)
    }
}

/// A path from the root without empty names, `.` and `..`.
fn clean(path: &[u8]) -> Result<Vec<u8>, PathFault> {
    if path.contains(&0) {
        return Err(PathFault::Refused("its path holds a NUL byte"));
    }
    let mut clean = Vec::with_capacity(path.len());
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => clean.truncate(clean.iter().rposition(|&b| b == b'/').unwrap_or(0)),
            _ if name.len() > NAME_BYTES_MAX => {
                return Err(PathFault::Refused("a name in its path is too long"));
            }
            _ => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(name);
            }
        }
    }
    if clean.len() > PATH_BYTES_MAX {
        return Err(PathFault::Refused("its path is too long"));
    }
    Ok(clean)
}

/// A walk down a tree along the names of a directory's path.
struct Walk {
    /// The names ahead, the next one last.
    ahead: Vec<Vec<u8>>,
    /// The directories passed, with their names.
    passed: Vec<(Vec<u8>, NodeId)>,
    symlinks: usize,
    steps: usize,
}

impl Walk {
    fn new(path: &[u8]) -> Self {
        let mut walk = Self { ahead: Vec::new(), passed: Vec::new(), symlinks: 0, steps: 0 };
        walk.push(path);
        walk
    }

    fn push(&mut self, path: &[u8]) {
        let names = path.split(|&b| b == b'/').filter(|name| !matches!(*name, b"" | b"."));
        self.ahead.extend(names.rev().map(<[u8]>::to_vec));
    }

    /// The directory reached.
    fn at(&self) -> NodeId {
        self.passed.last().map_or(ROOT, |&(_, id)| id)
    }

    /// Goes on until the end, or to the first name that is not there.
    fn run(&mut self, tree: &Tree) -> Result<Option<Vec<u8>>, PathFault> {
        while let Some(name) = self.ahead.pop() {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(PathFault::Refused("its path leads through too many names"));
            }
            if name == b".." {
                self.passed.pop();
                continue;
            }
            if name.len() > NAME_BYTES_MAX {
                return Err(PathFault::Refused("a name in its path is too long"));
            }
            let Some(&id) = tree.directory(self.at()).and_then(|dir| dir.children.get(name.as_slice()))
            else {
                return Ok(Some(name));
            };
            match &tree.node(id).kind {
                Kind::Directory(_) => self.passed.push((name, id)),
                Kind::Symlink(target) => {
                    self.symlinks += 1;
                    if self.symlinks > SYMLINKS_MAX {
                        return Err(PathFault::Refused("its path leads through too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        self.passed.clear();
                    }
                    self.push(target);
                }
                _ => return Err(PathFault::Refused("a parent in its path is not a directory")),
            }
        }
        Ok(None)
    }

    /// Takes the name that was missing as a directory there.
    fn enter(&mut self, name: Vec<u8>, id: NodeId) {
        self.passed.push((name, id));
    }

    /// The path from the root of `name` in the directory that the walk would reach, were `missing` and what is ahead
    /// of it there.
    fn path(&self, missing: Option<&Vec<u8>>, name: &[u8]) -> Vec<u8> {
        let mut names: Vec<&[u8]> = self.passed.iter().map(|(name, _)| name.as_slice()).collect();
        for ahead in missing.into_iter().chain(self.ahead.iter().rev()) {
            if ahead == b".." {
                names.pop();
            } else {
                names.push(ahead);
            }
        }
        names.push(name);
        names.join(&b'/')
    }
}
