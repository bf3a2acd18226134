//! Attention: preparing and storing keys, and softmax over merge segments.

use mach_backend::{AttentionSpec, KV_BLOCK, MERGE_SEGMENT, QkNormRope, Segment};

use super::linear::Scratch;
use super::{Context, Shared, grown, with_scratch};
use crate::kernels::{LANES, MAX_HEADS, PARTIAL_HEADER, SegmentArgs};
use crate::kv::Kv;
use crate::tensor::Tensor;

/// Query rows of one kv head that one thread takes together, so that a segment's keys are read from cache.
const ROW_GROUP: usize = 8;

fn query_stride(spec: &AttentionSpec) -> usize {
    spec.head_dim * if spec.gate { 2 } else { 1 }
}

/// The segment and row of the `i`-th row of all segments.
fn locate<'s, 'a>(segments: &'s [Segment<'a>], mut i: usize) -> (&'s Segment<'a>, usize) {
    for s in segments {
        if i < s.rows {
            return (s, i);
        }
        i -= s.rows;
    }
    panic!("row {i} beyond the last segment");
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn qkv_store(
    cx: Context<'_>,
    spec: &AttentionSpec,
    prep: &QkNormRope<'_, Tensor>,
    q: &mut Tensor,
    k: &mut Tensor,
    v: Option<&Tensor>,
    segments: &[Segment<'_>],
    kv: &mut Kv,
) {
    let (d, stride) = (spec.head_dim, query_stride(spec));
    assert!(q.cols() == spec.heads * stride && k.cols() == spec.kv_heads * d && v.is_none_or(|v| v.cols() == k.cols()), "shapes of q, k, v");
    assert!(kv.spec.kv_heads == spec.kv_heads && kv.spec.head_dim == d, "the KV store has another shape");
    assert!(2 * prep.half <= d && prep.rope.cols() == 2 * prep.half, "shape of the rotary table");
    assert!([prep.q_norm, prep.k_norm].into_iter().flatten().all(|w| w.cols() == d), "shape of the q/k norms");
    for s in segments {
        let end = s.row + s.rows;
        assert!(end <= q.rows() && end <= k.rows() && v.is_none_or(|v| end <= v.rows()) && end <= prep.rope.rows(), "rows of a segment");
    }
    let (q_cols, k_cols) = (q.cols(), k.cols());
    let (q, k) = (Shared::new(q.values_mut()), Shared::new(k.values_mut()));
    let kv = &*kv;
    let rows = segments.iter().map(|s| s.rows).sum();
    let ones = vec![1.0; d];
    cx.rows(rows, q_cols + 2 * k_cols, &|i| {
        let (s, i) = locate(segments, i);
        let (row, pos) = (s.row + i, s.pos + i);
        // SAFETY: shapes checked above; each row and each position is handled once, and `kv` is exclusively borrowed.
        unsafe {
            let prepare = |x: *mut f32, norm: Option<&Tensor>| {
                if let Some(w) = norm {
                    (cx.k.rms_norm)(x, w.values().as_ptr(), d, prep.eps, x);
                }
                (cx.k.rope)(x, prep.rope.part(row, 1).as_ptr(), prep.half);
            };
            for head in 0..spec.heads {
                prepare(q.at(row * q_cols + head * stride), prep.q_norm);
            }
            for head in 0..spec.kv_heads {
                let at = k.at(row * k_cols + head * d);
                with_scratch(d, |value| {
                    // Before the key is normed in place, of which it may be a copy.
                    match v {
                        Some(v) => value.copy_from_slice(&v.part(row, 1)[head * d..][..d]),
                        None => value.copy_from_slice(std::slice::from_raw_parts(at, d)),
                    }
                    if prep.v_norm {
                        (cx.k.rms_norm)(value.as_ptr(), ones.as_ptr(), d, prep.eps, value.as_mut_ptr());
                    }
                    prepare(at, prep.k_norm);
                    kv.store(s.blocks[pos / KV_BLOCK], pos % KV_BLOCK, head, std::slice::from_raw_parts(at, d), value);
                });
            }
        }
    });
}

/// One query row and kv head.
struct Query<'a> {
    segment: &'a Segment<'a>,
    row: usize,
    pos: usize,
    kv_head: usize,
}

/// What all tasks of one call share.
struct Call<'a> {
    cx: Context<'a>,
    spec: &'a AttentionSpec,
    q: &'a Tensor,
    sinks: Option<&'a Tensor>,
    kv: &'a Kv,
    out: Shared<f32>,
}

impl Call<'_> {
    /// Query heads per kv head.
    fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    /// Values of one partial result.
    fn partial(&self) -> usize {
        PARTIAL_HEADER + self.spec.head_dim.next_multiple_of(LANES)
    }

    /// First visible key of a query at `pos`.
    fn first_key(&self, pos: usize) -> usize {
        self.spec.window.map_or(0, |w| (pos + 1).saturating_sub(w))
    }

    /// First and last merge segment that a query sees.
    fn ends(&self, query: &Query<'_>) -> (usize, usize) {
        (self.first_key(query.pos) / MERGE_SEGMENT, query.pos / MERGE_SEGMENT)
    }

    fn query_head(&self, query: &Query<'_>, head: usize) -> *const f32 {
        self.q.part(query.row, 1)[(query.kv_head * self.group() + head) * query_stride(self.spec)..].as_ptr()
    }

    /// Partial results of all heads of the group for merge segment `index`, to `out` one after another.
    fn segment(&self, query: &Query<'_>, index: usize, out: &mut [f32]) {
        let start = index * MERGE_SEGMENT;
        let (from, to) = (self.first_key(query.pos).saturating_sub(start), (query.pos + 1 - start).min(MERGE_SEGMENT));
        let mut blocks = [std::ptr::null(); MERGE_SEGMENT / KV_BLOCK];
        for (b, at) in blocks.iter_mut().enumerate().take(to.div_ceil(KV_BLOCK)).skip(from / KV_BLOCK) {
            *at = self.kv.head(query.segment.blocks[start / KV_BLOCK + b], query.kv_head).cast_const();
        }
        let partial = self.partial();
        for first in (0..self.group()).step_by(MAX_HEADS) {
            let heads = (self.group() - first).min(MAX_HEADS);
            let mut q = [std::ptr::null(); MAX_HEADS];
            let mut to_heads = [std::ptr::null_mut(); MAX_HEADS];
            for h in 0..heads {
                q[h] = self.query_head(query, first + h);
                to_heads[h] = out[(first + h) * partial..][..partial].as_mut_ptr();
            }
            let args = SegmentArgs {
                ty: self.kv.spec.ty,
                blocks,
                v_offset: self.kv.shape().keys,
                head_dim: self.spec.head_dim,
                from,
                to,
                scale: self.spec.scale,
                heads,
                q,
                out: to_heads,
            };
            // SAFETY: blocks `from..to`, query heads and partial results are valid for the spec's shape.
            unsafe { (self.cx.k.segment)(&args) };
        }
    }

    /// Takes the partial results `from` of a query's first merge segment: as they are, or merged into the sinks.
    fn begin(&self, query: &Query<'_>, into: &mut [f32], from: &[f32]) {
        let Some(sinks) = self.sinks else { return into.copy_from_slice(from) };
        let first = query.kv_head * self.group();
        into.fill(0.0);
        for (partial, &sink) in into.chunks_exact_mut(self.partial()).zip(&sinks.values()[first..]) {
            (partial[0], partial[1]) = (sink, 1.0);
        }
        self.merge(into, from);
    }

    /// Merges a segment's partial results into the running ones.
    fn merge(&self, into: &mut [f32], from: &[f32]) {
        let partial = self.partial();
        for (into, from) in into.chunks_exact_mut(partial).zip(from.chunks_exact(partial)) {
            // SAFETY: both are partial results of this shape.
            unsafe { (self.cx.k.merge)(into.as_mut_ptr(), from.as_ptr(), self.spec.head_dim) };
        }
    }

    /// Writes the heads of the group to their place in the output.
    fn finish(&self, query: &Query<'_>, partials: &[f32]) {
        let d = self.spec.head_dim;
        for (h, partial) in partials.chunks_exact(self.partial()).enumerate() {
            let gate = if self.spec.gate { self.query_head(query, h).wrapping_add(d) } else { std::ptr::null() };
            let at = (query.row * self.spec.heads + query.kv_head * self.group() + h) * d;
            // SAFETY: this row and head of the output belong to this query alone.
            unsafe { (self.cx.k.finish)(partial.as_ptr(), gate, d, self.out.at(at)) };
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    cx: Context<'_>,
    scratch: &mut Scratch,
    spec: &AttentionSpec,
    q: &Tensor,
    sinks: Option<&Tensor>,
    segments: &[Segment<'_>],
    kv: &Kv,
    out: &mut Tensor,
) {
    assert!(spec.heads.is_multiple_of(spec.kv_heads), "{} heads over {} kv heads", spec.heads, spec.kv_heads);
    assert!(q.cols() == spec.heads * query_stride(spec) && out.cols() == spec.heads * spec.head_dim, "shapes of attention");
    assert!(kv.spec.kv_heads == spec.kv_heads && kv.spec.head_dim == spec.head_dim, "the KV store has another shape");
    assert!(segments.iter().all(|s| s.row + s.rows <= q.rows().min(out.rows())), "rows of a segment");
    assert!(sinks.is_none_or(|s| s.cols() == spec.heads), "a sink for each head");
    let call = Call { cx, spec, q, sinks, kv, out: Shared::new(out.values_mut()) };
    let rows: usize = segments.iter().map(|s| s.rows).sum();
    let query = |i: usize, kv_head: usize| {
        let (segment, i) = locate(segments, i);
        Query { segment, row: segment.row + i, pos: segment.pos + i, kv_head }
    };
    // Merge segments that a query sees at most: a window may start anywhere in its first.
    let in_window = spec.window.map_or(usize::MAX, |w| w.div_ceil(MERGE_SEGMENT) + 1);
    let longest = segments.iter().filter(|s| s.rows > 0).map(|s| ((s.pos + s.rows - 1) / MERGE_SEGMENT + 1).min(in_window)).max().unwrap_or(0);
    let (pairs, width) = (rows * spec.kv_heads, call.group() * call.partial());
    if longest > 1 && pairs < 4 * cx.pool.threads() {
        // Few queries over many keys: every merge segment is a task, and merging comes after.
        let partials = Shared::new(grown(&mut scratch.values, pairs * longest * width));
        let of = |pair: usize, nth: usize| (pair * longest + nth) * width;
        cx.pool.run(pairs * longest, &|task| {
            let (pair, nth) = (task / longest, task % longest);
            let query = query(pair / spec.kv_heads, pair % spec.kv_heads);
            let (first, last) = call.ends(&query);
            if first + nth <= last {
                // SAFETY: each task has its own partial results.
                call.segment(&query, first + nth, unsafe { std::slice::from_raw_parts_mut(partials.at(of(pair, nth)), width) });
            }
        });
        cx.pool.run(pairs, &|pair| {
            let query = query(pair / spec.kv_heads, pair % spec.kv_heads);
            let (first, last) = call.ends(&query);
            // SAFETY: each pair reads its own partial results.
            let all = unsafe { std::slice::from_raw_parts_mut(partials.at(of(pair, 0)), longest * width) };
            let (from, rest) = all.split_at(width);
            with_scratch(width, |into| {
                call.begin(&query, into, from);
                for from in rest.chunks_exact(width).take(last - first) {
                    call.merge(into, from);
                }
                call.finish(&query, into);
            });
        });
        return;
    }
    // Groups never span segments of the batch, so that a group's rows read the same blocks.
    let mut groups = Vec::new();
    for s in segments {
        groups.extend((0..s.rows).step_by(ROW_GROUP).map(|i| (s, i, (s.rows - i).min(ROW_GROUP))));
    }
    cx.pool.run(groups.len() * spec.kv_heads, &|task| {
        let (segment, start, n) = groups[task / spec.kv_heads];
        let query = |i: usize| Query { segment, row: segment.row + start + i, pos: segment.pos + start + i, kv_head: task % spec.kv_heads };
        with_scratch((n + 1) * width, |values| {
            let (running, one) = values.split_at_mut(n * width);
            for index in call.ends(&query(0)).0..=call.ends(&query(n - 1)).1 {
                for (i, running) in running.chunks_exact_mut(width).enumerate() {
                    let query = query(i);
                    let (first, last) = call.ends(&query);
                    if index == first {
                        call.segment(&query, index, one);
                        call.begin(&query, running, one);
                    } else if index > first && index <= last {
                        call.segment(&query, index, one);
                        call.merge(running, one);
                    }
                }
            }
            for (i, running) in running.chunks_exact(width).enumerate() {
                call.finish(&query(i), running);
            }
        });
    });
}
