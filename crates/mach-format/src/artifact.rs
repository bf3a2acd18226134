//! Building artifacts from a checkpoint: what a family says that they consist of, and the sidecar beside it. Packs are in
//! [`pack`](crate::pack).

use std::path::Path;

use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::fingerprint::fingerprint;
use crate::format::WeightFormat;
use crate::matrix::{Matrix, RowPick};
use crate::sidecar::{LayerOutcome, LayerShape, Manifest, RecordLayout, SidecarPlan, SidecarWriter};

/// Where one projection of a layer's experts lies.
#[derive(Clone)]
pub enum ExpertSource {
    /// A stack `[experts, rows, cols]`.
    Stacked(Matrix),
    /// A part of the rows of every matrix of a stack: the gate or up half of a fused pair.
    StackedRows(Matrix, RowPick),
    /// One matrix per expert.
    Each(Vec<Matrix>),
}

impl ExpertSource {
    /// Number of experts.
    pub fn experts(&self) -> usize {
        match self {
            Self::Stacked(m) | Self::StackedRows(m, _) => m.leading().unwrap_or(0),
            Self::Each(all) => all.len(),
        }
    }

    /// Names of all tensors that they consist of.
    pub fn tensors(&self) -> Vec<String> {
        match self {
            Self::Stacked(m) | Self::StackedRows(m, _) => m.tensors().to_vec(),
            Self::Each(all) => all.iter().flat_map(|m| m.tensors().to_vec()).collect(),
        }
    }

    /// The matrix of expert `e`.
    ///
    /// # Panics
    /// When `e` is outside.
    pub fn expert(&self, e: usize) -> Matrix {
        match self {
            Self::Stacked(m) => m.expert(e),
            Self::StackedRows(m, rows) => m.expert(e).pick(*rows),
            Self::Each(all) => all[e].clone(),
        }
    }

    /// See [`Matrix::past_cache`].
    pub fn past_cache(self) -> Self {
        match self {
            Self::Stacked(m) => Self::Stacked(m.past_cache()),
            Self::StackedRows(m, rows) => Self::StackedRows(m.past_cache(), rows),
            Self::Each(all) => Self::Each(all.into_iter().map(Matrix::past_cache).collect()),
        }
    }

    /// See [`Matrix::is_direct`].
    pub fn is_direct(&self) -> bool {
        match self {
            Self::Stacked(m) | Self::StackedRows(m, _) => m.is_direct(),
            Self::Each(all) => all.iter().all(Matrix::is_direct),
        }
    }
}

/// The experts of one layer.
#[derive(Clone)]
pub struct LayerPlan {
    /// Layer of the model.
    pub layer: usize,
    /// Gate projections `[inner, hidden]`.
    pub gate: ExpertSource,
    /// Up projections `[inner, hidden]`.
    pub up: ExpertSource,
    /// Down projections `[hidden, inner]`.
    pub down: ExpertSource,
}

/// What a checkpoint consists of, as its family knows.
#[derive(Clone)]
pub struct PackPlan {
    /// Family.
    pub model_type: String,
    /// MoE layers, ascending.
    pub experts: Vec<LayerPlan>,
    /// Format of the experts; `None` keeps that of the source.
    pub expert_format: Option<WeightFormat>,
    /// Modules (tensor names without `.weight`) of resident linears and embeddings, with the affine format they
    /// are quantised to; `None` keeps that of the source. Ignored by [`write_sidecar`].
    pub quantise: Vec<(String, Option<WeightFormat>)>,
    /// Full names of resident tensors that are copied as they are. Ignored by [`write_sidecar`].
    pub keep: Vec<String>,
}

/// Progress of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildProgress {
    /// Bytes of the output that are done.
    pub done: u64,
    /// Bytes of the output.
    pub total: u64,
}

/// What a build did.
#[derive(Clone, Debug)]
pub struct BuildReport {
    /// Manifest of the sidecar.
    pub manifest: Manifest,
    /// Layers that were written now.
    pub written: usize,
    /// Layers that an earlier build had finished.
    pub kept: usize,
    /// Bytes of the resident weights (0 when only the sidecar was built).
    pub resident_bytes: u64,
}

impl PackPlan {
    /// Layouts of the sidecar, with every expert's shape checked.
    ///
    /// # Errors
    /// Experts of different shapes or numbers, formats that do not fit.
    pub fn sidecar(&self) -> Result<SidecarPlan, FormatError> {
        let experts = self.experts.first().map_or(0, |l| l.gate.experts());
        let mut layers: Vec<LayerShape> = Vec::with_capacity(self.experts.len());
        for plan in &self.experts {
            if layers.last().is_some_and(|l| l.layer >= plan.layer) {
                return Err(plan.wrong("layers are not ascending"));
            }
            layers.push(self.layer_shape(plan, experts)?);
        }
        Ok(SidecarPlan { model_type: self.model_type.clone(), experts, layers })
    }

    /// The record of a layer, with every expert's shape checked.
    fn layer_shape(&self, plan: &LayerPlan, experts: usize) -> Result<LayerShape, FormatError> {
        if [&plan.gate, &plan.up, &plan.down].iter().any(|s| s.experts() != experts) || experts == 0 {
            return Err(plan.wrong(&format!("not every projection has {experts} experts")));
        }
        let target = |m: Matrix| self.expert_format.map_or(Ok(m.layout()), |format| m.quantised_layout(format));
        let layout = RecordLayout::new(target(plan.gate.expert(0))?, target(plan.down.expert(0))?);
        let (half, down) = (layout.gate_up.half, layout.down);
        for e in 0..experts {
            if target(plan.gate.expert(e))? != half || target(plan.up.expert(e))? != half || target(plan.down.expert(e))? != down {
                return Err(plan.wrong(&format!("expert {e} has another shape or format than expert 0")));
            }
        }
        if (down.rows, down.cols) != (half.cols, half.rows) {
            return Err(plan.wrong("down does not fit gate and up"));
        }
        Ok(LayerShape { layer: plan.layer, layout })
    }

    /// Writes the layer of this number among those of the plan. `progress` gets bytes.
    pub(crate) fn write_layer(
        &self,
        number: usize,
        sidecar: &SidecarPlan,
        writer: &mut SidecarWriter,
        progress: &mut dyn FnMut(u64),
    ) -> Result<LayerOutcome, FormatError> {
        let (plan, shape) = (&self.experts[number], sidecar.layers[number]);
        if self.layer_shape(plan, sidecar.experts)? != shape {
            return Err(plan.wrong("it is not what it was when the build began"));
        }
        let layout = shape.layout;
        let pack = |m: Matrix, dst: &mut [u8], stride: usize| match self.expert_format {
            Some(format) if format != m.format() => m.pack_quantised_into(dst, stride, format),
            _ => m.pack_into(dst, stride),
        };
        let fill = |e: usize, gate_up: &mut [u8], down: &mut [u8]| {
            let tile = layout.gate_up.half.tile_bytes();
            pack(plan.gate.expert(e), gate_up, 2 * tile)?;
            pack(plan.up.expert(e), &mut gate_up[tile..], 2 * tile)?;
            pack(plan.down.expert(e), down, layout.down.tile_bytes())
        };
        let mut before = 0;
        writer.write_layer(plan.layer, fill, &mut |experts| {
            progress(((experts - before) * layout.stride()) as u64);
            before = experts;
        })
    }
}

impl LayerPlan {
    fn wrong(&self, reason: &str) -> FormatError {
        FormatError::Plan { reason: format!("layer {}: {reason}", self.layer) }
    }
}

/// Free space is examined before anything is written.
pub(crate) fn check_space(path: &Path, needed: u64) -> Result<(), FormatError> {
    let free = crate::disk::free_space(path)?;
    if needed > free {
        return Err(FormatError::DiskFull { path: path.to_owned(), needed, free });
    }
    Ok(())
}

/// Builds or completes the sidecar of `ck` in `dir` (usually `MODEL/expert_sidecar`).
///
/// # Errors
/// A plan that does not fit, values that cannot be quantised, no room, another build in the same place.
pub fn write_sidecar(ck: &Checkpoint, dir: &Path, plan: &PackPlan, progress: &mut dyn FnMut(BuildProgress)) -> Result<BuildReport, FormatError> {
    let sidecar = plan.sidecar()?;
    let source = fingerprint(ck)?;
    let total = sidecar.bytes();
    check_space(dir, sidecar.missing_bytes(dir, &source))?;
    let mut writer = SidecarWriter::create(dir, &source, sidecar.clone())?;
    let (mut done, mut written, mut kept) = (0, 0, 0);
    for number in 0..plan.experts.len() {
        let outcome = plan.write_layer(number, &sidecar, &mut writer, &mut |bytes| {
            done += bytes;
            progress(BuildProgress { done, total });
        })?;
        match outcome {
            LayerOutcome::Written => written += 1,
            LayerOutcome::Kept => kept += 1,
        }
    }
    Ok(BuildReport { manifest: writer.finish(&source)?, written, kept, resident_bytes: 0 })
}
