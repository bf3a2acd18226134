//! Softmax attention of one query row over one merge segment of keys.

use mach_backend::{KV_BLOCK, KvType, MERGE_SEGMENT};

use super::math::{self, load_n, store_n};
use super::rows::exp_sum;
use super::simd::{LANES, Simd};

/// Blocks of one merge segment.
const BLOCKS: usize = MERGE_SEGMENT / KV_BLOCK;

/// Query heads that share one pass over keys and values.
pub(crate) const MAX_HEADS: usize = 4;

/// One query row: up to four heads of one GQA group over the keys `from..to` of a segment.
pub(crate) struct SegmentArgs {
    pub ty: KvType,
    /// The segment's blocks for the kv head (keys, then values `v_offset` elements on), as many as `to` needs.
    pub blocks: [*const u8; BLOCKS],
    pub v_offset: usize,
    pub head_dim: usize,
    /// Visible keys, counted from the segment's first.
    pub from: usize,
    pub to: usize,
    pub scale: f32,
    pub heads: usize,
    pub q: [*const f32; MAX_HEADS],
    /// Where each head's partial result goes: maximum, sum, then `head_dim` rounded up to 16 values.
    pub out: [*mut f32; MAX_HEADS],
}

/// Values of a partial result before its channels.
pub(crate) const PARTIAL_HEADER: usize = 16;

#[inline(always)]
unsafe fn load<V: Simd, const F16: bool>(p: *const u8, at: usize) -> V::F {
    if F16 { V::load_f16(p.cast::<u16>().add(at)) } else { V::load(p.cast::<f32>().add(at)) }
}

/// Scores, softmax and value sums of a segment. A score is one chain over the channels, a channel's sum one chain over
/// the keys, so neither depends on what is computed beside it.
///
/// # Safety
/// The pointers of `a` are valid for its shape; `from < to <= 256`.
#[inline(always)]
pub(crate) unsafe fn segment<V: Simd>(a: &SegmentArgs) {
    match (a.ty, a.heads) {
        (KvType::F16, 1) => segment_heads::<V, true, 1>(a),
        (KvType::F16, 2) => segment_heads::<V, true, 2>(a),
        (KvType::F16, 3) => segment_heads::<V, true, 3>(a),
        (KvType::F16, _) => segment_heads::<V, true, 4>(a),
        (KvType::F32, 1) => segment_heads::<V, false, 1>(a),
        (KvType::F32, 2) => segment_heads::<V, false, 2>(a),
        (KvType::F32, 3) => segment_heads::<V, false, 3>(a),
        (KvType::F32, _) => segment_heads::<V, false, 4>(a),
    }
}

#[inline(always)]
unsafe fn segment_heads<V: Simd, const F16: bool, const R: usize>(a: &SegmentArgs) {
    let mut p = [[0.0_f32; MERGE_SEGMENT]; R];
    for key in (a.from / LANES * LANES..a.to).step_by(LANES) {
        let (block, at) = (a.blocks[key / KV_BLOCK], key % KV_BLOCK);
        let mut acc = [V::splat(0.0); R];
        for d in 0..a.head_dim {
            let k = load::<V, F16>(block, d * KV_BLOCK + at);
            for r in 0..R {
                acc[r] = V::fma(k, V::splat(*a.q[r].add(d)), acc[r]);
            }
        }
        for r in 0..R {
            V::store(p[r].as_mut_ptr().add(key), V::mul(acc[r], V::splat(a.scale)));
        }
    }
    for r in 0..R {
        // Keys that are not visible take no part: they leave the maximum alone and get probability 0, and the sum runs
        // over lanes by absolute position, so a key's place in it is fixed.
        let mut max = f32::NEG_INFINITY;
        for &s in &p[r][a.from..a.to] {
            max = if s > max || s.is_nan() { s } else { max };
        }
        let first = a.from / LANES * LANES;
        let n = a.to.next_multiple_of(LANES) - first;
        let at = p[r].as_mut_ptr().add(first);
        exp_sum::<V>(at, n, max);
        p[r][first..a.from].fill(0.0);
        p[r][a.to..].fill(0.0);
        let mut total = V::splat(0.0);
        for c in (first..first + n).step_by(LANES) {
            total = V::add(total, V::load(p[r].as_ptr().add(c)));
        }
        *a.out[r] = max;
        *a.out[r].add(1) = V::sum(total);
    }
    for chunk in 0..a.head_dim.div_ceil(LANES) {
        let mut acc = [V::splat(0.0); R];
        let values = a.v_offset + chunk * KV_BLOCK * LANES;
        for key in a.from..a.to {
            let v = load::<V, F16>(a.blocks[key / KV_BLOCK], values + key % KV_BLOCK * LANES);
            for r in 0..R {
                acc[r] = V::fma(V::splat(p[r][key]), v, acc[r]);
            }
        }
        for r in 0..R {
            V::store(a.out[r].add(PARTIAL_HEADER + chunk * LANES), acc[r]);
        }
    }
}

/// Merges partial `from` into `into`: both are rescaled to the larger maximum.
///
/// # Safety
/// Both are partial results of `head_dim` channels.
#[inline(always)]
pub(crate) unsafe fn merge<V: Simd>(into: *mut f32, from: *const f32, head_dim: usize) {
    let max = if *from > *into || (*from).is_nan() { *from } else { *into };
    let mut factors = [0.0_f32; LANES];
    (factors[0], factors[1]) = (*into - max, *from - max);
    V::store(factors.as_mut_ptr(), math::exp::<V>(V::load(factors.as_ptr())));
    let (old, new) = (V::splat(factors[0]), V::splat(factors[1]));
    *into = max;
    *into.add(1) = *into.add(1) * factors[0] + *from.add(1) * factors[1];
    for c in (PARTIAL_HEADER..PARTIAL_HEADER + head_dim).step_by(LANES) {
        V::store(into.add(c), V::fma(V::load(into.add(c)), old, V::mul(V::load(from.add(c)), new)));
    }
}

/// `out = channels / sum`, times `sigmoid(gate)` where there is a gate.
///
/// # Safety
/// `partial` is a partial result of `head_dim` channels; `gate` (or null) and `out` have `head_dim` values.
#[inline(always)]
pub(crate) unsafe fn finish<V: Simd>(partial: *const f32, gate: *const f32, head_dim: usize, out: *mut f32) {
    let sum = V::splat(*partial.add(1));
    for c in (0..head_dim).step_by(LANES) {
        let mut v = V::div(V::load(partial.add(PARTIAL_HEADER + c)), sum);
        if !gate.is_null() {
            v = V::mul(v, math::sigmoid::<V>(load_n::<V>(gate.add(c), head_dim - c)));
        }
        store_n::<V>(out.add(c), v, head_dim - c);
    }
}
