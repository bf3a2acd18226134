//! Writing safetensors: the header from a plan, then one tensor after the other, so that nothing has to be held.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as HeaderEntry};

use crate::disk::AtomicFile;
use crate::error::FormatError;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Planned {
    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A safetensors file being written in the order of its plan.
pub(crate) struct SafetensorsWriter {
    file: AtomicFile,
    plan: std::vec::IntoIter<Planned>,
}

impl SafetensorsWriter {
    /// Opens `path` (under a temporary name) and writes the header.
    pub(crate) fn create(path: &Path, plan: Vec<Planned>) -> Result<Self, FormatError> {
        let invalid = |reason: String| FormatError::Plan { reason };
        let mut at = 0;
        let mut entries = Vec::with_capacity(plan.len());
        for tensor in &plan {
            let entry = HeaderEntry { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (at, at + tensor.bytes()) };
            at += tensor.bytes();
            entries.push((tensor.name.clone(), entry));
        }
        let format = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(format), entries).map_err(|e| invalid(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| invalid(e.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = AtomicFile::create(path, (8 + header.len() + at) as u64)?;
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(&header)?;
        Ok(Self { file, plan: plan.into_iter() })
    }

    /// Writes the next tensor of the plan, which must be the one named.
    pub(crate) fn write(&mut self, name: &str, data: &[u8]) -> Result<(), FormatError> {
        match self.plan.next() {
            Some(next) if next.name == name && next.bytes() == data.len() => self.file.write(data),
            next => Err(FormatError::Plan { reason: format!("{name} with {} bytes was written where {next:?} is due", data.len()) }),
        }
    }

    /// Gives the file its name.
    pub(crate) fn finish(mut self) -> Result<(), FormatError> {
        match self.plan.next() {
            None => self.file.commit(),
            Some(next) => Err(FormatError::Plan { reason: format!("{} was not written", next.name) }),
        }
    }
}
