//! Finding the routed experts: the sidecar that was asked for, the one beside the checkpoint, or its own tensors.

use std::path::Path;
use std::sync::Arc;

use mach_experts::{CheckpointSource, RecordSource, SidecarSource};
use mach_format::{FormatError, Sidecar, fingerprint};

use crate::ModelError;
use crate::spec::MoeSpec;
use crate::tensors::Resolved;

/// Opens the experts of a model: `sidecar` if given, else `MODEL/expert_sidecar` if it is there, else the tensors of the
/// checkpoint. A sidecar that is there but not valid is an error, never a silent slow path. `None` for a model without
/// routed experts.
///
/// # Errors
/// An invalid sidecar, one of another checkpoint or shape, a pack without one.
pub fn open_experts(files: &Resolved, sidecar: Option<&Path>) -> Result<Option<Arc<dyn RecordSource>>, ModelError> {
    let moe: Vec<(usize, &MoeSpec)> = files.spec().moe_layers().collect();
    if moe.is_empty() {
        return Ok(None);
    }
    let ck = files.checkpoint();
    let beside = ck.sidecar_dir();
    let dir = sidecar.or_else(|| beside.is_dir().then_some(&beside));
    let Some(dir) = dir else {
        let Some(layers) = files.experts() else {
            return Err(ModelError::NoExperts {
                path: ck.path().display().to_string(),
                reason: "there is no expert_sidecar folder; copy the whole pack".to_owned(),
            });
        };
        let experts = moe[0].1.router.experts;
        return Ok(Some(Arc::new(CheckpointSource::new(ck.path().to_owned(), experts, layers))));
    };
    let opened = match Sidecar::open(dir, &fingerprint(ck)?) {
        // A build that was interrupted beside a checkpoint that can do without: say so only where it was asked for.
        Err(FormatError::SidecarMissing { .. }) if sidecar.is_none() && files.experts().is_some() => {
            let layers = files.experts().unwrap_or_default();
            return Ok(Some(Arc::new(CheckpointSource::new(ck.path().to_owned(), moe[0].1.router.experts, layers))));
        }
        other => other?,
    };
    let hidden = files.spec().hidden;
    for ((index, spec), layer) in moe.iter().zip(opened.layers()) {
        let (half, down) = (layer.layout.gate_up.half, layer.layout.down);
        let expected = (*index, spec.router.experts, spec.inner, hidden);
        let got = (layer.layer, layer.experts(), half.rows, half.cols);
        if expected != got || (down.rows, down.cols) != (hidden, spec.inner) {
            let show = |(l, e, i, h): (usize, usize, usize, usize)| format!("layer {l}: {e} experts [{i}, {h}]");
            return Err(ModelError::Shape { name: dir.display().to_string(), expected: show(expected), got: show(got) });
        }
    }
    if moe.len() != opened.layers().len() {
        let show = |n: usize| format!("{n} MoE layers");
        return Err(ModelError::Shape { name: dir.display().to_string(), expected: show(moe.len()), got: show(opened.layers().len()) });
    }
    Ok(Some(Arc::new(SidecarSource::open(opened)?)))
}
