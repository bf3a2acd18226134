//! Checkpoints of which little is there: the headers of their shards, and what else must be known of tensors before they come.

use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use crate::checkpoint::MAX_HEADER;
use crate::error::FormatError;

/// A shard that is elsewhere than its checkpoint, or its outline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardAt {
    /// The file.
    pub path: PathBuf,
    /// Bytes of the whole shard.
    pub bytes: u64,
    /// Whether this is the shard itself.
    pub whole: bool,
}

/// Where the data of a safetensors file begins, which is as much of it as must be read for its header: its first eight bytes say.
///
/// # Errors
/// [`FormatError::Header`], naming `path`.
pub fn data_start(path: &Path, first: [u8; 8]) -> Result<u64, FormatError> {
    match u64::from_le_bytes(first) {
        length if length <= MAX_HEADER => Ok(8 + length),
        length => Err(FormatError::Header { path: path.to_owned(), reason: format!("its length is given as {length} bytes") }),
    }
}

/// Where the tensors of a safetensors file lie whose values say what shape others have (compressed-tensors' `weight_shape`), ascending.
/// `beginning` is the file up to its data.
///
/// # Errors
/// [`FormatError::Header`], naming `path`.
pub fn shape_tensors(path: &Path, beginning: &[u8]) -> Result<Vec<Range<u64>>, FormatError> {
    let header_error = |reason: String| FormatError::Header { path: path.to_owned(), reason };
    let header = beginning.get(8..).ok_or_else(|| header_error("it is cut off".to_owned()))?;
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| header_error(e.to_string()))?;
    let start = beginning.len() as u64;
    let of = |(name, tensor): (String, &safetensors::tensor::TensorInfo)| {
        let (from, to) = tensor.data_offsets;
        name.ends_with(".weight_shape").then_some(start + from as u64..start + to as u64)
    };
    let mut ranges: Vec<Range<u64>> = metadata.tensors().into_iter().filter_map(of).collect();
    ranges.sort_unstable_by_key(|r| r.start);
    Ok(ranges)
}
