//! Matrix products: every kernel set, width and thread count gives the same bytes, and the right numbers.

mod common;

use common::*;
use mach_backend::Backend;
use mach_cpu::{Cpu, KernelSet};
use mach_format::{PackedMatrix, ScaleType, WeightFormat};

fn product(cpu: &Cpu, m: &PackedMatrix, x: &[f32], rows: usize) -> Vec<f32> {
    let (w, x) = (cpu.weight(m.clone()), tensor(cpu, m.layout.cols, x));
    let mut out = cpu.tensor(rows, m.layout.rows);
    cpu.linear(&x, rows, &mut [(&w, &mut out)]);
    values(cpu, &out, rows * m.layout.rows)
}

/// In f64, from the layout's definition.
fn exact(m: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let (rows, cols) = (m.layout.rows, m.layout.cols);
    let w: Vec<f64> = (0..rows * cols).map(|i| element(m, i / cols, i % cols).into()).collect();
    x.chunks_exact(cols)
        .flat_map(|x| w.chunks_exact(cols).map(|w| w.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum::<f64>() as f32).collect::<Vec<_>>())
        .collect()
}

fn heavy_tailed(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal() * rng.normal().powi(3)).collect()
}

#[test]
fn kernel_sets_and_threads_agree_on_every_format_and_odd_shapes() {
    let mut rng = Rng::new(1);
    let (cpus, cpus8) = (cpus(), cpus8());
    for format in FORMATS {
        let shapes: &[(usize, usize)] = match format {
            WeightFormat::Affine { .. } | WeightFormat::Fp8 { .. } => &[(16, 128), (100, 256), (257, 384)],
            WeightFormat::Block(_) => &[(16, 256), (100, 512), (257, 768)],
            _ => &[(1, 7), (37, 33), (100, 130), (257, 64)],
        };
        for &(out, cols) in shapes {
            let m = random_matrix(&mut rng, out, cols, format);
            for rows in [1, 2, 3, 5, 27, 67] {
                let x = heavy_tailed(&mut rng, rows * cols);
                for cpus in [&cpus, &cpus8] {
                    let want = product(&cpus[0], &m, &x, rows);
                    for cpu in &cpus[1..] {
                        assert_bytes(&product(cpu, &m, &x, rows), &want, &format!("{format} [{out}, {cols}] x {rows} rows, {}", label(cpu)));
                    }
                }
            }
        }
    }
}

/// Protects the groups of rows that a matrix unit takes: 5 to 8 of two planes, 10 to 16 of one, and an odd number of tiles beside them.
#[test]
fn groups_of_every_size_give_the_same_bytes() {
    let mut rng = Rng::new(13);
    let (out, cols) = (272, 576);
    for group in [32, 64] {
        let m = random_matrix(&mut rng, out, cols, WeightFormat::Affine { bits: 4, group, scales: ScaleType::F16 });
        for rows in [8, 9, 12, 14, 17, 20, 28] {
            let x = heavy_tailed(&mut rng, rows * cols);
            for cpus in [cpus(), cpus8()] {
                let want = product(&cpus[0], &m, &x, rows);
                for cpu in &cpus[1..] {
                    assert_bytes(&product(cpu, &m, &x, rows), &want, &format!("groups of {group}, {rows} rows, {}", label(cpu)));
                }
            }
        }
    }
}

/// Protects what operations remember of rows that they rounded: not those of before a change, nor those of other columns or rows.
#[test]
fn rows_that_changed_are_rounded_anew() {
    let mut rng = Rng::new(12);
    let (out, cols, rows) = (48, 256, 20);
    let format = WeightFormat::Affine { bits: 4, group: 64, scales: ScaleType::F16 };
    let m = random_matrix(&mut rng, out, cols, format);
    let (first, second) = (heavy_tailed(&mut rng, rows * cols), heavy_tailed(&mut rng, rows * cols));
    for used in cpus() {
        let fresh = |x: &[f32], n: usize| product(&cpu(used.kernel_set(), 1), &m, &x[..n * cols], n);
        let (w, mut x, mut y) = (used.weight(m.clone()), tensor(&used, cols, &first), used.tensor(rows, out));
        let mut check = |x: &mach_cpu::Tensor, n: usize, want: &[f32], what: &str| {
            used.linear(x, n, &mut [(&w, &mut y)]);
            assert_bytes(&values(&used, &y, n * out), want, &format!("{what}, {}", label(&used)));
        };
        check(&x, 3, &fresh(&first, 3), "three rows");
        check(&x, rows, &fresh(&first, rows), "all, some of them known");
        used.upload(&mut x, 1, &second[cols..2 * cols]);
        let mixed: Vec<f32> = [&first[..cols], &second[cols..2 * cols], &first[2 * cols..]].concat();
        check(&x, rows, &fresh(&mixed, rows), "one row changed");
        let clone = x.clone();
        used.upload(&mut x, 0, &second);
        check(&clone, rows, &fresh(&mixed, rows), "a copy of before");
        check(&x, rows, &fresh(&second, rows), "all changed");
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let mut rng = Rng::new(2);
    for format in FORMATS {
        // More than one panel of columns for the quantised kernels.
        let (out, cols) = if format.is_plain() { (35, 130) } else { (80, 2304) };
        let m = random_matrix(&mut rng, out, cols, format);
        let x = heavy_tailed(&mut rng, 66 * cols);
        for cpu in KernelSet::available().into_iter().flat_map(|set| [cpu(set, 2), cpu8(set, 2)]) {
            let cpu = &cpu;
            let all = product(cpu, &m, &x, 66);
            for width in [1, 2, 3, 4, 8, 16, 64] {
                for first in [0, 66 - width] {
                    let part = product(cpu, &m, &x[first * cols..(first + width) * cols], width);
                    assert_bytes(&part, &all[first * out..(first + width) * out], &format!("{format}, width {width}, {}", label(cpu)));
                }
            }
        }
    }
}

#[test]
fn products_are_right() {
    let mut rng = Rng::new(3);
    let (cpu, cpu8) = (cpu(KernelSet::automatic(), 2), cpu8(KernelSet::automatic(), 2));
    for format in FORMATS {
        for (out, cols) in [(40, 256), (200, 512)] {
            let m = random_matrix(&mut rng, out, cols, format);
            let x = rng.normals(5 * cols);
            let e8 = error(&product(&cpu8, &m, &x, 5), &exact(&m, &x));
            assert!(e8 < if format.is_quantised() && out > 64 { 1.5e-2 } else { 1e-6 }, "{format} [{out}, {cols}], 8 bits: error {e8}");
            let e = error(&product(&cpu, &m, &x, 5), &exact(&m, &x));
            // 16-bit activations: rounding of 1/65,024 of the block's maximum, averaged over hundreds of columns.
            let bound = if format.is_quantised() && out > 64 { 5e-5 } else { 1e-6 };
            assert!(e < bound, "{format} [{out}, {cols}]: error {e}");
        }
    }
}

/// A few hidden channels that are hundreds of times larger must not cost the others their precision.
#[test]
fn outlier_channels_do_not_spoil_their_block() {
    let mut rng = Rng::new(4);
    let cpu = cpu(KernelSet::automatic(), 1);
    for bits in [4, 8] {
        let (out, cols) = (128, 512);
        let m = random_matrix(&mut rng, out, cols, affine(bits, 64, ScaleType::F32));
        let plain = rng.normals(cols);
        let difference = |factor: f32| {
            let mut x = plain.clone();
            let large = [3, 100, 101, 400];
            large.iter().for_each(|&c| x[c] *= factor);
            let (got, want) = (product(&cpu, &m, &x, 1), exact(&m, &x));
            got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let before = difference(1.0);
        // f32 itself rounds what the large channels add.
        for (factor, bound) in [(100.0, 2e-3), (1e4, 2e-3)] {
            let after = difference(factor);
            assert!(after < bound, "{bits} bits, channels x {factor}: absolute error {before} became {after}");
        }
    }
}

/// The largest weights times the largest activations: sums that i16 accumulators only just hold.
#[test]
fn extreme_integers_do_not_overflow() {
    let mut rng = Rng::new(8);
    for format in FORMATS {
        if !format.is_quantised() {
            continue;
        }
        let mut m = random_matrix(&mut rng, 80, 256, format);
        let data = m.layout.line_bytes();
        let block = m.layout.block_bytes();
        let tile = m.layout.tile_bytes();
        for tile in m.data.chunks_exact_mut(tile) {
            tile.chunks_exact_mut(block).for_each(|b| b[..data].fill(0xff));
        }
        // The high plane at ±127, then (but for each block's maximum) the low one at −128.
        let low = |i: usize| if i.is_multiple_of(32) { 1.0 } else { (126.0 * 256.0 - 128.0) / (127.0 * 256.0) };
        for x in [vec![1.0; 4 * 256], vec![-1.0; 4 * 256], (0..4 * 256).map(low).collect()] {
            let want = exact(&m, &x);
            for cpu in cpus() {
                let e = error(&product(&cpu, &m, &x, 4), &want);
                assert!(e < 1e-5, "{format}, {}: error {e}", label(&cpu));
            }
        }
    }
}

#[test]
fn zeros_and_numbers_out_of_range_pass_through() {
    let mut rng = Rng::new(5);
    let m = random_matrix(&mut rng, 80, 128, affine(4, 64, ScaleType::F16));
    for cpu in cpus() {
        assert!(product(&cpu, &m, &[0.0; 128], 1).iter().all(|&y| y == 0.0), "zero row, {}", label(&cpu));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = rng.normals(128);
            x[70] = bad;
            assert!(product(&cpu, &m, &x, 1).iter().all(|y| !y.is_finite()), "{bad} was hidden, {}", label(&cpu));
        }
        let tiny = product(&cpu, &m, &[1e-38; 128], 1);
        assert!(tiny.iter().all(|y| y.is_finite()), "tiny row, {}", label(&cpu));
    }
}

#[test]
fn several_outputs_share_one_call() {
    let mut rng = Rng::new(6);
    let cols = 128;
    let formats = [affine(4, 64, ScaleType::F16), affine(8, 32, ScaleType::F32), WeightFormat::BF16, affine(4, 128, ScaleType::BF16)];
    let ms: Vec<_> = formats.iter().zip([128, 33, 17, 90]).map(|(&f, out)| random_matrix(&mut rng, out, cols, f)).collect();
    let x = rng.normals(6 * cols);
    for cpu in cpus() {
        let weights: Vec<_> = ms.iter().map(|m| cpu.weight(m.clone())).collect();
        let mut outs: Vec<_> = ms.iter().map(|m| cpu.tensor(6, m.layout.rows)).collect();
        let mut pairs: Vec<_> = weights.iter().zip(&mut outs).collect();
        cpu.linear(&tensor(&cpu, cols, &x), 6, &mut pairs);
        for (m, out) in ms.iter().zip(&outs) {
            assert_bytes(&values(&cpu, out, 6 * m.layout.rows), &product(&cpu, m, &x, 6), &format!("{}", m.layout.format));
        }
    }
}

/// Of the formats after the first.
const FINGERPRINTS: &[u64] = &[
    0x2eb6_6aa5_b3f3_e0ae,
    0xe837_7d6c_1d3f_6c31,
    0x0eae_01f7_aaa3_517f,
    0xd3bf_32b4_3218_1f39,
    0x886f_d3cb_ec08_ba78,
    0x0766_329b_8818_b4ae,
    0xb8b7_d806_58bf_af80,
    0xa162_60b2_b222_b34e,
    0x637a_17d8_74d7_f446,
    0x79b9_0503_e044_92bf,
    0x0403_aa0c_d0e3_b1d4,
    0x8ef8_72ad_7cf1_a8f7,
    0x876c_9509_53e2_1312,
    0xda1f_fbc9_17e8_f6a0,
    0xf6ba_35e3_4141_d98e,
    0x2157_06af_127f_721c,
    0x6cc5_7a57_7fdd_8716,
    0x09a3_7cfb_ccc2_d660,
    0x926d_ab60_dc55_d1fb,
    0x963b_a8f8_9b87_5f42,
    0xbad2_8b66_4c38_4b4d,
    0x4186_415f_6972_65e2,
    0x4e80_f022_6fc6_d335,
    0xa026_6d1e_a5a0_c0e8,
    0x88cf_136d_90bb_3e1b,
];

/// x86 and ARM agree too: a fingerprint that every machine must reproduce.
#[test]
fn bytes_are_the_same_on_every_architecture() {
    let mut rng = Rng::new(7);
    let cpu = cpu(KernelSet::automatic(), 2);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for format in &FORMATS[..FIRST_FORMATS] {
        let m = random_matrix(&mut rng, 90, 256, *format);
        for y in product(&cpu, &m, &heavy_tailed(&mut rng, 5 * 256), 5) {
            hash = (hash ^ u64::from(y.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
    }
    let x = tensor(&cpu, 256, &rng.normals(7 * 256));
    let mut routes = cpu.routes();
    let project = cpu.weight(random_matrix(&mut rng, 90, 256, WeightFormat::BF16));
    let w = mach_backend::RouterWeights { project: &project, bias: None, expert_scale: None };
    cpu.route(&mach_backend::RouterSpec::softmax(90, 8, true), &w, &x, 7, None, &mut routes);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    cpu.read_routes(&routes, &mut ids, &mut weights);
    for bits in ids.into_iter().chain(weights.into_iter().map(f32::to_bits)) {
        hash = (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3);
    }
    assert_eq!(hash, 0x00f1_33e1_f4a6_6de9, "{hash:#x}");
    let later = FORMATS[FIRST_FORMATS..].iter().map(|format| {
        let (mut rng, mut hash) = (Rng::new(9), 0xcbf2_9ce4_8422_2325_u64);
        let m = random_matrix(&mut rng, 90, 256, *format);
        for y in product(&cpu, &m, &heavy_tailed(&mut rng, 5 * 256), 5) {
            hash = (hash ^ u64::from(y.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
        hash
    });
    let later: Vec<u64> = later.collect();
    assert_eq!(later, FINGERPRINTS, "{later:#018x?}");
}
