//! Kernels: written once over [`simd::Simd`] and [`simd::Kernel`], compiled once per instruction set, and reached through
//! one table of function pointers. **Every set gives the same bytes.**
//!
//! All functions below are unsafe for the same two reasons: they need the instruction set of their table, and they
//! take pointers. The tables are handed out only for sets that the processor has ([`KernelSet::available`]).
#![allow(unsafe_op_in_unsafe_fn)] // Whole bodies are intrinsics and pointer reads under the contract above.
#![allow(clippy::needless_range_loop)] // Indexed loops over small arrays are what unrolls into registers.

mod attention;
mod blocks;
mod fp8;
mod latent;
mod math;
mod plain;
mod products;
mod recurrence;
mod rows;
mod scalar;
mod simd;
mod unpack;
mod wide;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
#[cfg(target_arch = "x86_64")]
mod vnni;

use mach_backend::Activation;
use mach_format::PackedLayout;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::TileConfig;
pub(crate) use attention::{MAX_HEADS, PARTIAL_HEADER, SegmentArgs};
pub(crate) use latent::MAX_STREAMS;
pub(crate) use plain::PlainRows;
pub(crate) use products::{MAX_ROWS, QuantRows};
pub(crate) use recurrence::{DeltaHead, MAX_TOKENS};
pub(crate) use simd::LANES;
pub(crate) use unpack::UnpackPanel;
pub(crate) use wide::{WideRows, wide_from};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelSet {
    /// No vector instructions: the twin of all others.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with AVX-VNNI, as client processors have it.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Vnni,
    /// VNNI with AMX int8 tiles.
    Amx,
    /// 64-bit ARM.
    Neon,
    /// NEON with the dot product instructions.
    NeonDot,
    /// NEON with int8 matrix multiplication.
    NeonI8mm,
}

impl KernelSet {
    /// All sets, the plainest first.
    pub const ALL: [Self; 9] = [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Vnni, Self::Amx, Self::Neon, Self::NeonDot, Self::NeonI8mm];

    /// The name that `MACH_KERNELS` and the signal line use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Vnni => "vnni",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dot",
            Self::NeonI8mm => "neon-i8mm",
        }
    }

    /// The set of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.name() == name)
    }

    /// Sets that this processor can run, the plainest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|set| set.table().is_some()).collect()
    }

    /// The kernels, if this processor has what they need.
    pub(crate) fn table(self) -> Option<&'static Kernels> {
        match self {
            Self::Scalar => Some(&scalar_kernels::TABLE),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has_avx2().then_some(&avx2_kernels::TABLE),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => (has_avx2() && is_x86_feature_detected!("avxvnni")).then_some(&avx_vnni_kernels::TABLE),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => has_avx512().then_some(&avx512_kernels::TABLE),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => (has_avx512() && is_x86_feature_detected!("avx512vnni")).then_some(&vnni_kernels::TABLE),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => (has_avx512() && is_x86_feature_detected!("avx512vnni") && amx::permitted()).then_some(&amx_kernels::TABLE),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => Some(&neon_kernels::TABLE),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod").then_some(&neon_dot_kernels::TABLE),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => {
                (std::arch::is_aarch64_feature_detected!("dotprod") && std::arch::is_aarch64_feature_detected!("i8mm")).then_some(&neon_i8mm_kernels::TABLE)
            }
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Every kernel: `K` ones are generic over the kernel set, `V` ones over its vectors.
macro_rules! for_all_kernels {
    ($callback:ident!($($extra:tt)*)) => {
        $callback! { ($($extra)*)
            K products::quantise_row(to: &QuantRows, row: usize);
            V unpack::unpack_panel(layout: &PackedLayout, tile: *const u8, first: usize, columns: usize, block: usize, codes: *mut u8, scales: *mut f32);
            K products::quant_tile(unpack: UnpackPanel, layout: &PackedLayout, tile: *const u8, acts: &QuantRows, rows: &[u32], out: *mut f32);
            V wide::gather(acts: &QuantRows, rows: &[u32], to: &WideRows);
            K wide::wide_tiles(unpack: UnpackPanel, layout: &PackedLayout, tiles: (*const u8, usize), acts: &QuantRows, rows: &[u32], wide: &WideRows, out: *mut f32);
            V blocks::dequantise_tile(unpack: UnpackPanel, layout: &PackedLayout, tile: *const u8, out: *mut f32);
            V plain::plain_tiles(layout: &PackedLayout, data: *const u8, tiles: usize, acts: &PlainRows, rows: &[u32], out: *mut f32);
            V rows::rms_norm(x: *const f32, w: *const f32, n: usize, eps: f32, out: *mut f32);
            V rows::add(x: *mut f32, y: *const f32, n: usize);
            V rows::add_scaled(x: *mut f32, w: f32, y: *const f32, n: usize);
            V rows::activate(activation: &Activation, gate: *const f32, up: *const f32, bias: [*const f32; 2], n: usize, out: *mut f32);
            V rows::scale(x: *mut f32, n: usize, by: f32);
            V rows::soft_cap(x: *mut f32, n: usize, cap: f32);
            V rows::sqrt_softplus(x: *mut f32, n: usize);
            V rows::sigmoid(x: *mut f32, n: usize);
            V rows::rope(x: *mut f32, rope: *const f32, half: usize);
            V rows::softmax(x: *mut f32, n: usize);
            V rows::conv_silu(w: *const f32, w_stride: usize, x: &[*const f32], first: usize, n: usize, ahead: *const f32, out: *mut f32);
            V rows::l2_norm(x: *mut f32, n: usize, scale: f32);
            V rows::gates(a: *const f32, b: *const f32, neg_exp_a: *const f32, dt_bias: *const f32, n: usize, decay: *mut f32, beta: *mut f32);
            V rows::gated_norm(x: *const f32, w: *const f32, z: *const f32, n: usize, eps: f32, ahead: *const f32, out: *mut f32);
            V recurrence::delta_head(head: &DeltaHead);
            V latent::pool(keys: &[*const f32], gates: &[*const f32], n: usize, out: *mut f32);
            V latent::index_scores(q: *const f32, w: *const f32, heads: usize, dim: usize, keys: *const f32, out: *mut f32);
            V latent::inverse_rms(x: *const f32, n: usize, eps: f32, out: *mut f32);
            V latent::hyper_add(x: *mut f32, streams: usize, n: usize, y: *const f32, mix: *const f32);
            V attention::segment(args: &SegmentArgs);
            V attention::merge(into: *mut f32, from: *const f32, head_dim: usize);
            V attention::finish(partial: *const f32, gate: *const f32, head_dim: usize, out: *mut f32);
        }
    };
}

macro_rules! define_struct {
    (() $($kind:ident $module:ident::$name:ident($($arg:ident: $ty:ty),*);)*) => {
        /// The kernels of one set. See the generic functions of the same names for shapes.
        pub(crate) struct Kernels {
            pub set: KernelSet,
            /// Whether the set has a matrix unit: many rows go through `gather` and `wide_tiles`.
            pub wide: bool,
            /// Whether it multiplies integers of 16 bits, which are then stored beside their planes.
            pub i16: bool,
            $(pub $name: unsafe fn($($ty),*),)*
        }
    };
}
for_all_kernels!(define_struct!());

macro_rules! generic {
    (K $kernel:ty) => {
        $kernel
    };
    (V $kernel:ty) => {
        <$kernel as simd::Kernel>::V
    };
}

macro_rules! define_table {
    // A module each, so that the compiler works on several sets at once.
    (($module:ident, $set:ident, $kernel:ty $(, $feature:literal)?) $($rest:tt)*) => {
        mod $module {
            use super::*;

            pub(super) static TABLE: Kernels = {
                define_functions! { $kernel, ($($feature)?), $set, $($rest)* }
            };
        }
    };
}

macro_rules! define_functions {
    ($kernel:ty, $features:tt, $set:ident, $($kind:ident $module:ident::$name:ident($($arg:ident: $ty:ty),*);)*) => {
        $(define_function! { $features unsafe fn $name($($arg: $ty),*) { $module::$name::<generic!($kind $kernel)>($($arg),*) } })*
        Kernels { set: KernelSet::$set, wide: <$kernel as simd::Kernel>::WIDE, i16: <$kernel as simd::Kernel>::I16, $($name),* }
    };
}

macro_rules! define_function {
    (($feature:literal) $($function:tt)*) => { #[target_feature(enable = $feature)] $($function)* };
    (() $($function:tt)*) => { $($function)* };
}

for_all_kernels!(define_table!(scalar_kernels, Scalar, scalar::Scalar));
#[cfg(target_arch = "x86_64")]
for_all_kernels!(define_table!(avx2_kernels, Avx2, avx2::Avx2, "avx2,fma,f16c"));
#[cfg(target_arch = "x86_64")]
for_all_kernels!(define_table!(avx_vnni_kernels, AvxVnni, avx_vnni::AvxVnni, "avx2,fma,f16c,avxvnni"));
#[cfg(target_arch = "x86_64")]
for_all_kernels!(define_table!(avx512_kernels, Avx512, avx512::Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"));
#[cfg(target_arch = "x86_64")]
for_all_kernels!(define_table!(vnni_kernels, Vnni, vnni::Vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"));
#[cfg(target_arch = "x86_64")]
for_all_kernels!(define_table!(amx_kernels, Amx, amx::Amx, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"));
#[cfg(target_arch = "aarch64")]
for_all_kernels!(define_table!(neon_kernels, Neon, neon::Neon, "neon"));
#[cfg(target_arch = "aarch64")]
for_all_kernels!(define_table!(neon_dot_kernels, NeonDot, neon_dot::NeonDot, "neon,dotprod"));
#[cfg(target_arch = "aarch64")]
for_all_kernels!(define_table!(neon_i8mm_kernels, NeonI8mm, neon_i8mm::NeonI8mm, "neon,dotprod,i8mm"));
