//! The beginnings of shards, from which it is known what they hold before they come.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::HubError;
use super::api::RemoteFile;
use super::download::{Shared, range_start, with_retries};

/// Bytes of a first request: many headers fit.
const FIRST: u64 = 64 << 10;
/// Ranges that lie closer come in one request.
const GAP: u64 = 64 << 10;

/// Reads a range of a file, wherever that is.
type ReadRange<'a> = &'a dyn Fn(Range<u64>) -> Result<Vec<u8>, HubError>;

/// Writes the outline of a shard to `path`: its header, and the tensors that say what shape others have. It comes from the blob in the cache
/// where that is whole. Returns the bytes that came over the network.
pub(super) fn outline(shared: &Shared<'_>, url: &str, file: &RemoteFile, path: &Path) -> Result<u64, HubError> {
    let blob = shared.cache.blob(&file.hash);
    if shared.cache.has(file) {
        let shard = File::open(&blob).map_err(HubError::io(format!("open {}", blob.display())))?;
        let read = |range: Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            shard.read_exact_at(&mut bytes, range.start).map_err(HubError::io(format!("read {}", blob.display())))?;
            Ok(bytes)
        };
        return write(&read, url, file, path).map(|_| 0);
    }
    write(&|range| read_range(shared, url, range), url, file, path)
}

fn write(read: ReadRange<'_>, url: &str, file: &RemoteFile, path: &Path) -> Result<u64, HubError> {
    let wrong = |reason: String| HubError::Answer { url: url.to_owned(), reason };
    let format = |e: mach_format::FormatError| wrong(e.to_string());
    let mut beginning = read(0..FIRST.min(file.size))?;
    let mut bytes = beginning.len() as u64;
    let first = beginning.first_chunk().copied().ok_or_else(|| wrong("it is too short for weights".to_owned()))?;
    let name = PathBuf::from(&file.path);
    let start = mach_format::data_start(&name, first).map_err(format)?;
    if start > file.size {
        return Err(wrong(format!("its header is given as {start} of {} bytes", file.size)));
    }
    if start > bytes {
        let rest = read(bytes..start)?;
        bytes += rest.len() as u64;
        beginning.extend(rest);
    }
    beginning.truncate(start as usize);
    let failed = |action: &str| HubError::io(format!("{action} {}", path.display()));
    // Under a name of its own until it is whole.
    let partial = path.with_extension("tmp");
    let out = File::create(&partial).map_err(failed("write"))?;
    out.write_all_at(&beginning, 0).map_err(failed("write"))?;
    for range in joined(mach_format::shape_tensors(&name, &beginning).map_err(format)?) {
        let data = read(range.clone())?;
        bytes += data.len() as u64;
        out.write_all_at(&data, range.start).map_err(failed("write"))?;
    }
    std::fs::rename(&partial, path).map_err(failed("rename"))?;
    Ok(bytes)
}

/// Ascending ranges, neighbours in one.
fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end + GAP => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// A range of a file on the server. Connections that end early are taken up where they ended.
fn read_range(shared: &Shared<'_>, url: &str, range: Range<u64>) -> Result<Vec<u8>, HubError> {
    let length = (range.end - range.start) as usize;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        if shared.stop.load(Ordering::Relaxed) {
            return Err(HubError::Stopped);
        }
        let from = range.start + bytes.len() as u64;
        bytes.extend(with_retries(|| read_some(shared, url, from..range.end))?);
    }
    Ok(bytes)
}

/// The beginning of a range, which is not empty.
fn read_some(shared: &Shared<'_>, url: &str, range: Range<u64>) -> Result<Vec<u8>, HubError> {
    let broken = |reason: String| HubError::Connection { url: url.to_owned(), reason };
    let response = shared.client.get(url, range.start, Some(range.end))?;
    // A server that knows no ranges sends everything.
    let skip = match response.status().as_u16() {
        206 if range_start(&response) == Some(range.start) => 0,
        200 => range.start,
        _ => return Err(broken(format!("the server does not give the bytes from {} on", range.start))),
    };
    let mut body = response.into_body().into_reader();
    std::io::copy(&mut body.by_ref().take(skip), &mut std::io::sink()).map_err(|e| broken(e.to_string()))?;
    let (mut bytes, mut body) = (Vec::new(), body.take(range.end - range.start));
    match body.read_to_end(&mut bytes) {
        // What came of it counts.
        _ if !bytes.is_empty() => Ok(bytes),
        Ok(_) => Err(broken("the connection ended at once".to_owned())),
        Err(e) => Err(broken(e.to_string())),
    }
}

/// Whether a shard that has come begins as its outline does.
pub(super) fn fits(outline: &Path, blob: &Path) -> std::io::Result<bool> {
    let (outline, blob) = (File::open(outline)?, File::open(blob)?);
    let mut first = [0; 8];
    outline.read_exact_at(&mut first, 0)?;
    let length = outline.metadata()?.len().min(8u64.saturating_add(u64::from_le_bytes(first)));
    let [mut expected, mut found] = [vec![0; length as usize], vec![0; length as usize]];
    outline.read_exact_at(&mut expected, 0)?;
    blob.read_exact_at(&mut found, 0)?;
    Ok(expected == found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the number of requests: small tensors that lie together come together.
    #[test]
    fn neighbours_come_together() {
        assert_eq!(joined(vec![0..16, 16..32, 40..48, 100_000..100_016]), [0..48, 100_000..100_016]);
        assert!(joined(vec![]).is_empty());
    }
}
