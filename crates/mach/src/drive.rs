//! What the drive gives: random reads over a model's expert files, of several sizes, with several under way, past the page
//! cache and through it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mach_format::{DirectFile, READ_ALIGN, ReadMode, Sidecar, fingerprint, forget_pages};

use crate::rates::read_rate;
use crate::{Error, Prepared};

/// Reads under way that are tried.
pub(crate) const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// Records of the largest read.
const RECORDS: usize = 4;

/// One way of reading.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    /// What one read gets: `gate|up`, `record`, `4 records`.
    pub name: &'static str,
    /// Bytes of one read.
    pub bytes: usize,
    /// Reads under way.
    pub depth: usize,
    /// Past the page cache or through it.
    pub mode: ReadMode,
}

/// A file of records.
struct Extent {
    direct: DirectFile,
    buffered: File,
    /// Of the first record.
    start: u64,
    records: usize,
}

/// The expert files of a model.
pub(crate) struct Drive {
    extents: Vec<Extent>,
    /// Bytes from record to record, and of the gate|up part at its front.
    stride: usize,
    gate_up: usize,
}

impl Drive {
    /// Opens the files; `None` for a model without routed experts.
    pub fn open(prepared: &Prepared) -> Result<Option<Self>, Error> {
        let Some(source) = &prepared.source else { return Ok(None) };
        let checkpoint = prepared.files.checkpoint();
        let gate_up = source.layout(0).part_bytes[0].next_multiple_of(READ_ALIGN);
        let (stride, files): (usize, Vec<(PathBuf, u64, usize)>) = if source.kind() == "sidecar" {
            let sidecar = Sidecar::open(&prepared.sidecar_dir(), &fingerprint(checkpoint)?)?;
            let stride = sidecar.layers().iter().map(|l| l.layout.stride()).max().unwrap_or(0);
            let files = sidecar.layers().iter().map(|l| (l.path.clone(), l.offset(0, 0), l.experts() * l.layout.stride() / stride.max(1)));
            (stride, files.collect())
        } else {
            // The tensors of a checkpoint do not lie in records: anywhere in its files.
            let stride = source.part_bytes().iter().sum::<usize>().next_multiple_of(READ_ALIGN);
            let length = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len() as usize);
            (stride, checkpoint.weight_files().map(|p| (p.to_owned(), 0, length(p) / stride)).collect())
        };
        let open = |(path, start, records): (PathBuf, u64, usize)| -> Result<Extent, Error> {
            let buffered = File::open(&path).map_err(Error::io(format!("open {}", path.display())))?;
            let direct = DirectFile::open(&path)?;
            Ok(Extent { direct, buffered, start, records })
        };
        let extents = files.into_iter().filter(|f| f.2 > 0).map(open).collect::<Result<Vec<_>, _>>()?;
        Ok((!extents.is_empty()).then_some(Self { extents, stride, gate_up: gate_up.min(stride) }))
    }

    /// Every way of reading in these modes.
    pub fn points(&self, modes: &[ReadMode]) -> Vec<Point> {
        let most = self.extents.iter().map(|e| e.records).max().unwrap_or(0).min(RECORDS);
        let sizes = [("gate|up", self.gate_up), ("record", self.stride), ("4 records", most * self.stride)];
        let sizes = sizes.into_iter().filter(|&(name, bytes)| name != "4 records" || bytes == RECORDS * self.stride);
        let with_depth = |(name, bytes)| DEPTHS.map(move |depth| (name, bytes, depth));
        let all: Vec<_> = sizes.flat_map(with_depth).collect();
        let direct = self.extents.iter().all(|e| e.direct.mode() == ReadMode::Direct);
        let modes = modes.iter().filter(|&&m| m == ReadMode::Buffered || direct);
        modes.flat_map(|&mode| all.iter().map(move |&(name, bytes, depth)| Point { name, bytes, depth, mode })).collect()
    }

    /// Bytes per second at a point; `None` when a read fails.
    pub fn rate(&self, point: &Point, time: Duration) -> Option<f64> {
        let fitting: Vec<&Extent> = self.extents.iter().filter(|e| e.records * self.stride >= point.bytes).collect();
        if fitting.is_empty() {
            return None;
        }
        read_rate(point.depth, time, point.bytes, |random, buffer| {
            let extent = fitting[random.below(fitting.len())];
            let last = extent.records - point.bytes.div_ceil(self.stride);
            let offset = extent.start + (random.below(last + 1) * self.stride) as u64;
            read(extent, point.mode, offset, buffer).ok().map(|()| point.bytes as u64)
        })
    }

    /// The ceiling: the best direct point, or the best buffered one where the file system knows no direct reads.
    pub fn ceiling(&self, time: Duration) -> Option<f64> {
        let mut points = self.points(&[ReadMode::Direct]);
        if points.is_empty() {
            points = self.points(&[ReadMode::Buffered]);
        }
        points.iter().filter_map(|p| self.rate(p, time)).max_by(f64::total_cmp)
    }

    /// Drops the files from the page cache.
    pub fn forget(&self) {
        self.extents.iter().for_each(|e| forget_pages(&e.buffered, 0, None));
    }
}

fn read(extent: &Extent, mode: ReadMode, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    match mode {
        ReadMode::Direct => extent.direct.read_exact_at(offset, [buffer, &mut []]),
        ReadMode::Buffered => {
            // From the drive, not from what an earlier read left.
            forget_pages(&extent.buffered, offset, Some(buffer.len() as u64));
            extent.buffered.read_exact_at(buffer, offset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoadOptions;

    /// Protects the sweep: every size, depth and mode over the built-in model's files reads something, and the ceiling is
    /// at least as good as one of them was.
    #[test]
    fn every_point_reads() {
        let prepared = crate::prepare(None, &LoadOptions::default()).unwrap();
        let drive = Drive::open(&prepared).unwrap().unwrap();
        let points = drive.points(&[ReadMode::Direct, ReadMode::Buffered]);
        assert!(points.len() == 30 || points.len() == 15, "{}", points.len());
        for point in &points {
            assert!(drive.rate(point, Duration::from_millis(2)).unwrap() > 0.0, "{point:?}");
        }
        assert!(drive.ceiling(Duration::from_millis(1)).unwrap() > 0.0);
        drive.forget();
    }
}
