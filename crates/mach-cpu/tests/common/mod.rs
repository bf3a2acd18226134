//! Random inputs in the packed layout, and backends to compare.
#![allow(dead_code)] // Each test file uses its own part.

use mach_backend::Backend;
use mach_cpu::{ActivationBits, Cpu, CpuOptions, KernelSet};
use mach_format::{AlignedBytes, BlockFormat, PackedLayout, PackedMatrix, ScaleType, WeightFormat};

/// xorshift64*: the same numbers on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
    pub fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }
    /// Uniform in ±1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
    /// About normal with deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() * 0.7
    }
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

pub const fn affine(bits: u8, group: u16, scales: ScaleType) -> WeightFormat {
    WeightFormat::Affine { bits, group, scales }
}

pub const fn fp8(group: u16, scales: ScaleType) -> WeightFormat {
    WeightFormat::Fp8 { group, scales }
}

/// How many of [`FORMATS`] the first fingerprint of products covers; others are appended.
pub const FIRST_FORMATS: usize = 12;

pub const FORMATS: [WeightFormat; 37] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::BF16,
    affine(4, 32, ScaleType::F16),
    affine(4, 64, ScaleType::BF16),
    affine(4, 128, ScaleType::F32),
    affine(8, 32, ScaleType::BF16),
    affine(8, 64, ScaleType::F32),
    affine(8, 128, ScaleType::F16),
    WeightFormat::Block(BlockFormat::Q8_0),
    WeightFormat::Block(BlockFormat::Q4K),
    WeightFormat::Block(BlockFormat::Q6K),
    WeightFormat::Block(BlockFormat::Mxfp4),
    affine(2, 32, ScaleType::BF16),
    affine(3, 64, ScaleType::F16),
    affine(5, 32, ScaleType::F32),
    affine(6, 128, ScaleType::BF16),
    fp8(32, ScaleType::BF16),
    fp8(64, ScaleType::F16),
    fp8(128, ScaleType::F32),
    WeightFormat::Block(BlockFormat::Nvfp4),
    WeightFormat::Block(BlockFormat::Q4_0),
    WeightFormat::Block(BlockFormat::Q4_1),
    WeightFormat::Block(BlockFormat::Q5_0),
    WeightFormat::Block(BlockFormat::Q5_1),
    WeightFormat::Block(BlockFormat::Q2K),
    WeightFormat::Block(BlockFormat::Q3K),
    WeightFormat::Block(BlockFormat::Q5K),
    WeightFormat::Block(BlockFormat::Iq2Xxs),
    WeightFormat::Block(BlockFormat::Iq2Xs),
    WeightFormat::Block(BlockFormat::Iq2S),
    WeightFormat::Block(BlockFormat::Iq3Xxs),
    WeightFormat::Block(BlockFormat::Iq3S),
    WeightFormat::Block(BlockFormat::Iq1S),
    WeightFormat::Block(BlockFormat::Iq1M),
    WeightFormat::Block(BlockFormat::Iq4Nl),
    WeightFormat::Block(BlockFormat::Iq4Xs),
];

fn put_scale(ty: ScaleType, x: f32, out: &mut [u8], i: usize) {
    match ty {
        ScaleType::F32 => out[i * 4..][..4].copy_from_slice(&x.to_le_bytes()),
        ScaleType::F16 => out[i * 2..][..2].copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
        ScaleType::BF16 => out[i * 2..][..2].copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
    }
}

/// About the largest value of a block whose `d` is 1.
fn largest(kind: BlockFormat) -> f32 {
    match kind {
        BlockFormat::Q8_0 => 127.0,
        BlockFormat::Q4K => 7.5 * 40.0,
        BlockFormat::Q6K => 32.0 * 80.0,
        BlockFormat::Mxfp4 | BlockFormat::Nvfp4 => 1.0,
        BlockFormat::Q4_0 | BlockFormat::Q4_1 => 8.0,
        BlockFormat::Q5_0 | BlockFormat::Q5_1 => 16.0,
        BlockFormat::Q2K => 2.0 * 10.0,
        BlockFormat::Q3K => 4.0 * 20.0,
        BlockFormat::Q5K => 16.0 * 40.0,
        BlockFormat::Iq2Xxs | BlockFormat::Iq2Xs | BlockFormat::Iq2S => 43.0 * 2.0,
        BlockFormat::Iq3Xxs => 62.0 * 4.0,
        BlockFormat::Iq3S => 15.0 * 16.0,
        BlockFormat::Iq1S | BlockFormat::Iq1M => 8.0,
        BlockFormat::Iq4Nl => 127.0,
        BlockFormat::Iq4Xs => 127.0 * 20.0,
    }
}

/// One tile with random weights of deviation about `1/sqrt(cols)`; rows and columns beyond the matrix are zero.
fn fill_tile(rng: &mut Rng, layout: &PackedLayout, rows: usize, tile: &mut [u8]) {
    let size = 1.0 / (layout.cols as f32).sqrt();
    let (cols, line) = (layout.cols, |c: usize, r: usize| (c * 16 + r) * 4);
    match layout.format {
        WeightFormat::F32 => {
            for c in 0..cols {
                for r in 0..rows {
                    tile[line(c, r)..][..4].copy_from_slice(&(rng.normal() * size).to_le_bytes());
                }
            }
        }
        WeightFormat::F16 | WeightFormat::BF16 => {
            for c in 0..cols {
                for r in 0..rows {
                    let x = rng.normal() * size;
                    let bits = if layout.format == WeightFormat::F16 { half::f16::from_f32(x).to_bits() } else { half::bf16::from_f32(x).to_bits() };
                    tile[line(c / 2, r) + c % 2 * 2..][..2].copy_from_slice(&bits.to_le_bytes());
                }
            }
        }
        WeightFormat::Affine { bits, group, scales } => {
            let data = group as usize * bits as usize * 2;
            for block in tile.chunks_exact_mut(layout.block_bytes()) {
                for (i, byte) in block[..data].iter_mut().enumerate() {
                    *byte = if i / 4 % 16 < rows { rng.bits() as u8 } else { 0 };
                }
                for r in 0..rows {
                    let top = ((1 << bits) - 1) as f32;
                    let scale = (1.0 + 0.5 * rng.unit()) * 3.5 * size / top;
                    let bias = -scale * top / 2.0 * (1.0 + 0.2 * rng.unit());
                    for (i, x) in [scale, bias].into_iter().enumerate() {
                        put_scale(scales, x, &mut block[data..], i * 16 + r);
                    }
                }
            }
        }
        WeightFormat::Fp8 { group, scales } => {
            for block in tile.chunks_exact_mut(layout.block_bytes()) {
                let (lines, params) = block.split_at_mut(usize::from(group) * 16);
                for (i, byte) in lines.iter_mut().enumerate() {
                    // Any number but the two that are none.
                    *byte = if i / 4 % 16 < rows { (rng.below(255) as u8).wrapping_add(u8::from(rng.bits() & 1 == 1) * 128) } else { 0 };
                    *byte = if *byte & 127 == 127 { 0x38 } else { *byte };
                }
                for r in 0..rows {
                    put_scale(scales, (1.0 + 0.5 * rng.unit()) * size / 100.0, params, r);
                }
            }
        }
        WeightFormat::Block(kind) => {
            let lines = layout.line_bytes();
            let (blocks, tail) = tile.split_at_mut(layout.tile_bytes() - layout.tail_bytes());
            for r in 0..tail.len() / 4 {
                put_scale(ScaleType::F32, size / 3.0 * (1.0 + 0.5 * rng.unit()), tail, r);
            }
            for block in blocks.chunks_exact_mut(layout.block_bytes()) {
                for (i, byte) in block[..lines].iter_mut().enumerate() {
                    *byte = if i / 4 % 16 < rows { rng.bits() as u8 } else { 0 };
                }
                // Bytes of scales (and minima), then halves: `d` (and `dmin`).
                let [bytes, halves] = kind.params();
                let d = 3.5 * size / largest(kind);
                for byte in &mut block[lines..lines + bytes * 16] {
                    *byte = match kind {
                        BlockFormat::Q4K | BlockFormat::Q5K => rng.below(64) as u8,
                        BlockFormat::Q3K | BlockFormat::Iq4Xs => (rng.below(64) as i8 - 32) as u8,
                        BlockFormat::Mxfp4 => 121 + rng.below(3) as u8,
                        // 1 to 2.
                        BlockFormat::Nvfp4 => 0x38 + rng.below(8) as u8,
                        _ => rng.bits() as u8,
                    };
                }
                for (i, half) in block[lines + bytes * 16..].chunks_exact_mut(2).enumerate() {
                    let d = if i / 16 == 0 { d } else { 7.5 * d };
                    half.copy_from_slice(&half::f16::from_f32((1.0 + 0.5 * rng.unit()) * d).to_le_bytes());
                }
                assert_eq!(block.len(), lines + bytes * 16 + halves * 32);
            }
        }
    }
}

/// Random tiles, `copies` of each row of tiles in turn (2 for gate|up).
pub fn random_tiles(rng: &mut Rng, layout: &PackedLayout, copies: usize) -> AlignedBytes {
    let bytes = layout.tile_bytes();
    let mut data = AlignedBytes::zeroed(layout.bytes() * copies);
    for (i, tile) in data.chunks_exact_mut(bytes).enumerate() {
        let first = i / copies * 16;
        fill_tile(rng, layout, (layout.rows - first).min(16), tile);
    }
    data
}

pub fn random_matrix(rng: &mut Rng, rows: usize, cols: usize, format: WeightFormat) -> PackedMatrix {
    let layout = PackedLayout::new(rows, cols, format);
    PackedMatrix { layout, data: random_tiles(rng, &layout, 1) }
}

/// Element `(row, col)` of a matrix, by the layout's definition.
pub fn element(m: &PackedMatrix, row: usize, col: usize) -> f32 {
    let bytes = m.layout.tile_bytes();
    m.layout.element(&m.data[row / 16 * bytes..][..bytes], row % 16, col)
}

pub fn tensor<B: Backend>(b: &B, cols: usize, data: &[f32]) -> B::Tensor {
    let mut t = b.tensor(data.len() / cols, cols);
    b.upload(&mut t, 0, data);
    t
}

pub fn values<B: Backend>(b: &B, t: &B::Tensor, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n];
    b.read(t, 0, &mut out);
    out
}

pub fn cpu(set: KernelSet, threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), kernels: Some(set), ..CpuOptions::default() }).unwrap()
}

/// With activations of 8 bits.
pub fn cpu8(set: KernelSet, threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), kernels: Some(set), activation_bits: ActivationBits::Eight }).unwrap()
}

/// Every kernel set of this processor at one and two threads; says which sets it leaves out.
pub fn cpus() -> Vec<Cpu> {
    let have = KernelSet::available();
    for set in KernelSet::ALL.iter().filter(|s| !have.contains(s)) {
        println!("note: this processor has no {}, not tested", set.name());
    }
    have.into_iter().flat_map(|set| [cpu(set, 1), cpu(set, 2)]).collect()
}

/// The same with activations of 8 bits.
pub fn cpus8() -> Vec<Cpu> {
    KernelSet::available().into_iter().flat_map(|set| [cpu8(set, 1), cpu8(set, 2)]).collect()
}

pub fn label(cpu: &Cpu) -> String {
    format!("{} on {} threads", cpu.kernel_set().name(), cpu.threads())
}

#[track_caller]
pub fn assert_bytes(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: lengths");
    if let Some(i) = (0..a.len()).find(|&i| a[i].to_bits() != b[i].to_bits()) {
        panic!("{what}: value {i} of {} differs: {} and {}", a.len(), a[i], b[i]);
    }
}

/// Largest difference, as a share of the largest magnitude.
pub fn error(a: &[f32], exact: &[f32]) -> f32 {
    assert_eq!(a.len(), exact.len());
    let size = exact.iter().fold(1e-20_f32, |m, x| m.max(x.abs()));
    a.iter().zip(exact).map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max) / size
}
