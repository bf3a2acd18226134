//! Writing safetensors whose tensors come in any order and over several runs: each at its place in the file, and a journal
//! of those that are there with their checksums.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk::sync_dir;
use crate::error::FormatError;
use crate::fingerprint::checksum;
use crate::safetensors_writer::{Planned, header};

/// A safetensors file being written under a temporary name.
pub(crate) struct SafetensorsParts {
    path: PathBuf,
    tmp: PathBuf,
    file: File,
    journal: File,
    /// Position and length of every tensor.
    places: HashMap<String, (u64, usize)>,
    /// Checksums of the tensors that are there.
    done: HashMap<String, u64>,
    /// Those that the journal does not name yet.
    unsynced: Vec<String>,
    bytes: u64,
}

/// The temporary file of `path` and its journal.
fn beside(path: &Path) -> [PathBuf; 2] {
    [".tmp", ".done"].map(|ending| {
        let mut name = path.as_os_str().to_owned();
        name.push(ending);
        name.into()
    })
}

/// What a journal names: `None` when there is none, or one of other tensors or of another source.
fn read_journal(path: &Path, title: &str) -> Option<HashMap<String, u64>> {
    let text = fs::read_to_string(path).ok()?;
    // A line that a killed run left half written does not count.
    let whole = &text[..text.rfind('\n')? + 1];
    let mut lines = whole.lines();
    if lines.next() != Some(title) {
        return None;
    }
    let entry = |line: &str| {
        let (sum, name) = line.split_once(' ')?;
        Some((name.to_owned(), u64::from_str_radix(sum, 16).ok()?))
    };
    Some(lines.filter_map(entry).collect())
}

/// Binds a journal to its source and to what is planned.
fn title(header: &[u8], source: &str) -> String {
    format!("{source} {:016x}", checksum(header))
}

impl SafetensorsParts {
    /// Names of the tensors that an earlier run wrote to the temporary file of `path`, by its journal.
    pub(crate) fn written(path: &Path, plan: &[Planned], source: &str) -> Result<HashSet<String>, FormatError> {
        let [_, journal] = beside(path);
        let title = title(&header(plan)?.0, source);
        Ok(read_journal(&journal, &title).unwrap_or_default().into_keys().collect())
    }

    /// Takes a finished file back, for a run that was killed before it had published what belongs to it.
    pub(crate) fn take_back(path: &Path, from: &Path) -> Result<(), FormatError> {
        let [tmp, _] = beside(path);
        if from.is_file() { fs::rename(from, &tmp).map_err(FormatError::io("rename", from)) } else { Ok(()) }
    }

    /// Removes the journal of a file that is published.
    pub(crate) fn forget(path: &Path) -> Result<(), FormatError> {
        let [_, journal] = beside(path);
        fs::remove_file(&journal).map_err(FormatError::io("remove", &journal))
    }

    /// Opens the temporary file of `path`. What an earlier run wrote of the same plan and `source` is kept where its checksum is right.
    pub(crate) fn open(path: &Path, plan: &[Planned], source: &str) -> Result<Self, FormatError> {
        let [tmp, journal_path] = beside(path);
        let (head, data) = header(plan)?;
        let (bytes, title) = (head.len() as u64 + data, title(&head, source));
        let mut at = head.len() as u64;
        let mut places = HashMap::with_capacity(plan.len());
        for tensor in plan {
            places.insert(tensor.name.clone(), (at, tensor.bytes()));
            at += tensor.bytes() as u64;
        }
        let open = |path: &Path| OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(FormatError::write(path, bytes));
        let (file, mut journal) = (open(&tmp)?, open(&journal_path)?);
        let named = read_journal(&journal_path, &title).unwrap_or_default();
        file.set_len(bytes).and_then(|()| file.write_all_at(&head, 0)).map_err(FormatError::write(&tmp, bytes))?;
        let mut done = HashMap::new();
        for (name, sum) in named {
            if let Some(&(at, len)) = places.get(&name) {
                let mut data = vec![0; len];
                file.read_exact_at(&mut data, at).map_err(FormatError::io("read", &tmp))?;
                if checksum(&data) == sum {
                    done.insert(name, sum);
                }
            }
        }
        journal.set_len(0).and_then(|()| writeln!(journal, "{title}")).map_err(FormatError::write(&journal_path, bytes))?;
        let unsynced = done.keys().cloned().collect();
        let mut parts = Self { path: path.to_owned(), tmp, file, journal, places, done, unsynced, bytes };
        parts.sync()?;
        Ok(parts)
    }

    /// Whether a tensor is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.done.contains_key(name)
    }

    /// Writes a whole tensor.
    pub(crate) fn write(&mut self, name: &str, data: &[u8]) -> Result<(), FormatError> {
        let wrong = |what: String| FormatError::Plan { reason: format!("{name} {what}") };
        let &(at, len) = self.places.get(name).ok_or_else(|| wrong("is not in it".to_owned()))?;
        if data.len() != len {
            return Err(wrong(format!("has {} bytes where {len} were planned", data.len())));
        }
        self.file.write_all_at(data, at).map_err(FormatError::write(&self.tmp, self.bytes))?;
        self.done.insert(name.to_owned(), checksum(data));
        self.unsynced.push(name.to_owned());
        Ok(())
    }

    /// Makes what was written durable, and then known to later runs.
    pub(crate) fn sync(&mut self) -> Result<(), FormatError> {
        if self.unsynced.is_empty() {
            return Ok(());
        }
        let lines: String = self.unsynced.drain(..).filter_map(|name| Some(format!("{:016x} {name}\n", self.done.get(&name)?))).collect();
        let failed = || FormatError::write(&self.tmp, self.bytes);
        self.file.sync_all().map_err(failed())?;
        self.journal.write_all(lines.as_bytes()).and_then(|()| self.journal.sync_all()).map_err(failed())
    }

    /// Gives the file its name. The journal stays, so that the name can be taken back.
    ///
    /// # Errors
    /// Tensors of the plan that were not written.
    pub(crate) fn finish(mut self) -> Result<(), FormatError> {
        self.sync()?;
        if let Some(missing) = self.places.keys().find(|name| !self.has(name)) {
            return Err(FormatError::Plan { reason: format!("{missing} was not written") });
        }
        self.file.sync_all().map_err(FormatError::write(&self.tmp, self.bytes))?;
        fs::rename(&self.tmp, &self.path).map_err(FormatError::io("rename", &self.tmp))?;
        sync_dir(self.path.parent().unwrap_or_else(|| Path::new("")))
    }
}
