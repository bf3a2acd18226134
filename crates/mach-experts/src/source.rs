//! Where records come from: the expert sidecar, or the tensors of a plain checkpoint packed on the way.

use std::path::PathBuf;

use mach_backend::Part;
use mach_format::{DirectFile, LayerPlan, ReadMode, RecordLayout, Sidecar, pack_gate_up_into};

use crate::error::ExpertError;

/// One expert of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Index among the MoE layers.
    pub layer: usize,
    /// Expert id.
    pub expert: usize,
}

/// Reads records into slots. Called from several reader threads at once.
pub trait RecordSource: Send + Sync {
    /// MoE layers.
    fn layers(&self) -> usize;
    /// Experts per layer.
    fn experts(&self) -> usize;
    /// How experts of a layer lie in a slot.
    fn layout(&self, layer: usize) -> &RecordLayout;
    /// Reads the parts of `key` into `buffers` (gate|up, down; the part not asked for is empty) and returns the bytes
    /// read from the drive.
    ///
    /// # Errors
    /// Failed reads and wrong checksums.
    fn read(&self, key: Key, part: Part, buffers: [&mut [u8]; 2]) -> Result<u64, ExpertError>;
    /// `sidecar` or `checkpoint`, for the signal line.
    fn kind(&self) -> &'static str;
    /// Whether reads go past the page cache.
    fn direct(&self) -> bool;

    /// Part capacities that hold the records of every layer.
    fn part_bytes(&self) -> [usize; 2] {
        (0..self.layers()).map(|l| self.layout(l).part_bytes).fold([0; 2], |a, b| [a[0].max(b[0]), a[1].max(b[1])])
    }
}

/// Records of an expert sidecar, read whole and checked on every read.
pub struct SidecarSource {
    sidecar: Sidecar,
    files: Vec<DirectFile>,
    experts: usize,
}

impl SidecarSource {
    /// Opens the layer files.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(sidecar: Sidecar) -> Result<Self, ExpertError> {
        let files = sidecar.layers().iter().map(|l| DirectFile::open(&l.path)).collect::<Result<Vec<_>, _>>()?;
        let experts = sidecar.layers().first().map_or(0, |l| l.experts());
        Ok(Self { sidecar, files, experts })
    }
}

impl RecordSource for SidecarSource {
    fn layers(&self) -> usize {
        self.files.len()
    }

    fn experts(&self) -> usize {
        self.experts
    }

    fn layout(&self, layer: usize) -> &RecordLayout {
        &self.sidecar.layers()[layer].layout
    }

    fn read(&self, key: Key, part: Part, buffers: [&mut [u8]; 2]) -> Result<u64, ExpertError> {
        let layer = &self.sidecar.layers()[key.layer];
        let file = &self.files[key.layer];
        let size = layer.layout.part_bytes;
        let [a, b] = buffers;
        // Slots are as large as the largest record of any layer.
        let (a, b) = match part {
            Part::Both => (&mut a[..size[0]], &mut b[..size[1]]),
            Part::GateUp => (&mut a[..size[0]], b),
            Part::Down => (a, &mut b[..size[1]]),
        };
        let offset = layer.offset(key.expert, usize::from(part == Part::Down));
        file.read_exact_at(offset, [&mut *a, &mut *b]).map_err(|source| ExpertError::Read {
            layer: layer.layer,
            expert: key.expert,
            path: file.path().to_owned(),
            source,
        })?;
        for (i, (bytes, part)) in [(&*a, "gate|up"), (&*b, "down")].into_iter().enumerate() {
            if !bytes.is_empty() {
                let damaged = |_| ExpertError::Checksum { layer: layer.layer, expert: key.expert, part, path: file.path().to_owned() };
                layer.check(key.expert, i, bytes).map_err(damaged)?;
            }
        }
        Ok((a.len() + b.len()) as u64)
    }

    fn kind(&self) -> &'static str {
        "sidecar"
    }

    fn direct(&self) -> bool {
        self.files.iter().all(|f| f.mode() == ReadMode::Direct)
    }
}

/// Records packed from the tensors of a checkpoint while they are read.
pub struct CheckpointSource {
    layers: Vec<(LayerPlan, RecordLayout)>,
    experts: usize,
    path: PathBuf,
}

impl CheckpointSource {
    /// A source over the experts' tensors, one entry per MoE layer.
    pub fn new(path: PathBuf, experts: usize, layers: Vec<LayerPlan>) -> Self {
        let with_layout = |l: LayerPlan| {
            let layout = RecordLayout::new(l.gate.expert(0).layout(), l.down.expert(0).layout());
            // The bank is the cache: pages of experts would only push others out.
            let l = LayerPlan { gate: l.gate.past_cache(), up: l.up.past_cache(), down: l.down.past_cache(), ..l };
            (l, layout)
        };
        Self { layers: layers.into_iter().map(with_layout).collect(), experts, path }
    }

    /// Where the checkpoint is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl RecordSource for CheckpointSource {
    fn layers(&self) -> usize {
        self.layers.len()
    }

    fn experts(&self) -> usize {
        self.experts
    }

    fn layout(&self, layer: usize) -> &RecordLayout {
        &self.layers[layer].1
    }

    fn read(&self, key: Key, part: Part, [a, b]: [&mut [u8]; 2]) -> Result<u64, ExpertError> {
        let (layer, layout) = &self.layers[key.layer];
        let mut bytes = 0;
        if part != Part::Down {
            bytes += pack_gate_up_into(&layer.gate.expert(key.expert), &layer.up.expert(key.expert), a)?;
        }
        if part != Part::GateUp {
            let down = layer.down.expert(key.expert);
            down.pack_into(b, layout.down.tile_bytes())?;
            bytes += down.bytes();
        }
        Ok(bytes)
    }

    fn kind(&self) -> &'static str {
        "checkpoint"
    }

    fn direct(&self) -> bool {
        self.layers.iter().all(|(layer, _)| [&layer.gate, &layer.up, &layer.down].iter().all(|matrix| matrix.is_direct()))
    }
}
