//! Reads that go past the page cache: `O_DIRECT` on Linux, `F_NOCACHE` on macOS, buffered where neither works.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::path::{Path, PathBuf};

use crate::error::FormatError;

/// Boundary of direct reads, in files and in memory.
pub const READ_ALIGN: usize = 4096;

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// Past the page cache.
    Direct,
    /// Through the page cache, because the file system refused direct reads.
    Buffered,
}

/// An open file for reads at 4096-byte boundaries.
pub struct DirectFile {
    file: File,
    path: PathBuf,
    mode: ReadMode,
}

impl DirectFile {
    /// Opens `path` for direct reads with buffers and offsets at 4096-byte boundaries, probing one read; falls back to
    /// buffered reads where that fails.
    ///
    /// # Errors
    /// When the file cannot be opened at all.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if let Some(file) = open_direct(path) {
            return Ok(Self { file, path: path.to_owned(), mode: ReadMode::Direct });
        }
        let file = File::open(path).map_err(FormatError::io("open", path))?;
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).map_err(|e| FormatError::io("open", path)(e.into()))?;
        Ok(Self { file, path: path.to_owned(), mode: ReadMode::Buffered })
    }

    /// How it is read.
    pub fn mode(&self) -> ReadMode {
        self.mode
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills both buffers from `offset` on, in one system call where the kernel allows.
    ///
    /// # Errors
    /// Of the system; `UnexpectedEof` when the file ends early.
    pub fn read_exact_at(&self, offset: u64, buffers: [&mut [u8]; 2]) -> io::Result<()> {
        let total = buffers[0].len() + buffers[1].len();
        let mut done = 0;
        let [a, b] = buffers;
        while done < total {
            let (skip_a, skip_b) = (done.min(a.len()), done.saturating_sub(a.len()));
            let mut slices = [IoSliceMut::new(&mut a[skip_a..]), IoSliceMut::new(&mut b[skip_b..])];
            let first = usize::from(slices[0].is_empty());
            match rustix::io::preadv(&self.file, &mut slices[first..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads at least `needed` bytes from the boundary `offset` on into `buffer`, which begins at a boundary in memory and is as long as
    /// the whole blocks that hold them: the last block of a file may be short.
    ///
    /// # Errors
    /// As [`DirectFile::read_exact_at`].
    pub fn read_blocks_at(&self, offset: u64, needed: usize, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < needed {
            match rustix::io::pread(&self.file, &mut buffer[done..], offset + done as u64) {
                Ok(n) if done + n >= needed => return Ok(()),
                // What is left of a block is read again with it.
                Ok(n) if n >= READ_ALIGN => done += n / READ_ALIGN * READ_ALIGN,
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
    let statx = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::DIOALIGN).ok()?;
    let said = statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    // A zero alignment says that direct reads are not supported; file systems that say nothing are probed below.
    if said && (statx.stx_dio_mem_align == 0 || statx.stx_dio_mem_align.max(statx.stx_dio_offset_align) as usize > READ_ALIGN) {
        return None;
    }
    let file = File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).ok()?);
    let mut probe = vec![0u8; 2 * READ_ALIGN];
    let start = probe.as_ptr().align_offset(READ_ALIGN);
    rustix::io::pread(&file, &mut probe[start..start + READ_ALIGN], 0).ok()?;
    Some(file)
}

#[cfg(target_vendor = "apple")]
fn open_direct(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    rustix::fs::fcntl_nocache(&file, true).ok()?;
    Some(file)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn open_direct(_path: &Path) -> Option<File> {
    None
}
