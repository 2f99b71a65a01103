//! What a machine's handle does in its guest besides running commands.

use std::path::Path;

use tokio::io::AsyncRead;

use super::{Target, Vm};
use crate::files::{self, Copied, CopyOptions, FileError, GuestFile};

impl Vm {
    fn target(&self) -> Target<'_> {
        Target::Own(&self.machine.monitor)
    }

    /// Opens a file of the guest's, links followed, to be read as a stream. The file is read as root, wherever its path, which has
    /// to be absolute, leads in the guest's root.
    ///
    /// # Errors
    /// [`FileError::Ask`], with [`Reason::NotFound`](crate::Reason::NotFound) when it is not there; what is no regular file is
    /// refused.
    pub async fn read_file(&self, path: impl AsRef<Path>) -> Result<GuestFile, FileError> {
        files::read(self.target(), path.as_ref()).await
    }

    /// Writes all that a reader has to a file of the guest's, and returns how many bytes that was. The file is root's, has these
    /// permissions (the lowest 12 bits of `st_mode`), and takes the place of what had its name, a link among it, at the moment
    /// when it is complete; the directories above it are made. When this is dropped, or anything fails, nothing is left of it.
    ///
    /// # Errors
    /// [`FileError::Source`] when the reader fails; [`FileError::Ask`] when the guest refuses.
    pub async fn write_file(
        &self,
        path: impl AsRef<Path>,
        mode: u32,
        contents: impl AsyncRead + Unpin,
    ) -> Result<u64, FileError> {
        files::write(self.target(), path.as_ref(), mode, contents).await
    }

    /// Copies a file, a link, or a directory and all in it into the guest, with permissions and times. Names follow `docker cp`:
    /// into `to` if that is a directory, and as `to` otherwise; of a path that ends in `/.`, what is in it. Each file and link
    /// appears when it is complete, in the place of one that is there; directories that are there stay and are added to.
    ///
    /// Devices, fifos and sockets are counted and left out. What vanishes meanwhile is left out, and what grows is cut.
    ///
    /// # Errors
    /// [`FileError::Host`] when something cannot be read; [`FileError::Ask`] when the guest refuses. What was complete by then
    /// stays.
    pub async fn copy_in(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_in(self.target(), from.as_ref(), to.as_ref(), options).await
    }

    /// Copies a file, a link, or a directory and all in it out of the guest: names as for [`copy_in`](Self::copy_in). What is made
    /// is the caller's, without set-id bits, and nothing outside of `to` is made, whatever the guest says: a link of the guest's
    /// is copied as one, and never followed here.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] beyond the limits of the options; [`FileError::Host`] when something cannot be made;
    /// [`FileError::Ask`] when the guest refuses, or breaks the rules. What was complete by then stays.
    pub async fn copy_out(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        options: CopyOptions,
    ) -> Result<Copied, FileError> {
        files::copy_out(self.target(), from.as_ref(), to.as_ref(), options).await
    }
}
