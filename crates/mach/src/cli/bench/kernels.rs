//! `mach bench kernels`: products of every kernel set and format, against what bare loops reach.

use std::time::{Duration, Instant};

use mach_backend::Backend;
use mach_cpu::{ActivationBits, Cpu, CpuOptions, KernelSet, peak_gflops, peak_gops};
use mach_format::{AlignedBytes, BlockFormat, PackedLayout, PackedMatrix, ScaleType, WeightFormat};
use serde_json::{Value, json};

use crate::cli::args::positive;
use crate::cli::output::{self, ProgressLine};
use crate::rates::{Xorshift, cache_rate, memory_rate};
use crate::{Error, system};

/// Input columns of products with weights in memory, and in a cache: fewer, so that rounding the activations is a small part.
const COLS: usize = 2048;
const COLS_IN_CACHE: usize = 512;
/// Activation rows: a decoded token, a few, an expert's share of a prompt, a prompt.
const ROWS: [usize; 4] = [1, 4, 16, 64];
/// Bytes of weights for each thread that stay in its L2, and of all matrices where none stays in any cache.
const IN_CACHE: usize = 128 << 10;
const IN_MEMORY: usize = 256 << 20;

const fn affine(bits: u8) -> WeightFormat {
    WeightFormat::Affine { bits, group: 64, scales: ScaleType::F16 }
}

/// Formats by the names that `--format` takes.
const FORMATS: [(&str, WeightFormat); 31] = [
    ("affine-4", affine(4)),
    ("affine-8", affine(8)),
    ("q4_k", WeightFormat::Block(BlockFormat::Q4K)),
    ("q6_k", WeightFormat::Block(BlockFormat::Q6K)),
    ("q8_0", WeightFormat::Block(BlockFormat::Q8_0)),
    ("q2_k", WeightFormat::Block(BlockFormat::Q2K)),
    ("q3_k", WeightFormat::Block(BlockFormat::Q3K)),
    ("q5_k", WeightFormat::Block(BlockFormat::Q5K)),
    ("q4_0", WeightFormat::Block(BlockFormat::Q4_0)),
    ("q4_1", WeightFormat::Block(BlockFormat::Q4_1)),
    ("q5_0", WeightFormat::Block(BlockFormat::Q5_0)),
    ("q5_1", WeightFormat::Block(BlockFormat::Q5_1)),
    ("iq2_xxs", WeightFormat::Block(BlockFormat::Iq2Xxs)),
    ("iq2_xs", WeightFormat::Block(BlockFormat::Iq2Xs)),
    ("iq2_s", WeightFormat::Block(BlockFormat::Iq2S)),
    ("iq3_xxs", WeightFormat::Block(BlockFormat::Iq3Xxs)),
    ("iq3_s", WeightFormat::Block(BlockFormat::Iq3S)),
    ("iq1_s", WeightFormat::Block(BlockFormat::Iq1S)),
    ("iq1_m", WeightFormat::Block(BlockFormat::Iq1M)),
    ("iq4_nl", WeightFormat::Block(BlockFormat::Iq4Nl)),
    ("iq4_xs", WeightFormat::Block(BlockFormat::Iq4Xs)),
    ("mxfp4", WeightFormat::Block(BlockFormat::Mxfp4)),
    ("nvfp4", WeightFormat::Block(BlockFormat::Nvfp4)),
    ("affine-2", affine(2)),
    ("affine-3", affine(3)),
    ("affine-5", affine(5)),
    ("affine-6", affine(6)),
    ("fp8", WeightFormat::Fp8 { group: 128, scales: ScaleType::BF16 }),
    ("bf16", WeightFormat::BF16),
    ("f16", WeightFormat::F16),
    ("f32", WeightFormat::F32),
];

#[derive(clap::Args)]
pub(super) struct Args {
    /// Compute threads [default: all processors]
    #[arg(long, value_name = "N", value_parser = positive, env = "MACH_THREADS")]
    threads: Option<usize>,
    /// Only this kernel set [default: all that the processor has]
    #[arg(long, value_name = "SET", env = "MACH_KERNELS")]
    kernels: Option<String>,
    /// Only this weight format
    #[arg(long, value_name = "FORMAT", value_parser = clap::builder::PossibleValuesParser::new(FORMATS.map(|f| f.0)))]
    format: Option<String>,
    /// Milliseconds that every product is measured
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    time: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What bare loops reach together on all threads, per second.
struct Ceilings {
    cache: f64,
    memory: f64,
    int8: Option<f64>,
    f32: Option<f64>,
}

/// One product.
struct Point {
    set: KernelSet,
    format: WeightFormat,
    bits: Option<u8>,
    rows: usize,
    place: &'static str,
    gb_s: f64,
    gmac_s: f64,
    /// Of the slower of reading and arithmetic by bare loops; `None` where no loop was written for the set.
    share: Option<f64>,
    bound: &'static str,
    equal: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let sets = match &args.kernels {
        Some(name) => {
            let set = KernelSet::parse(name).filter(|set| KernelSet::available().contains(set));
            let have = KernelSet::available().iter().map(|s| s.name()).collect::<Vec<_>>().join(", ");
            vec![set.ok_or_else(|| Error::Usage(format!("this processor has no kernel set {name}; it has {have}")))?]
        }
        None => KernelSet::available().into_iter().filter(|&set| set != KernelSet::Scalar).collect(),
    };
    let (cache, memory) = (cache_rate(threads, IN_CACHE), memory_rate(threads, 128 << 20));
    let mut progress = ProgressLine::new();
    let mut points = Vec::new();
    let mut ceilings = Vec::new();
    for set in sets {
        let top = Ceilings { cache, memory, int8: peak_gops(set, threads).map(|g| g * 1e9), f32: peak_gflops(set, threads).map(|g| g * 1e9) };
        for (_, format) in FORMATS.into_iter().filter(|f| args.format.as_deref().is_none_or(|name| name == f.0)) {
            for bits in if format.is_quantised() { &[Some(ActivationBits::Sixteen), Some(ActivationBits::Eight)][..] } else { &[None] } {
                progress.show(|| format!("{} {format}", set.name()));
                measure(set, format, *bits, threads, Duration::from_millis(args.time), &top, &mut points)?;
            }
        }
        ceilings.push((set, top));
    }
    progress.end(None);
    if args.json {
        output::json_line(&json!({
            "kernels": points.iter().map(Point::json).collect::<Vec<_>>(), "threads": threads, "cpu": system::cpu_name(),
            "available": KernelSet::available().iter().map(|s| s.name()).collect::<Vec<_>>(), "used": KernelSet::automatic().name(),
            "ceilings": {
                "l2_gb_s": cache / 1e9, "memory_gb_s": memory / 1e9,
                "sets": ceilings.iter().map(|(set, top)| json!({"kernels": set.name(), "int8_gop_s": top.int8.map(|r| r / 1e9), "f32_gflop_s": top.f32.map(|r| r / 1e9)})).collect::<Vec<_>>(),
            },
        }));
        return Ok(());
    }
    let names = KernelSet::available().iter().map(|s| s.name()).collect::<Vec<_>>().join(", ");
    output::line(&format!("{}, {threads} threads; kernel sets: {names}; chosen: {}", system::cpu_name(), KernelSet::automatic().name()));
    output::line(&format!("bare loops: {:.1} GB/s from L2, {:.1} GB/s from memory", cache / 1e9, memory / 1e9));
    for (set, top) in &ceilings {
        let show = |r: Option<f64>| r.map_or("-".to_owned(), |r| format!("{:.0}", r / 1e9));
        output::line(&format!("{}: {} Gop/s of int8, {} Gflop/s of f32", set.name(), show(top.int8), show(top.f32)));
    }
    output::line(&format!(
        "{:<9} {:<18} {:>4} {:>5} {:<7} {:>8} {:>9} {:>7} {:<7} bytes",
        "kernels", "format", "act", "rows", "from", "GB/s", "GMAC/s", "share", "of"
    ));
    points.iter().for_each(|p| output::line(&p.line()));
    Ok(())
}

impl Point {
    fn json(&self) -> Value {
        json!({
            "kernels": self.set.name(), "format": self.format.to_string(), "activation_bits": self.bits, "rows": self.rows, "from": self.place,
            "gb_s": self.gb_s, "gmac_s": self.gmac_s, "share_of_limit": self.share, "bound": self.bound, "equals_scalar": self.equal,
        })
    }

    fn line(&self) -> String {
        format!(
            "{:<9} {:<18} {:>4} {:>5} {:<7} {:>8.1} {:>9.1} {:>7} {:<7} {}",
            self.set.name(),
            self.format.to_string(),
            self.bits.map_or("f32".to_owned(), |b| b.to_string()),
            self.rows,
            self.place,
            self.gb_s,
            self.gmac_s,
            self.share.map_or("-".to_owned(), |s| format!("{:.0} %", s * 100.0)),
            self.bound,
            if self.equal { "equal" } else { "DIFFER" },
        )
    }
}

/// Weights of small, ordinary numbers: any bytes in the lines, scales of one size.
fn weights(rows: usize, cols: usize, format: WeightFormat) -> PackedMatrix {
    let layout = PackedLayout::new(rows, cols, format);
    let mut data = AlignedBytes::zeroed(layout.bytes());
    let mut random = Xorshift::new(1);
    for (i, byte) in data.iter_mut().enumerate() {
        let block = i % layout.tile_bytes() % layout.block_bytes().max(1);
        *byte = match format.is_quantised() {
            true if block < layout.line_bytes() => random.next() as u8,
            // Halves near 0.02, exponents near 2^-8.
            true if format == WeightFormat::Block(BlockFormat::Mxfp4) => 119,
            true => 0x24,
            // The byte with the exponent keeps magnitudes near each other.
            false if i % 2 == 1 => 0x2c,
            false => random.next() as u8,
        };
    }
    PackedMatrix { layout, data }
}

fn cpu(set: KernelSet, bits: Option<ActivationBits>, threads: usize) -> Result<Cpu, Error> {
    Ok(Cpu::new(CpuOptions { threads: Some(threads), kernels: Some(set), activation_bits: bits.unwrap_or_default() })?)
}

fn measure(
    set: KernelSet,
    format: WeightFormat,
    bits: Option<ActivationBits>,
    threads: usize,
    time: Duration,
    top: &Ceilings,
    points: &mut Vec<Point>,
) -> Result<(), Error> {
    let fast = cpu(set, bits, threads)?;
    let scalar = cpu(KernelSet::Scalar, bits, 1)?;
    let mut random = Xorshift::new(2);
    let values: Vec<f32> = (0..ROWS[3] * COLS).map(|_| random.normal()).collect();
    let row_bytes = |cols: usize| PackedLayout::new(16, cols, format).bytes() / 16;
    // More than the rows that take f32 activations whatever the format.
    let small = weights((IN_CACHE / row_bytes(COLS_IN_CACHE) / 16 * 16 * threads).max(80), COLS_IN_CACHE, format);
    let large = weights(COLS, COLS, format);
    let equal = {
        let (a, b) = (product(&fast, &small, &values), product(&scalar, &small, &values));
        a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits())
    };
    let planes = bits.map(|b| if b == ActivationBits::Sixteen { 2.0 } else { 1.0 });
    for (place, matrix, copies, rate) in [("l2", small, 1, top.cache), ("memory", large, IN_MEMORY.div_ceil(row_bytes(COLS) * COLS), top.memory)] {
        let (bytes, cols) = (matrix.layout.bytes() as f64, matrix.layout.cols);
        let macs = (matrix.layout.rows * cols) as f64;
        let mut x = fast.tensor(ROWS[3], cols);
        fast.upload(&mut x, 0, &values[..ROWS[3] * cols]);
        let mut out = fast.tensor(ROWS[3], matrix.layout.rows);
        let weights: Vec<_> = (0..copies).map(|_| fast.weight(matrix.clone())).collect();
        for rows in ROWS {
            let seconds = best(&fast, &weights, &x, rows, &mut out, time);
            let macs = macs * rows as f64;
            let arithmetic = match planes {
                Some(planes) => top.int8.map(|peak| 2.0 * planes * macs / peak),
                None => top.f32.map(|peak| 2.0 * macs / peak),
            };
            let reading = bytes / rate;
            let bound = if arithmetic.is_some_and(|a| a > reading) { if planes.is_some() { "int8" } else { "f32" } } else { place };
            points.push(Point {
                set,
                format,
                bits: planes.map(|p| (p * 8.0) as u8),
                rows,
                place,
                gb_s: bytes / seconds / 1e9,
                gmac_s: macs / seconds / 1e9,
                share: arithmetic.map(|a| a.max(reading) / seconds),
                bound,
                equal,
            });
        }
    }
    Ok(())
}

fn product(cpu: &Cpu, matrix: &PackedMatrix, values: &[f32]) -> Vec<f32> {
    let (rows, cols) = (5, matrix.layout.cols);
    let mut x = cpu.tensor(rows, cols);
    cpu.upload(&mut x, 0, &values[..rows * cols]);
    let mut out = cpu.tensor(rows, matrix.layout.rows);
    cpu.linear(&x, rows, &mut [(&cpu.weight(matrix.clone()), &mut out)]);
    let mut got = vec![0.0; rows * matrix.layout.rows];
    cpu.read(&out, 0, &mut got);
    got
}

/// Seconds per matrix: the best of rounds over a quarter of the matrices.
fn best(cpu: &Cpu, weights: &[mach_cpu::Weight], x: &mach_cpu::Tensor, rows: usize, out: &mut mach_cpu::Tensor, time: Duration) -> f64 {
    let (began, mut best, mut next) = (Instant::now(), f64::INFINITY, 0);
    let round = if weights.len() == 1 { 32 } else { (weights.len() / 4).max(1) / if rows > 4 { 8 } else { 1 } }.max(1);
    while began.elapsed() < time || best == f64::INFINITY {
        let start = Instant::now();
        for _ in 0..round {
            cpu.linear(x, rows, &mut [(&weights[next % weights.len()], &mut *out)]);
            next += 1;
        }
        best = best.min(start.elapsed().as_secs_f64() / round as f64);
    }
    best
}
