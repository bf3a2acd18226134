//! Packing while shards come: which of them are on the disk, whose turn it is to be fetched, and what can be packed.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mach_format::{Checkpoint, PackJob, PackWriter, ShardAt};
use mach_models::Resolved;

use super::api::RemoteFile;
use super::cache::RepoCache;
use super::download::{Shared, fetch};
use super::outline::fits;
use super::schedule::{Place, Schedule};
use super::{HubError, PullEvent};
use crate::Error;

/// The weight files of a checkpoint, of which some are on the disk.
pub(super) struct Shards<'a> {
    pub(super) cache: &'a RepoCache,
    /// Folder of headers and small files.
    pub(super) outlines: &'a Path,
    pub(super) files: &'a [&'a RemoteFile],
    pub(super) bits: Option<(u8, u16)>,
}

impl Shards<'_> {
    /// Where a shard can be read: whole, or its outline.
    fn at(&self, file: &RemoteFile) -> ShardAt {
        let whole = self.cache.has(file);
        let path = if whole { self.cache.blob(&file.hash) } else { self.outlines.join(&file.path) };
        ShardAt { path, bytes: file.size, whole }
    }

    /// The checkpoint with the shards that are on the disk now. They take their space until it is dropped.
    pub(super) fn open(&self) -> Result<Resolved, Error> {
        let at = |name: &str| self.files.iter().find(|f| f.path == name).map(|f| self.at(f));
        Ok(Resolved::open(Arc::new(Checkpoint::open_outline(self.outlines, &at)?))?)
    }

    /// The shards that each piece is made of, ascending.
    pub(super) fn of_pieces(&self, ck: &Checkpoint, job: &PackJob) -> Vec<Vec<usize>> {
        // Copies of one file are one blob.
        let number = |path: &Path| {
            let found = self.files.iter().find(|f| self.at(f).path == path)?;
            self.files.iter().position(|f| f.hash == found.hash)
        };
        let numbers: Vec<Option<usize>> = ck.weight_files().map(number).collect();
        let of = |tensors: &[String]| {
            let mut shards: Vec<usize> = tensors.iter().filter_map(|t| numbers[ck.tensor(t)?.file]).collect();
            shards.sort_unstable();
            shards.dedup();
            shards
        };
        job.pieces().iter().map(|piece| of(&piece.tensors)).collect()
    }

    /// Where the shards are. Those of which nothing is needed are removed.
    pub(super) fn places(&self, todo: &[&[usize]]) -> Result<Vec<Place>, HubError> {
        let shown = self.cache.shown();
        let needed: HashSet<usize> = todo.iter().flat_map(|shards| shards.iter().copied()).collect();
        let mut places = Vec::with_capacity(self.files.len());
        for (s, file) in self.files.iter().enumerate() {
            let is_shown = shown.contains(OsStr::new(file.hash.hex()));
            let copy = self.files[..s].iter().any(|f| f.hash == file.hash);
            if !needed.contains(&s) && !is_shown && !copy {
                self.cache.remove(&file.hash)?;
            }
            places.push(match (self.cache.has(file), self.cache.left(file)) {
                (true, _) if is_shown => Place::Shown,
                (false, 0) => Place::Absent,
                _ => Place::Here,
            });
        }
        Ok(places)
    }

    /// Bytes that the shards in flight take beside those that are on the disk already.
    pub(super) fn room(&self, places: &[Place], plan: &Schedule, in_flight: usize) -> u64 {
        let mut sizes: Vec<u64> = plan.order.iter().map(|&s| self.files[s].size).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let on_disk = |s: &&usize| places[**s] == Place::Here;
        let there = |s: &usize| if self.cache.has(self.files[*s]) { self.files[*s].size } else { self.cache.left(self.files[*s]) };
        let there: u64 = plan.order.iter().filter(on_disk).map(there).sum();
        sizes.iter().take(in_flight).sum::<u64>().saturating_sub(there)
    }
}

/// Whose turn it is to be fetched.
pub(super) struct Turns<'a> {
    plan: &'a Schedule,
    places: &'a [Place],
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Place in the order.
    next: usize,
    /// Shards on the disk, those that are fetched included.
    held: usize,
}

impl<'a> Turns<'a> {
    /// Fetches in the order of the plan; `limit` shards may be on the disk, and more where the plan needs them.
    pub(super) fn new(plan: &'a Schedule, places: &'a [Place], limit: usize) -> Self {
        let held = places.iter().filter(|place| **place == Place::Here).count();
        Self { plan, places, limit, state: Mutex::new(State { next: 0, held }), changed: Condvar::new() }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next shard, as soon as there is room for it; `None` when there is none or the others have stopped.
    fn take(&self, stop: &AtomicBool) -> Option<usize> {
        let mut state = self.lock();
        loop {
            let shard = *self.plan.order.get(state.next).filter(|_| !stop.load(Ordering::Relaxed))?;
            let counted = self.places[shard] == Place::Here;
            if counted || state.held < self.limit.max(self.plan.need[state.next]) {
                state.next += 1;
                state.held += usize::from(!counted);
                return Some(shard);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// So many shards are gone.
    fn free(&self, shards: usize) {
        self.lock().held -= shards;
        self.changed.notify_all();
    }

    fn stop(&self, stop: &AtomicBool) {
        // Under the lock, so that nobody begins to wait in between.
        let _state = self.lock();
        stop.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }
}

/// A shard that has come, and the bytes that came for it.
type Arrival = Result<(usize, u64), HubError>;

/// A pack that is written while shards come.
pub(super) struct Packing<'a> {
    shards: &'a Shards<'a>,
    places: &'a [Place],
    of_pieces: &'a [Vec<usize>],
    turns: &'a Turns<'a>,
    writer: PackWriter,
    /// Shards that are whole on the disk.
    present: Vec<bool>,
    downloaded: u64,
}

impl<'a> Packing<'a> {
    /// Of the pieces that `writer` has not written yet.
    pub(super) fn new(shards: &'a Shards<'a>, places: &'a [Place], of_pieces: &'a [Vec<usize>], writer: PackWriter, turns: &'a Turns<'a>) -> Self {
        let present = places.iter().map(|place| *place == Place::Shown).collect();
        Self { shards, places, of_pieces, turns, writer, present, downloaded: 0 }
    }

    /// The pack, and the bytes that came over the network.
    pub(super) fn done(self) -> (PackWriter, u64) {
        (self.writer, self.downloaded)
    }

    /// Fetches and packs everything, so many shards at a time.
    pub(super) fn all(&mut self, jobs: usize, shared: &Shared<'_>, url: &(dyn Fn(usize) -> String + Sync)) -> Result<(), Error> {
        let (sender, arrivals) = channel::<Arrival>();
        let (files, turns) = (self.shards.files, self.turns);
        std::thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                let sender = sender.clone();
                scope.spawn(move || {
                    while let Some(shard) = turns.take(shared.stop) {
                        let came = fetch(shared, &url(shard), files[shard]).map(|came| (shard, came));
                        let failed = came.is_err();
                        // The first failure to be told is the cause: the others stop after it was sent.
                        if sender.send(came).is_err() || failed {
                            turns.stop(shared.stop);
                        }
                    }
                });
            }
            drop(sender);
            let result = self.pack(&arrivals, shared.progress);
            turns.stop(shared.stop);
            result
        })
    }

    /// Packs what can be packed whenever a shard has come.
    fn pack(&mut self, arrivals: &Receiver<Arrival>, progress: &(dyn Fn(PullEvent) + Sync)) -> Result<(), Error> {
        loop {
            let waiting: Vec<usize> = (0..self.of_pieces.len()).filter(|&p| !self.writer.is_done(p)).collect();
            let (ready, waiting): (Vec<usize>, Vec<usize>) = waiting.into_iter().partition(|&p| self.of_pieces[p].iter().all(|&s| self.present[s]));
            if !ready.is_empty() {
                let files = self.shards.open()?;
                let plan = files.pack_plan(self.shards.bits)?;
                self.writer.write(files.checkpoint(), &plan, &ready, &mut |bytes| progress(PullEvent::Packed(bytes)))?;
            }
            // Nothing is open any more, so what is removed gives its space back.
            self.release(&waiting)?;
            if waiting.is_empty() {
                return Ok(());
            }
            let (shard, came) = arrivals.recv().map_err(|_| HubError::Stopped)??;
            self.downloaded += came;
            self.arrived(shard)?;
        }
    }

    fn arrived(&mut self, shard: usize) -> Result<(), HubError> {
        let file = self.shards.files[shard];
        let (outline, blob) = (self.shards.outlines.join(&file.path), self.shards.cache.blob(&file.hash));
        if !fits(&outline, &blob).map_err(HubError::io(format!("compare {} with its header", blob.display())))? {
            std::fs::remove_file(&outline).map_err(HubError::io(format!("remove {}", outline.display())))?;
            let reason = "its header was another one when it was read first; run the command again".to_owned();
            return Err(HubError::Answer { url: file.path.clone(), reason });
        }
        self.present[shard] = true;
        Ok(())
    }

    /// Removes the shards that no waiting piece needs.
    fn release(&mut self, waiting: &[usize]) -> Result<(), HubError> {
        let needed: HashSet<usize> = waiting.iter().flat_map(|&p| self.of_pieces[p].iter().copied()).collect();
        let used_up = |s: &usize| self.present[*s] && self.places[*s] != Place::Shown && !needed.contains(s);
        let used_up: Vec<usize> = (0..self.present.len()).filter(used_up).collect();
        for &s in &used_up {
            self.shards.cache.remove(&self.shards.files[s].hash)?;
            self.present[s] = false;
        }
        self.turns.free(used_up.len());
        Ok(())
    }
}
