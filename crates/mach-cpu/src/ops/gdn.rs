//! Gated delta net: causal conv, gates, the delta rule, gated norm.

use mach_backend::{GdnSegment, GdnSpec, GdnWeights};

use super::linear::Scratch;
use super::{Context, Shared, State, grown, with_scratch};
use crate::kernels::{DeltaHead, LANES, MAX_TOKENS};
use crate::tensor::Tensor;

/// Most taps of the conv.
const MAX_TAPS: usize = 16;

/// Inputs are asked for so many rows before they are read: from row to row is further than the processor looks ahead.
const AHEAD: usize = 8;

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

/// Where head `head` of q, k and v begins, if a row has `k_dim` values for each of q and k and `v_dim` for each of v.
fn head_start(spec: &GdnSpec, head: usize, k_dim: usize, v_dim: usize) -> usize {
    let qk = head.min(2 * spec.k_heads);
    qk * k_dim + (head - qk) * v_dim
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

    let heads = 2 * spec.k_heads + spec.v_heads;
    // After the conv values lie head by head, as the delta rule reads them, and rows of heads are padded with zeros to whole vectors.
    let (k_room, v_room) = (dk.next_multiple_of(LANES), dv.next_multiple_of(LANES));
    let mixed_at = |head: usize, row: usize| head_start(spec, head, k_room, v_room) * rows + row * if head < 2 * spec.k_heads { k_room } else { v_room };
    let (mixed, gates) = grown(&mut scratch.values, mixed_at(heads, 0) + rows * 2 * spec.v_heads).split_at_mut(mixed_at(heads, 0));
    let (mixed, gates) = (Shared::new(mixed), Shared::new(gates));
    let gate_stride = 2 * spec.v_heads;

    // Conv, for some heads of q, k and v together: channels are independent, and a q or k head is normed as soon as it is there.
    let together = (parts.len() * heads).div_ceil(cx.pool.threads() * 4).clamp(1, heads);
    let groups = heads.div_ceil(together);
    cx.pool.run(parts.len() * groups, &|task| {
        let (part, group) = (&parts[task / groups], task % groups * together);
        let group = group..(group + together).min(heads);
        // SAFETY: a task has its channels of its sequence's rows and tail to itself.
        unsafe {
            // Input row `i` counted from the oldest row of the tail.
            let input = |i: usize| match i.checked_sub(taps - 1) {
                Some(row) => qkv.part(part.row + row, 1).as_ptr(),
                None => part.tail.at(i * channels).cast_const(),
            };
            for t in 0..part.rows {
                let mut x = [std::ptr::null(); MAX_TAPS];
                for (tap, x) in x[..taps].iter_mut().enumerate() {
                    *x = input(t + tap);
                }
                let ahead = qkv.part(part.row + (t + AHEAD).min(part.rows - 1), 1);
                for head in group.clone() {
                    let (first, n) = (head_start(spec, head, dk, dv), if head < 2 * spec.k_heads { dk } else { dv });
                    let to = mixed.at(mixed_at(head, part.row + t));
                    to.add(n).write_bytes(0, n.next_multiple_of(LANES) - n);
                    (cx.k.conv_silu)(w.conv.values().as_ptr(), channels, &x[..taps], first, n, ahead[first..].as_ptr(), to);
                    if head < spec.k_heads {
                        (cx.k.l2_norm)(to, n, 1.0 / (dk as f32).sqrt());
                    } else if head < 2 * spec.k_heads {
                        (cx.k.l2_norm)(to, n, 1.0);
                    }
                }
            }
            let [first, last] = [group.start, group.end].map(|head| head_start(spec, head, dk, dv));
            for i in 0..taps - 1 {
                // Source rows lie after their place, so going upwards never overwrites one that is still needed.
                std::ptr::copy(input(part.rows + i).add(first), part.tail.at(i * channels + first), last - first);
            }
        }
    });
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
        // SAFETY: a task has its head of its sequence's state and of the output to itself.
        with_scratch(MAX_TOKENS * v_room, |o| unsafe {
            for first in (0..part.rows).step_by(MAX_TOKENS) {
                let (row, tokens) = (part.row + first, (part.rows - first).min(MAX_TOKENS));
                let at = |head: usize| mixed.at(mixed_at(head, row)).cast_const();
                (cx.k.delta_head)(&DeltaHead {
                    state: part.s.at(head * head_values(spec)),
                    columns: columns(spec),
                    k_dim: dk,
                    v_dim: dv,
                    tokens,
                    q: at(key),
                    k: at(spec.k_heads + key),
                    v: at(2 * spec.k_heads + head),
                    decay: gates.at(row * gate_stride + head).cast_const(),
                    beta: gates.at(row * gate_stride + spec.v_heads + head).cast_const(),
                    gate_stride,
                    out: o.as_mut_ptr(),
                });
                let gate = |t: usize| z.part(row + t.min(tokens - 1), 1)[head * dv..].as_ptr();
                for (t, o) in o.chunks_exact(v_room).take(tokens).enumerate() {
                    (cx.k.gated_norm)(o.as_ptr(), w.norm.values().as_ptr(), gate(t), dv, spec.eps, gate(t + AHEAD), out.at((row + t) * width + head * dv));
                }
            }
        });
    });
}
