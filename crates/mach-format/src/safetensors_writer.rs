//! Writing safetensors: the header from a plan, then one tensor after the other, so that nothing has to be held.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as HeaderEntry};

use crate::disk::AtomicFile;
use crate::error::FormatError;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, the slowest first.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Bytes of its data.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A safetensors file being written in the order of its plan.
pub struct SafetensorsWriter {
    file: AtomicFile,
    plan: std::iter::Peekable<std::vec::IntoIter<Planned>>,
    /// Bytes of the tensor that is due which were written.
    written: usize,
}

impl SafetensorsWriter {
    /// Opens `path` (under a temporary name) and writes the header.
    ///
    /// # Errors
    /// A name that occurs twice, a file that cannot be written.
    pub fn create(path: &Path, plan: Vec<Planned>) -> Result<Self, FormatError> {
        let (header, bytes) = header(&plan)?;
        let mut file = AtomicFile::create(path, header.len() as u64 + bytes)?;
        file.write(&header)?;
        Ok(Self { file, plan: plan.into_iter().peekable(), written: 0 })
    }

    /// Writes the next bytes of the tensor that is due, which must be the one named; in one call or in several.
    ///
    /// # Errors
    /// Another tensor than the one due, more bytes than it has, a full disk.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), FormatError> {
        match self.plan.peek() {
            Some(due) if due.name == name && self.written + data.len() <= due.bytes() => {
                self.written += data.len();
                if self.written == due.bytes() {
                    self.plan.next();
                    self.written = 0;
                }
                self.file.write(data)
            }
            due => Err(FormatError::Plan {
                reason: format!("{name} with {} bytes was written where {due:?} is due after {} bytes of it", data.len(), self.written),
            }),
        }
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// Tensors of the plan that were not written whole, a full disk.
    pub fn finish(mut self) -> Result<(), FormatError> {
        match self.plan.next() {
            None => self.file.commit(),
            Some(due) => Err(FormatError::Plan { reason: format!("{} was not written", due.name) }),
        }
    }
}

/// What stands before the data of a file, and the bytes of that data.
pub(crate) fn header(plan: &[Planned]) -> Result<(Vec<u8>, u64), FormatError> {
    let invalid = |reason: String| FormatError::Plan { reason };
    let mut at = 0;
    let mut entries = Vec::with_capacity(plan.len());
    for tensor in plan {
        let entry = HeaderEntry { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (at, at + tensor.bytes()) };
        at += tensor.bytes();
        entries.push((tensor.name.clone(), entry));
    }
    let format = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), entries).map_err(|e| invalid(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| invalid(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(([&(json.len() as u64).to_le_bytes()[..], &json].concat(), at as u64))
}
