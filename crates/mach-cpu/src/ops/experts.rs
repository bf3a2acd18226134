//! Routed experts: gate|up, down and the ordered sum.

use mach_backend::{ExpertJob, Experts};
use mach_format::PackedLayout;

use super::linear::{Acts, Product, Scratch, activate, activations, copy, products};
use super::{Context, Shared};
use crate::kernels::LANES;
use crate::memory::{Bank, PartGuard};
use crate::tensor::Tensor;

/// Read locks of one part of all the jobs' slots, and where the parts lie.
fn lock<'a>(mem: &'a Bank, jobs: &[ExpertJob<'_>], part: usize, bytes: usize) -> (Vec<PartGuard<'a>>, Vec<*const u8>) {
    use mach_backend::ExpertMemory;
    assert!(mem.part_bytes()[part] >= bytes, "a part of {bytes} bytes in a slot of {}", mem.part_bytes()[part]);
    let mut guards = Vec::with_capacity(jobs.len());
    let mut data: Vec<*const u8> = Vec::with_capacity(jobs.len());
    for (i, job) in jobs.iter().enumerate() {
        // Never twice for one slot: a second read lock behind a waiting writer would block for ever.
        if let Some(before) = jobs[..i].iter().position(|j| j.slot == job.slot) {
            data.push(data[before]);
        } else {
            let (guard, at) = mem.read(job.slot, part);
            guards.push(guard);
            data.push(at);
        }
    }
    (guards, data)
}

/// One product per job.
fn expert_products<'a>(layout: PackedLayout, per: usize, data: &[*const u8], acts: Acts, rows: impl Iterator<Item = &'a [u32]>) -> Vec<Product<'a>> {
    data.iter().zip(rows).map(|(&data, rows)| Product { layout, data, per, acts, rows }).collect()
}

fn check(jobs: &[ExpertJob<'_>], outs: usize) {
    for job in jobs {
        assert_eq!(job.rows.len(), job.outs.len(), "rows and outputs of an expert job");
        assert!(job.outs.iter().all(|&o| (o as usize) < outs), "an output row beyond {outs}");
    }
}

/// The bias of an expert, null where there is none.
fn bias_row(bias: Option<&Tensor>, expert: usize) -> *const f32 {
    bias.map_or(std::ptr::null(), |b| b.part(expert, 1).as_ptr())
}

/// A finished row of down with its bias, in `with` where there is one.
///
/// # Safety
/// `bias` is null or has `n` values from `column` on.
unsafe fn biased<'a>(cx: Context<'_>, row: &'a [f32], bias: *const f32, column: usize, n: usize, with: &'a mut [f32; LANES]) -> &'a [f32] {
    if bias.is_null() {
        return row;
    }
    with.copy_from_slice(row);
    // SAFETY: the caller's promise.
    unsafe { (cx.k.add)(with.as_mut_ptr(), bias.add(column), n) };
    with
}

pub(crate) fn gate_up(cx: Context<'_>, scratch: &mut Scratch, experts: &Experts<'_, Bank, Tensor>, jobs: &[ExpertJob<'_>], x: &Tensor, act: &mut Tensor) {
    check(jobs, act.rows());
    let (layout, half) = (experts.layout, experts.layout.gate_up.half);
    assert_eq!(half.rows, act.cols(), "columns of the activation buffer");
    let bias = experts.bias.as_ref().map(|b| [b.gate, b.up]);
    assert!(bias.iter().flatten().all(|b| b.cols() == half.rows), "columns of the biases");
    let (_guards, data) = lock(experts.memory, jobs, 0, layout.gate_up.bytes());
    // SAFETY: shapes checked; the guards keep the weights; output rows of a call are distinct.
    unsafe {
        let acts = activations(cx, &mut scratch.quant, &half, x, jobs.iter().flat_map(|j| j.rows).copied());
        let list = expert_products(half, 2, &data, acts, jobs.iter().map(|j| j.rows));
        let to = Shared::new(act.values_mut());
        products(cx, &list, &|done| {
            let job = &jobs[done.product];
            let bias = [0, 1].map(|i| bias_row(bias.map(|b| b[i]), job.expert));
            activate(cx, &layout.activation, done, half.rows, bias, to, |i| job.outs[i] as usize);
        });
    }
}

pub(crate) fn down(cx: Context<'_>, scratch: &mut Scratch, experts: &Experts<'_, Bank, Tensor>, jobs: &[ExpertJob<'_>], act: &Tensor, y: &mut Tensor) {
    check(jobs, act.rows().min(y.rows()));
    let (layout, bias) = (experts.layout.down, experts.bias.as_ref().map(|b| b.down));
    assert_eq!(layout.rows, y.cols(), "columns of the expert outputs");
    assert!(bias.is_none_or(|b| b.cols() == layout.rows), "columns of the biases");
    let (_guards, data) = lock(experts.memory, jobs, 1, layout.bytes());
    // SAFETY: as in `gate_up`.
    unsafe {
        let acts = activations(cx, &mut scratch.inner, &layout, act, jobs.iter().flat_map(|j| j.outs).copied());
        let list = expert_products(layout, 1, &data, acts, jobs.iter().map(|j| j.outs));
        let (to, cols) = (Shared::new(y.values_mut()), layout.rows);
        products(cx, &list, &|done| {
            let job = &jobs[done.product];
            done.each(cols, |i, t, column, n| {
                let mut with = [0.0; LANES];
                let values = biased(cx, done.row(t, i), bias_row(bias, job.expert), column, n, &mut with);
                copy(values.as_ptr(), to.at(job.outs[done.first + i] as usize * cols + column), n);
            });
        });
    }
}

pub(crate) fn down_add(
    cx: Context<'_>,
    scratch: &mut Scratch,
    experts: &Experts<'_, Bank, Tensor>,
    job: &ExpertJob<'_>,
    weights: &[f32],
    act: &Tensor,
    out: &mut Tensor,
) {
    let jobs = std::slice::from_ref(job);
    let (layout, bias) = (experts.layout.down, experts.bias.as_ref().map(|b| b.down));
    check(jobs, act.rows());
    assert!(job.rows.iter().all(|&r| (r as usize) < out.rows()), "an output row beyond {}", out.rows());
    assert_eq!(weights.len(), job.rows.len(), "one weight per row");
    assert_eq!(layout.rows, out.cols(), "columns of the output");
    assert!(bias.is_none_or(|b| b.cols() == layout.rows), "columns of the biases");
    let (_guards, data) = lock(experts.memory, jobs, 1, layout.bytes());
    // SAFETY: as in `gate_up`; a row goes through an expert once.
    unsafe {
        let acts = activations(cx, &mut scratch.inner, &layout, act, job.outs.iter().copied());
        let list = expert_products(layout, 1, &data, acts, std::iter::once(job.outs));
        let (to, cols) = (Shared::new(out.values_mut()), layout.rows);
        products(cx, &list, &|done| {
            done.each(cols, |i, t, column, n| {
                let at = done.first + i;
                let mut with = [0.0; LANES];
                let values = biased(cx, done.row(t, i), bias_row(bias, job.expert), column, n, &mut with);
                (cx.k.add_scaled)(to.at(job.rows[at] as usize * cols + column), weights[at], values.as_ptr(), n);
            });
        });
    }
}

pub(crate) fn reduce(cx: Context<'_>, y: &Tensor, rows: usize, order: &[u32], weights: &[f32], out: &mut Tensor) {
    assert!(rows <= out.rows() && out.cols() == y.cols() && order.len() == weights.len(), "shapes of the expert sum");
    let (cols, k) = (y.cols(), order.len().checked_div(rows).unwrap_or(0));
    let to = Shared::new(out.values_mut());
    cx.rows(rows, k * cols, &|r| {
        // SAFETY: row `r` of `out` is this call's alone; rows of `y` are checked by `part`.
        unsafe {
            std::ptr::write_bytes(to.at(r * cols), 0, cols);
            for j in r * k..(r + 1) * k {
                (cx.k.add_scaled)(to.at(r * cols), weights[j], y.part(order[j] as usize, 1).as_ptr(), cols);
            }
        }
    });
}
