//! Writing GGUF: header and table from a plan, then one tensor after the other, so that nothing has to be held.

use std::path::Path;

use super::{ALIGNMENT, MAGIC, MetaList, MetaValue, Metadata, tag};
use crate::disk::AtomicFile;
use crate::error::FormatError;
use crate::format::WeightFormat;
use crate::gguf::GgmlType;

const VERSION: u32 = 3;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Full name.
    pub name: String,
    /// Element format; affine ones have no place in GGUF.
    pub format: WeightFormat,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl GgufTensor {
    fn ty(&self) -> Result<GgmlType, FormatError> {
        let invalid = |reason: &str| FormatError::Plan { reason: format!("{} {:?} {reason}", self.name, self.shape) };
        let ty = GgmlType::of_format(self.format).ok_or_else(|| invalid(&format!("cannot be {} in GGUF", self.format)))?;
        match self.shape.last() {
            Some(&cols) if (cols as u64).is_multiple_of(ty.values) && self.shape.len() <= 4 => Ok(ty),
            _ => Err(invalid(&format!("has no rows of whole blocks of {}", ty.values))),
        }
    }

    /// Bytes of its data.
    ///
    /// # Errors
    /// A format that GGUF has not, rows that are not whole blocks.
    pub fn bytes(&self) -> Result<u64, FormatError> {
        let ty = self.ty()?;
        Ok(self.shape.iter().product::<usize>() as u64 / ty.values * ty.bytes)
    }
}

/// A GGUF file being written in the order of its plan.
pub struct GgufWriter {
    file: AtomicFile,
    /// Names and bytes of the tensors that are still to come, the last first.
    plan: Vec<(String, u64)>,
    /// Bytes of the tensor that is due which were written.
    written: u64,
}

impl GgufWriter {
    /// Opens `path` (under a temporary name) and writes header and table.
    ///
    /// # Errors
    /// Formats and shapes that GGUF has not, a name that occurs twice, a file that cannot be written.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[GgufTensor]) -> Result<Self, FormatError> {
        let mut header = Vec::new();
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.0.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            put_text(&mut header, key);
            put_value(&mut header, value);
        }
        let mut at = 0u64;
        let mut plan = Vec::with_capacity(tensors.len());
        let mut names = std::collections::HashSet::new();
        for tensor in tensors {
            if !names.insert(&tensor.name) {
                return Err(FormatError::Plan { reason: format!("{} occurs twice", tensor.name) });
            }
            put_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&dim| header.extend((dim as u64).to_le_bytes()));
            header.extend(tensor.ty()?.id.to_le_bytes());
            header.extend(at.to_le_bytes());
            let bytes = tensor.bytes()?;
            at = (at + bytes).next_multiple_of(ALIGNMENT);
            plan.push((tensor.name.clone(), bytes));
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        plan.reverse();
        let mut file = AtomicFile::create(path, header.len() as u64 + at)?.forget_when_done();
        file.write(&header)?;
        Ok(Self { file, plan, written: 0 })
    }

    /// Writes the next bytes of the tensor that is due, which must be the one named; in one call or in several.
    ///
    /// # Errors
    /// Another tensor than the one due, more bytes than it has, a full disk.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), FormatError> {
        match self.plan.last() {
            Some((due, bytes)) if due == name && self.written + data.len() as u64 <= *bytes => {
                self.file.write(data)?;
                self.written += data.len() as u64;
                if self.written == *bytes {
                    let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
                    self.file.write(&[0; ALIGNMENT as usize][..padding as usize])?;
                    self.plan.pop();
                    self.written = 0;
                }
                Ok(())
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
        match self.plan.pop() {
            None => self.file.commit(),
            Some((due, _)) => Err(FormatError::Plan { reason: format!("{due} was not written") }),
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    let mut put = |tag: u32, bytes: &[u8]| {
        out.extend(tag.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        MetaValue::U32(n) => put(tag::U32, &n.to_le_bytes()),
        MetaValue::I32(n) => put(tag::I32, &n.to_le_bytes()),
        MetaValue::F32(x) => put(tag::F32, &x.to_le_bytes()),
        MetaValue::U64(n) => put(tag::U64, &n.to_le_bytes()),
        MetaValue::I64(n) => put(tag::I64, &n.to_le_bytes()),
        MetaValue::F64(x) => put(tag::F64, &x.to_le_bytes()),
        MetaValue::Bool(b) => put(tag::BOOL, &[u8::from(*b)]),
        MetaValue::Text(t) => {
            put(tag::TEXT, &[]);
            put_text(out, t);
        }
        MetaValue::List(list) => {
            put(tag::LIST, &[]);
            put_list(out, list);
        }
    }
}

/// Whole numbers are written in 32 bits where they fit, fractions as singles: what readers of ggml expect.
fn put_list(out: &mut Vec<u8>, list: &MetaList) {
    let wide = matches!(list, MetaList::Int(v) if v.iter().any(|&n| i32::try_from(n).is_err()));
    let tag = match list {
        MetaList::Int(_) if wide => tag::I64,
        MetaList::Int(_) => tag::I32,
        MetaList::Float(_) => tag::F32,
        MetaList::Bool(_) => tag::BOOL,
        MetaList::Text(_) => tag::TEXT,
    };
    out.extend(tag.to_le_bytes());
    out.extend((list.len() as u64).to_le_bytes());
    match list {
        MetaList::Int(v) if wide => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        MetaList::Int(v) => v.iter().for_each(|&n| out.extend((n as i32).to_le_bytes())),
        MetaList::Float(v) => v.iter().for_each(|&x| out.extend((x as f32).to_le_bytes())),
        MetaList::Bool(v) => out.extend(v.iter().map(|&b| u8::from(b))),
        MetaList::Text(v) => v.iter().for_each(|t| put_text(out, t)),
    }
}
