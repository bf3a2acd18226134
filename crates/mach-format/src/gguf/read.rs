//! Reading GGUF. Nothing in a file is believed before it is checked: counts against the bytes that are left, places
//! against the length of the file.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use super::{ALIGNMENT, ALIGNMENT_KEY, GgmlType, MAGIC, MetaList, MetaValue, Metadata, tag};
use crate::checkpoint::{ElementType, TensorInfo};
use crate::error::FormatError;

/// Headers beyond this are refused: the largest vocabularies take about 20 MB.
const MAX_HEADER: u64 = 512 << 20;
const MAX_DIMS: u32 = 4;
/// Names longer than this are no names. ggml itself stops at 64.
const MAX_NAME: usize = 1024;

/// An open GGUF model.
pub struct Gguf {
    pub(crate) path: PathBuf,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: IndexMap<String, TensorInfo>,
    pub(crate) files: Vec<(PathBuf, File)>,
}

impl Gguf {
    /// Opens a file, and with one part of a split model (`…-00001-of-00003.gguf`) all of them. Reads headers only.
    ///
    /// # Errors
    /// Everything that is malformed: magic, version, counts, types, alignment, places outside the file, names that
    /// occur twice, parts that are missing or do not belong together.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let parts = parts(path);
        let first = parts.first().cloned().unwrap_or_else(|| path.to_owned());
        let mut model: Option<Self> = None;
        for (number, part) in parts.iter().enumerate() {
            let file = File::open(part).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound if parts.len() > 1 => FormatError::MissingShard { path: part.clone(), index: path.to_owned() },
                _ => FormatError::io("open", part)(e),
            })?;
            let (metadata, tensors) = read_part(part, &file, number)?;
            let named = metadata.size("split.count")?.unwrap_or(1).max(1);
            let no = metadata.size("split.no")?.unwrap_or(0);
            if (named, no) != (parts.len() as u64, number as u64) {
                let reason = format!("it says that it is part {} of {named}, its name says part {} of {}", no + 1, number + 1, parts.len());
                return Err(FormatError::Gguf { path: part.clone(), reason });
            }
            let model = model.get_or_insert_with(|| Self { path: first.clone(), metadata, tensors: IndexMap::new(), files: Vec::new() });
            for (name, info) in tensors {
                if model.tensors.insert(name.clone(), info).is_some() {
                    return Err(FormatError::Gguf { path: part.clone(), reason: format!("the tensor {name} occurs twice") });
                }
            }
            model.files.push((part.clone(), file));
        }
        let model = model.ok_or_else(|| FormatError::Gguf { path: path.to_owned(), reason: "its name gives no parts".to_owned() })?;
        if let Some(all) = model.metadata.size("split.tensors.count")?
            && all != model.tensors.len() as u64
        {
            return Err(FormatError::Gguf { path: first, reason: format!("its parts have {} tensors where {all} are announced", model.tensors.len()) });
        }
        Ok(model)
    }

    /// The file, or the first part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata of the (first) file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Tensors in the order of the files, dimensions outermost first.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }
}

/// `name-00002-of-00003.gguf` → the names of all three; any other path alone.
fn parts(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five = |s: &str| (s.len() == 5).then(|| s.parse::<u32>().ok())?;
        let (number, count) = (five(number)?, five(count)?);
        (1..=count).contains(&number).then_some((stem, count))
    };
    match split() {
        Some((stem, count)) => (1..=count).map(|n| path.with_file_name(format!("{stem}-{n:05}-of-{count:05}.gguf"))).collect(),
        None => vec![path.to_owned()],
    }
}

/// A tensor of the table, its place not yet checked.
struct Entry {
    name: String,
    shape: Vec<usize>,
    ty: GgmlType,
    bytes: u64,
    offset: u64,
}

/// Header and table of one file.
fn read_part(path: &Path, file: &File, number: usize) -> Result<(Metadata, Vec<(String, TensorInfo)>), FormatError> {
    let length = file.metadata().map_err(FormatError::io("examine", path))?.len();
    let mut r = Header { path, length, at: 0, from: BufReader::with_capacity(1 << 18, file) };
    if &r.bytes::<4>()? != MAGIC {
        return Err(r.wrong("it does not begin with GGUF"));
    }
    let version = r.u32()?;
    if !matches!(version, 2 | 3) {
        let hint = if version.swap_bytes() <= 3 { " (a big-endian file)" } else { "" };
        return Err(r.wrong(format!("its version is {version}{hint}; 2 and 3 are read")));
    }
    let tensors = r.count("tensors", 24)?;
    let pairs = r.count("metadata entries", 13)?;
    let mut metadata = Metadata::default();
    for _ in 0..pairs {
        let key = r.text("a key")?;
        let ty = r.u32()?;
        let value = r.value(&key, ty)?;
        if metadata.get(&key).is_some() {
            return Err(r.wrong(format!("the key {key} occurs twice")));
        }
        metadata.set(key, value);
    }
    let alignment = metadata.size(ALIGNMENT_KEY)?.unwrap_or(ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(r.wrong(format!("its alignment is {alignment}, not a power of two up to 1 MiB")));
    }
    let mut entries = Vec::new();
    for _ in 0..tensors {
        entries.push(r.entry()?);
    }
    let data = r.at.next_multiple_of(alignment);
    let mut found = Vec::with_capacity(entries.len());
    for Entry { name, shape, ty, bytes, offset } in entries {
        if !offset.is_multiple_of(alignment) {
            return Err(r.wrong(format!("the tensor {name} is at {offset}, not a multiple of {alignment}")));
        }
        let end = data.checked_add(offset).and_then(|at| at.checked_add(bytes));
        if end.is_none_or(|end| end > length) {
            return Err(FormatError::Truncated { path: path.to_owned(), expected: end.unwrap_or(u64::MAX), got: length });
        }
        let dtype = ty.plain().map_or(ElementType::Block(ty), ElementType::Plain);
        found.push((name, TensorInfo { dtype, shape, file: number, offset: data + offset, bytes }));
    }
    Ok((metadata, found))
}

/// The header, read from the front.
struct Header<'a> {
    path: &'a Path,
    length: u64,
    at: u64,
    from: BufReader<&'a File>,
}

impl Header<'_> {
    fn wrong(&self, reason: impl Into<String>) -> FormatError {
        FormatError::Gguf { path: self.path.to_owned(), reason: reason.into() }
    }

    fn left(&self) -> u64 {
        self.length.min(MAX_HEADER).saturating_sub(self.at)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), FormatError> {
        let size = out.len() as u64;
        if size > self.left() {
            return Err(match self.at + size {
                end if end > self.length => FormatError::Truncated { path: self.path.to_owned(), expected: end, got: self.length },
                _ => self.wrong(format!("its header is longer than {MAX_HEADER} bytes")),
            });
        }
        self.from.read_exact(out).map_err(FormatError::io("read", self.path))?;
        self.at += size;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A number of things of at least `least` bytes each, which must fit into what is left.
    fn count(&mut self, what: &str, least: u64) -> Result<u64, FormatError> {
        let n = self.u64()?;
        if n > self.left() / least {
            return Err(self.wrong(format!("it announces {n} {what} in {} bytes", self.left())));
        }
        Ok(n)
    }

    fn text(&mut self, what: &str) -> Result<String, FormatError> {
        let n = self.count("bytes of text", 1)?;
        let mut out = vec![0; n as usize];
        self.fill(&mut out)?;
        String::from_utf8(out).map_err(|_| self.wrong(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, key: &str, ty: u32) -> Result<MetaValue, FormatError> {
        Ok(match ty {
            tag::U8 => MetaValue::U32(self.bytes::<1>()?[0].into()),
            tag::I8 => MetaValue::I32((self.bytes::<1>()?[0] as i8).into()),
            tag::U16 => MetaValue::U32(u16::from_le_bytes(self.bytes()?).into()),
            tag::I16 => MetaValue::I32(i16::from_le_bytes(self.bytes()?).into()),
            tag::U32 => MetaValue::U32(self.u32()?),
            tag::I32 => MetaValue::I32(i32::from_le_bytes(self.bytes()?)),
            tag::F32 => MetaValue::F32(f32::from_le_bytes(self.bytes()?)),
            tag::BOOL => MetaValue::Bool(self.bytes::<1>()?[0] != 0),
            tag::TEXT => MetaValue::Text(self.text(key)?),
            tag::LIST => MetaValue::List(self.list(key)?),
            tag::U64 => MetaValue::U64(self.u64()?),
            tag::I64 => MetaValue::I64(i64::from_le_bytes(self.bytes()?)),
            tag::F64 => MetaValue::F64(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.wrong(format!("{key} has the unknown type {other}"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<MetaList, FormatError> {
        let ty = self.u32()?;
        let least = match ty {
            tag::U8 | tag::I8 | tag::BOOL => 1,
            tag::U16 | tag::I16 => 2,
            tag::U32 | tag::I32 | tag::F32 => 4,
            tag::TEXT | tag::U64 | tag::I64 | tag::F64 => 8,
            tag::LIST => return Err(self.wrong(format!("{key} is a list of lists"))),
            other => return Err(self.wrong(format!("{key} is a list of the unknown type {other}"))),
        };
        let n = self.count(&format!("values of {key}"), least)?;
        let mut list = match ty {
            tag::TEXT => MetaList::Text(Vec::new()),
            tag::BOOL => MetaList::Bool(Vec::new()),
            tag::F32 | tag::F64 => MetaList::Float(Vec::new()),
            _ => MetaList::Int(Vec::new()),
        };
        for _ in 0..n {
            let value = self.value(key, ty)?;
            match (&mut list, value) {
                (MetaList::Text(v), MetaValue::Text(x)) => v.push(x),
                (MetaList::Bool(v), MetaValue::Bool(x)) => v.push(x),
                (MetaList::Float(v), MetaValue::F32(x)) => v.push(x.into()),
                (MetaList::Float(v), MetaValue::F64(x)) => v.push(x),
                (MetaList::Int(v), x) => match x.int() {
                    Some(x) => v.push(x),
                    None => return Err(self.wrong(format!("{key} has a number beyond 63 bits"))),
                },
                _ => return Err(self.wrong(format!("{key} has values of two types"))),
            }
        }
        Ok(list)
    }

    fn entry(&mut self) -> Result<Entry, FormatError> {
        let name = self.text("the name of a tensor")?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(self.wrong(format!("a tensor has a name of {} bytes", name.len())));
        }
        let dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(self.wrong(format!("the tensor {name} has {dims} dimensions")));
        }
        let mut shape = Vec::new();
        let mut values = 1u64;
        for _ in 0..dims {
            let dim = self.u64()?;
            // 2^48 values are more than any drive holds, and products with block sizes stay inside 64 bits.
            values =
                values.checked_mul(dim).filter(|&n| n > 0 && n <= 1 << 48).ok_or_else(|| self.wrong(format!("the tensor {name} has an impossible size")))?;
            shape.push(dim as usize);
        }
        let id = self.u32()?;
        let ty = GgmlType::of(id).ok_or_else(|| self.wrong(format!("the tensor {name} has the unknown type {id}")))?;
        if !(shape[0] as u64).is_multiple_of(ty.values) {
            return Err(self.wrong(format!("rows of the tensor {name} have {} values, not whole blocks of {} ({})", shape[0], ty.values, ty.name)));
        }
        shape.reverse();
        Ok(Entry { name, shape, ty, bytes: values / ty.values * ty.bytes, offset: self.u64()? })
    }
}
