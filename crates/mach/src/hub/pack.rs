//! Downloads that become packs: each shard is removed when all that it holds is packed, so that few of them are on the disk at a time.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mach_format::{BuildReport, Fingerprint, PackJob, PackWriter};
use serde_json::{Value, json};

use super::api::RemoteFile;
use super::cache::RepoCache;
use super::download::{Shared, in_parallel};
use super::outline::outline;
use super::packing::{Packing, Shards, Turns};
use super::schedule::schedule;
use super::{Hub, HubError, PullEvent, PullRequest, chosen, fetch_all};
use crate::Error;
use crate::units::size;

/// Where headers and small files stand while a pack is made.
const OUTLINE: &str = ".pull";
/// What a pack was made of.
const ORIGIN: &str = "source.json";

/// The pack that is made of what is downloaded.
#[derive(Clone, Debug)]
pub struct PackRequest {
    /// Bits and columns of a group to quantise to; `None` keeps the source's formats.
    pub bits: Option<(u8, u16)>,
    /// Shards that may be on the disk at a time. When a layer lies in more of them, as many as it needs.
    pub shards_in_flight: usize,
    /// The folder; `None` takes one in the cache, where `org/name` finds it.
    pub out: Option<PathBuf>,
}

/// A pack that is complete.
#[derive(Clone, Debug)]
pub struct PulledPack {
    /// Its folder.
    pub path: PathBuf,
    /// The commit that it was made of.
    pub commit: String,
    /// Shards that were used now.
    pub shards: usize,
    /// Shards that could be on the disk at a time.
    pub in_flight: usize,
    /// Bytes that came over the network now.
    pub downloaded: u64,
    /// What was written now; `None` when the pack was there.
    pub report: Option<BuildReport>,
}

impl Hub {
    /// Downloads a checkpoint and packs it while it comes. Shards are in the cache while they are in use, and are removed when they are
    /// used up, unless a snapshot shows them. What an earlier run packed is kept, what it downloaded goes on. `progress` is called from several threads.
    ///
    /// # Errors
    /// As [`Hub::pull`], and all that is wrong with a checkpoint that cannot be packed.
    pub fn pull_pack(&self, request: &PullRequest, pack: &PackRequest, progress: &(dyn Fn(PullEvent) + Sync)) -> Result<PulledPack, Error> {
        let cache = RepoCache::new(&self.cache, &request.repo);
        if self.offline {
            return Ok(offline(&cache, request, pack)?);
        }
        let client = self.client(&request.repo)?;
        let listing = client.listing(&request.repo, &request.revision)?;
        let out = pack.out.clone().unwrap_or_else(|| cache.pack(&listing.commit, pack.bits));
        let origin = origin(request, pack, &listing.commit);
        match origin_in(&out) {
            Some(there) if !same_origin(&there, &origin) => return Err(other(request, &out, &there.to_string())),
            Some(_) if out.join("config.json").exists() => {
                return Ok(PulledPack { path: out, commit: listing.commit, shards: 0, in_flight: 0, downloaded: 0, report: None });
            }
            None if out.join("config.json").exists() => return Err(other(request, &out, "a model")),
            _ => {}
        }
        cache.create()?;
        let stop = AtomicBool::new(false);
        let shared = Shared { client: &client, cache: &cache, progress: &|_| {}, stop: &stop };
        let (files, index_bytes) = chosen(request, &listing, &shared)?;
        if files.iter().any(|f| f.path.ends_with(".gguf")) {
            return Err(HubError::PackGguf { repo: request.repo.clone() }.into());
        }
        if files.iter().any(|f| Path::new(&f.path).starts_with(mach_format::SIDECAR_DIR)) {
            return Err(HubError::IsPack { repo: request.repo.clone() }.into());
        }
        let (mut weights, texts): (Vec<&RemoteFile>, Vec<&RemoteFile>) = files.into_iter().partition(|f| f.path.ends_with(".safetensors"));
        // Whatever the order of the listing, so that another run takes the same one.
        weights.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let downloaded = AtomicU64::new(index_bytes + fetch_all(&shared, request, &listing.commit, &texts)?);
        let outlines = out.join(OUTLINE);
        fs::create_dir_all(&outlines).map_err(HubError::io(format!("create {}", outlines.display())))?;
        for file in &texts {
            let (from, to) = (cache.blob(&file.hash), outlines.join(&file.path));
            fs::copy(&from, &to).map_err(HubError::io(format!("copy {} to {}", from.display(), to.display())))?;
        }
        in_parallel(request.jobs, weights.len(), &stop, |i| {
            let path = outlines.join(&weights[i].path);
            if !path.exists() {
                downloaded
                    .fetch_add(outline(&shared, &client.file_url(&request.repo, &listing.commit, &weights[i].path), weights[i], &path)?, Ordering::Relaxed);
            }
            Ok(())
        })?;
        let shards = Shards { cache: &cache, outlines: &outlines, files: &weights, bits: pack.bits };
        let files = shards.open().inspect_err(|_| {
            // What cannot be packed leaves nothing behind.
            let _ = fs::remove_dir_all(&outlines);
            let _ = fs::remove_dir(&out);
        })?;
        let config = fs::read(outlines.join("config.json")).map_err(HubError::io(format!("read {}", outlines.join("config.json").display())))?;
        let source = Fingerprint::of_hashes(&config, weights.iter().map(|f| (f.path.as_str(), f.hash.hex())));
        let job = PackJob::new(files.checkpoint(), &files.pack_plan(pack.bits)?, source)?;
        let of_pieces = shards.of_pieces(files.checkpoint(), &job);
        drop(files);
        let missing = job.missing_bytes(&out)?;
        fs::write(out.join(ORIGIN), format!("{origin:#}\n")).map_err(HubError::io(format!("write {}", out.join(ORIGIN).display())))?;
        progress(PullEvent::PackTotal(job.bytes()));
        let writer = job.start(&out, &mut |bytes| progress(PullEvent::Packed(bytes)))?;

        let todo: Vec<&[usize]> = (0..of_pieces.len()).filter(|&p| !writer.is_done(p)).map(|p| of_pieces[p].as_slice()).collect();
        let places = shards.places(&todo)?;
        let plan = schedule(&todo, &places);
        let in_flight = plan.need.iter().copied().max().unwrap_or(0).max(pack.shards_in_flight);
        self.check_room(&out, missing, shards.room(&places, &plan, in_flight), in_flight)?;
        if in_flight > pack.shards_in_flight {
            progress(PullEvent::Note("more-shards-in-flight", why_more(&writer, &of_pieces, pack.shards_in_flight, in_flight)));
        }
        progress(PullEvent::Total(plan.order.iter().map(|&s| weights[s].size).sum()));
        let shared = Shared { progress, ..shared };
        let turns = Turns::new(&plan, &places, pack.shards_in_flight);
        let mut packing = Packing::new(&shards, &places, &of_pieces, writer, &turns);
        let url = |s: usize| client.file_url(&request.repo, &listing.commit, &weights[s].path);
        packing.all(request.jobs.min(in_flight), &shared, &url)?;
        let (writer, came) = packing.done();
        let report = writer.finish(shards.open()?.checkpoint())?;
        fs::remove_dir_all(&outlines).map_err(HubError::io(format!("remove {}", outlines.display())))?;
        let shown = cache.shown();
        texts.iter().filter(|f| !shown.contains(OsStr::new(f.hash.hex()))).try_for_each(|f| cache.remove(&f.hash))?;
        Ok(PulledPack {
            path: out,
            commit: listing.commit.clone(),
            shards: plan.order.len(),
            in_flight,
            downloaded: downloaded.into_inner() + came,
            report: Some(report),
        })
    }

    /// Whether the drives hold what is to come: so many bytes of the pack, and of the shards in flight.
    fn check_room(&self, out: &Path, pack: u64, shards: u64, in_flight: usize) -> Result<(), HubError> {
        let device = |path: &Path| path.ancestors().find_map(|p| fs::metadata(p).ok()).map(|m| m.dev());
        let of_pack = format!("{} for the pack", size(pack));
        let of_shards = format!("{} for {in_flight} shards at a time", size(shards));
        let wanted = if device(out) == device(&self.cache) {
            vec![(out, pack + shards, format!("{of_pack}, {of_shards}"))]
        } else {
            vec![(out, pack, of_pack), (self.cache.as_path(), shards, of_shards)]
        };
        for (place, need, what) in wanted {
            // Where it cannot be asked, writing will tell.
            if let Ok(free) = mach_format::free_space(place)
                && free < need
            {
                return Err(HubError::NoRoom { place: place.to_owned(), free: size(free), need: size(need), what });
            }
        }
        Ok(())
    }
}

/// What a pack says of its source.
fn origin(request: &PullRequest, pack: &PackRequest, commit: &str) -> Value {
    let (bits, group) = pack.bits.unzip();
    json!({ "repo": request.repo, "revision": request.revision, "commit": commit, "bits": bits, "group_size": group })
}

fn origin_in(out: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(out.join(ORIGIN)).ok()?).ok()
}

/// Names of revisions move; what they stand for decides.
fn same_origin(a: &Value, b: &Value) -> bool {
    ["repo", "commit", "bits", "group_size"].iter().all(|key| a[key] == b[key])
}

fn other(request: &PullRequest, out: &Path, there: &str) -> Error {
    HubError::OtherPack { place: out.to_owned(), repo: request.repo.clone(), there: there.to_owned() }.into()
}

/// A pack that is on this machine.
fn offline(cache: &RepoCache, request: &PullRequest, pack: &PackRequest) -> Result<PulledPack, HubError> {
    let place = pack.out.clone().unwrap_or_else(|| cache.packs());
    let candidates = match &pack.out {
        Some(out) => vec![out.clone()],
        None => fs::read_dir(&place).into_iter().flatten().flatten().map(|e| e.path()).collect(),
    };
    for path in candidates.into_iter().filter(|path| path.join("config.json").exists()) {
        let Some(there) = origin_in(&path) else { continue };
        let commit = there["commit"].as_str().unwrap_or_default().to_owned();
        let named = commit == request.revision || there["revision"] == request.revision.as_str();
        if named && same_origin(&there, &origin(request, pack, &commit)) {
            return Ok(PulledPack { path, commit, shards: 0, in_flight: 0, downloaded: 0, report: None });
        }
    }
    Err(HubError::OfflinePack { repo: request.repo.clone(), revision: request.revision.clone(), place })
}

/// Why more shards must be on the disk than was asked for.
fn why_more(writer: &PackWriter, of_pieces: &[Vec<usize>], asked: usize, in_flight: usize) -> String {
    let widest = (0..of_pieces.len()).filter(|&p| !writer.is_done(p)).max_by_key(|&p| of_pieces[p].len());
    let why = match widest.map(|p| (&writer.pieces()[p], of_pieces[p].len())) {
        Some((piece, n)) if n > asked => match piece.layer {
            Some(layer) => format!("layer {layer} lies in {n} shards"),
            None => format!("{} lies in {n} shards", piece.tensors.first().map_or("a weight", String::as_str)),
        },
        _ => "its layers lie scattered over the shards".to_owned(),
    };
    format!("{why}, so up to {in_flight} are on the disk at a time instead of {asked}")
}
