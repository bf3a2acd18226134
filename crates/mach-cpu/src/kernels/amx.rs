//! AMX int8: a block of a packed tile is a B tile (16 rows of K groups × 16 output rows × 4 bytes) once its numbers are
//! taken apart, activation rows are the A tile as they lie, and `tdpbsud` gives 16 × 16 exact sums. One or two rows go by VNNI.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::avx512::Avx512;
use super::simd::{Kernel, LANES};
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
    /// Tile 0 takes the sums of `rows` activation rows, tile 1 `block` bytes of each, tile 2 as many columns of 16 rows of weights.
    const fn product(rows: u8, block: u8) -> Self {
        let mut c = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        (c.rows[0], c.row_bytes[0]) = (rows, 64);
        (c.rows[1], c.row_bytes[1]) = (rows, block as u16);
        (c.rows[2], c.row_bytes[2]) = (block / 4, 64);
        c
    }

    /// All eight tiles as large as they can be.
    pub(crate) const fn full() -> Self {
        let mut c = Self::product(16, 64);
        let mut tile = 3;
        while tile < 8 {
            (c.rows[tile], c.row_bytes[tile]) = (16, 64);
            tile += 1;
        }
        c
    }
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
    unsafe fn begin<const BLK: usize>(rows: usize) {
        let config = TileConfig::product(rows as u8, BLK as u8);
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
    }

    /// The tile registers must be clean before a thread sleeps, or every switch saves 8 KiB.
    #[inline(always)]
    unsafe fn end() {
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }

    /// `tileloadd` waits for stores that are fresh, so weights are taken apart a panel ahead.
    #[inline(always)]
    unsafe fn dot_wide(w: *const u8, x: *const i8, stride: usize, out: *mut [i32; LANES]) {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {stride}]",
            "tileloadd tmm2, [{w} + {line}]",
            "tdpbsud tmm0, tmm1, tmm2",
            "tilestored [{out} + {line}], tmm0",
            x = in(reg) x,
            stride = in(reg) stride,
            w = in(reg) w,
            out = in(reg) out,
            line = in(reg) 64_usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack, preserves_flags),
        );
    }
}
