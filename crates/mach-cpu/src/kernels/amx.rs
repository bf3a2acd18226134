//! AMX int8: a block of a packed tile is a B tile (16 rows of K groups × 16 output rows × 4 bytes) once its numbers are
//! taken apart, activation rows are the A tile once they are gathered, and `tdpbsud` gives 16 × 16 exact sums. Few rows go by VNNI.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::avx512::Avx512;
use super::simd::{Kernel, LANES, StepOperands};
use super::vnni::Vnni;

pub(crate) struct Amx;

/// Whether the processor has AMX int8 and the system lets this process use it.
pub(crate) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        let leaf = __cpuid_count(7, 0);
        let (tile, int8) = (leaf.edx >> 24 & 1, leaf.edx >> 25 & 1);
        tile == 1 && int8 == 1 && request_tile_data()
    })
}

/// Asks Linux for the tile registers' state, once per process; threads started before and after have it.
#[cfg(target_os = "linux")]
fn request_tile_data() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: takes two integers and changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_tile_data() -> bool {
    false
}

/// `ldtilecfg`'s operand: palette 1, then bytes of a row and rows of every tile.
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Tiles 0 to 3 take the sums of `planes` planes, tiles 4 and 5 `block` bytes of each, tiles 6 and 7 as many columns of 16 rows of
    /// weights.
    const fn product(planes: u8, block: u8) -> Self {
        let mut c = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut tile = 0;
        while tile < 8 {
            (c.rows[tile], c.row_bytes[tile]) = match tile {
                0..4 => (planes, 64),
                4 | 5 => (planes, block as u16),
                _ => (block / 4, 64),
            };
            tile += 1;
        }
        c
    }

    /// All eight tiles as large as they can be.
    pub(crate) const fn full() -> Self {
        Self::product(16, 64)
    }
}

macro_rules! store {
    ($tile:literal, $to:expr) => {
        asm!(concat!("tilestored [{to} + {line}], tmm", $tile), to = in(reg) $to, line = in(reg) 64_usize, options(nostack, preserves_flags))
    };
}

macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nostack, nomem, preserves_flags))
    };
}

macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(concat!("tileloadd tmm", $tile, ", [{from} + {stride}]"), from = in(reg) $from, stride = in(reg) $stride, options(nostack, readonly, preserves_flags))
    };
}

macro_rules! product {
    ($sums:literal, $x:literal, $w:literal) => {
        asm!(concat!("tdpbsud tmm", $sums, ", tmm", $x, ", tmm", $w), options(nostack, nomem, preserves_flags))
    };
}

/// A step with one tile of weights: stores the sums `$before` of the step before. Registers of tiles are not renamed: what is loaded next
/// must be others than those in use.
macro_rules! one {
    ($part:ident, $at:ident, $sums:literal, $before:literal, $x:literal, $w:literal) => {
        match $part {
            0 => zero!($sums),
            2 => load!($x, $at.x, $at.stride),
            4 => load!($w, $at.w[0], 64_usize),
            6 => product!($sums, $x, $w),
            11 => store!($before, $at.stored),
            _ => {}
        }
    };
}

/// A step with two, which share the activations.
macro_rules! two {
    ($part:ident, $at:ident, [$first:literal, $second:literal], [$first_before:literal, $second_before:literal], $x:literal) => {
        match $part {
            0 => zero!($first),
            1 => load!($x, $at.x, $at.stride),
            2 => load!("6", $at.w[0], 64_usize),
            4 => product!($first, $x, "6"),
            5 => zero!($second),
            6 => load!("7", $at.w[1], 64_usize),
            8 => product!($second, $x, "7"),
            10 => store!($first_before, $at.stored),
            13 => store!($second_before, $at.stored.add(LANES * LANES)),
            _ => {}
        }
    };
}

impl Kernel for Amx {
    type V = Avx512;
    const UNPACKS: bool = true;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], sums: [i32; R]) -> [__m512i; R] {
        Vnni::dot::<BITS, BLK, R>(w, x, sums)
    }

    #[inline(always)]
    unsafe fn add_eight(acc: __m512i, codes: [__m512i; 2], x: *const i8) -> __m512i {
        Vnni::add_eight(acc, codes, x)
    }

    #[inline(always)]
    unsafe fn begin<const BLK: usize>(planes: usize) {
        let config = TileConfig::product(planes as u8, BLK as u8);
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
    }

    #[inline(always)]
    unsafe fn step_part<const TILES: usize, const PARITY: usize>(part: usize, at: &StepOperands) {
        match (TILES, PARITY) {
            (1, 0) => one!(part, at, "0", "1", "4", "6"),
            (1, _) => one!(part, at, "1", "0", "5", "7"),
            (_, 0) => two!(part, at, ["0", "1"], ["2", "3"], "4"),
            _ => two!(part, at, ["2", "3"], ["0", "1"], "5"),
        }
    }

    /// The tile registers must be clean before a thread sleeps, or every switch saves 8 KiB.
    #[inline(always)]
    unsafe fn end() {
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }
}
