//! Gated delta net: causal conv, gates, the delta rule, gated norm.

use mach_backend::{GdnSegment, GdnSpec, GdnWeights};

use super::linear::Scratch;
use super::{Context, Shared, State, grown};
use crate::kernels::{DeltaHead, LANES};
use crate::tensor::Tensor;

/// Most taps of the conv.
const MAX_TAPS: usize = 16;

/// Recurrent state of one layer of one sequence.
pub struct GdnState {
    /// The last `kernel − 1` rows before the conv, `[kernel − 1][channels]`, oldest first.
    tail: Vec<f32>,
    /// Per value head: blocks of [`columns`] state columns, each `[k_dim][columns]`, so that a block stays in L1 while
    /// tokens are looped over it.
    s: Tensor,
}

/// State columns per block.
fn columns(spec: &GdnSpec) -> usize {
    if spec.v_dim.next_multiple_of(LANES).is_multiple_of(2 * LANES) { 2 * LANES } else { LANES }
}

/// State values of one value head.
fn head_values(spec: &GdnSpec) -> usize {
    spec.k_dim * spec.v_dim.next_multiple_of(LANES)
}

impl GdnState {
    pub(crate) fn new(spec: &GdnSpec) -> Self {
        Self { tail: vec![0.0; (spec.kernel - 1) * spec.channels()], s: Tensor::zeroed(spec.v_heads, head_values(spec)) }
    }

    pub(crate) fn copy_from(&mut self, src: &Self) {
        self.tail.copy_from_slice(&src.tail);
        self.s.values_mut().copy_from_slice(src.s.values());
    }
}

/// One sequence's part of the call.
struct Part {
    row: usize,
    rows: usize,
    tail: Shared<f32>,
    s: Shared<f32>,
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn gdn(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &GdnSpec,
    w: &GdnWeights<'_, Tensor>,
    qkv: &Tensor,
    z: &Tensor,
    b: &Tensor,
    a: &Tensor,
    segments: &mut [GdnSegment<'_, State>],
    out: &mut Tensor,
) {
    let (channels, dk, dv, taps) = (spec.channels(), spec.k_dim, spec.v_dim, spec.kernel);
    let width = spec.v_heads * dv;
    assert!(spec.v_heads.is_multiple_of(spec.k_heads), "{} value heads over {} key heads", spec.v_heads, spec.k_heads);
    assert!((1..=MAX_TAPS).contains(&taps), "a conv of {taps} taps");
    assert!(
        qkv.cols() == channels && z.cols() == width && out.cols() == width && a.cols() == spec.v_heads && b.cols() == spec.v_heads,
        "shapes of a gated delta net"
    );
    assert!(w.conv.rows() == taps && w.conv.cols() == channels && w.norm.cols() == dv, "shapes of its weights");
    assert!(w.neg_exp_a.cols() == spec.v_heads && w.dt_bias.cols() == spec.v_heads, "shapes of its gates");
    let rows = segments.iter().map(|s| s.row + s.rows).max().unwrap_or(0);
    assert!([qkv, z, b, a, out].iter().all(|t| t.rows() >= rows), "{rows} rows of a gated delta net");
    let parts: Vec<Part> = segments
        .iter_mut()
        .map(|s| {
            let State::Gdn(state) = &mut *s.state else { panic!("the state of another layer") };
            assert!(
                state.tail.len() == (taps - 1) * channels && state.s.rows() == spec.v_heads && state.s.cols() == head_values(spec),
                "state of another shape"
            );
            Part { row: s.row, rows: s.rows, tail: Shared::new(&mut state.tail), s: Shared::new(state.s.values_mut()) }
        })
        .collect();

    let (mixed, gates) = grown(&mut scratch.values, rows * (channels + 2 * spec.v_heads)).split_at_mut(rows * channels);
    let (mixed, gates) = (Shared::new(mixed), Shared::new(gates));
    let gate_stride = 2 * spec.v_heads;

    // Conv, per head of q, k and v: channels are independent, and a q or k head is normed as soon as it is there.
    let heads = 2 * spec.k_heads + spec.v_heads;
    let conv = |task: usize| {
        let (part, head) = (&parts[task / heads], task % heads);
        let (first, n) = if head < 2 * spec.k_heads { (head * dk, dk) } else { (2 * spec.k_heads * dk + (head - 2 * spec.k_heads) * dv, dv) };
        // SAFETY: a task has its channels of its sequence's rows and tail to itself.
        unsafe {
            // Input row `i` counted from the oldest row of the tail.
            let input = |i: usize| match i.checked_sub(taps - 1) {
                Some(row) => qkv.part(part.row + row, 1)[first..].as_ptr(),
                None => part.tail.at(i * channels + first).cast_const(),
            };
            for t in 0..part.rows {
                let mut x = [std::ptr::null(); MAX_TAPS];
                for (tap, x) in x[..taps].iter_mut().enumerate() {
                    *x = input(t + tap);
                }
                let to = mixed.at((part.row + t) * channels + first);
                (cx.k.conv_silu)(w.conv.values()[first..].as_ptr(), channels, &x[..taps], n, to);
                if head < spec.k_heads {
                    (cx.k.l2_norm)(to, n, 1.0 / (dk as f32).sqrt());
                } else if head < 2 * spec.k_heads {
                    (cx.k.l2_norm)(to, n, 1.0);
                }
            }
            for i in 0..taps - 1 {
                // Source rows lie after their place, so going upwards never overwrites one that is still needed.
                std::ptr::copy(input(part.rows + i), part.tail.at(i * channels + first), n);
            }
        }
    };
    let size = (parts.len() * heads).div_ceil(cx.pool.threads() * 4);
    cx.pool.ranges(parts.len() * heads, size, &|range| range.for_each(conv));
    for part in &parts {
        cx.rows(part.rows, 32 * spec.v_heads, &|t| {
            let row = part.row + t;
            // SAFETY: shapes checked; each row has its own gates.
            unsafe {
                (cx.k.gates)(
                    a.part(row, 1).as_ptr(),
                    b.part(row, 1).as_ptr(),
                    w.neg_exp_a.values().as_ptr(),
                    w.dt_bias.values().as_ptr(),
                    spec.v_heads,
                    gates.at(row * gate_stride),
                    gates.at(row * gate_stride + spec.v_heads),
                );
            }
        });
    }

    let out = Shared::new(out.values_mut());
    cx.pool.run(parts.len() * spec.v_heads, &|task| {
        let (part, head) = (&parts[task / spec.v_heads], task % spec.v_heads);
        let key = spec.key_head(head);
        let row = part.row;
        // SAFETY: a task has its head of its sequence's state and of the output to itself.
        unsafe {
            let at = |channel: usize| mixed.at(row * channels + channel).cast_const();
            (cx.k.delta_head)(&DeltaHead {
                state: part.s.at(head * head_values(spec)),
                columns: columns(spec),
                k_dim: dk,
                v_dim: dv,
                tokens: part.rows,
                q: at(key * dk),
                k: at((spec.k_heads + key) * dk),
                v: at(2 * spec.k_heads * dk + head * dv),
                qkv_stride: channels,
                decay: gates.at(row * gate_stride + head).cast_const(),
                beta: gates.at(row * gate_stride + spec.v_heads + head).cast_const(),
                gate_stride,
                out: out.at(row * width + head * dv),
                out_stride: width,
            });
            for t in 0..part.rows {
                let z = z.part(row + t, 1)[head * dv..].as_ptr();
                (cx.k.gated_norm)(out.at((row + t) * width + head * dv), w.norm.values().as_ptr(), z, dv, spec.eps);
            }
        }
    });
}
