//! AMX int8: a block of a packed tile is a B tile (16 rows of K groups × 16 output rows × 4 bytes) once nibbles are
//! unpacked, activation rows are the A tile, and `tdpbsud` gives 16 × 16 exact sums. Few rows go by VNNI.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::avx512::{Avx512, six_bits};
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

/// `ldtilecfg`'s operand: palette 1; tile 0 = sums, 1 = activations, 2 = weights.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const fn config(block: u8) -> TileConfig {
    let mut c = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    (c.rows[0], c.row_bytes[0]) = (16, 64);
    (c.rows[1], c.row_bytes[1]) = (16, block as u16);
    (c.rows[2], c.row_bytes[2]) = (block / 4, 64);
    c
}

static CONFIG: [TileConfig; 3] = [config(16), config(32), config(64)];

#[repr(C, align(64))]
struct Lines([[u8; 64]; 16]);

impl Kernel for Amx {
    type V = Avx512;
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
    unsafe fn begin<const BLK: usize>() {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG[BLK / 32], options(nostack, readonly, preserves_flags));
    }

    /// The tile registers must be clean before a thread sleeps, or every switch saves 8 KiB.
    #[inline(always)]
    unsafe fn end() {
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }

    #[inline(always)]
    unsafe fn dot_wide<const BITS: u8, const BLK: usize>(w: *const u8, x: &[*const i8], out: &mut [[i32; LANES]; LANES]) {
        let mut rows = Lines([[0; 64]; 16]);
        for (row, &x) in rows.0.iter_mut().zip(x) {
            std::ptr::copy_nonoverlapping(x.cast::<u8>(), row.as_mut_ptr(), BLK);
        }
        let mut unpacked = Lines([[0; 64]; 16]);
        let weights = if const { BITS == 4 } {
            let nibble = _mm512_set1_epi8(15);
            for line in 0..BLK / 8 {
                let bytes = _mm512_loadu_si512(w.add(line * 64).cast());
                _mm512_store_si512(unpacked.0[line * 2].as_mut_ptr().cast(), _mm512_and_si512(bytes, nibble));
                _mm512_store_si512(unpacked.0[line * 2 + 1].as_mut_ptr().cast(), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble));
            }
            unpacked.0.as_ptr().cast()
        } else if const { BITS == 6 } {
            for sixteen in 0..BLK / 16 {
                let codes = six_bits(w.add(sixteen * 192));
                for four in 0..4 {
                    _mm512_store_si512(unpacked.0[sixteen * 4 + four].as_mut_ptr().cast(), codes[four]);
                }
            }
            unpacked.0.as_ptr().cast()
        } else {
            w
        };
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {stride}]",
            "tileloadd tmm2, [{w} + {stride}]",
            "tdpbsud tmm0, tmm1, tmm2",
            "tilestored [{out} + {stride}], tmm0",
            x = in(reg) rows.0.as_ptr(),
            w = in(reg) weights,
            out = in(reg) out.as_mut_ptr(),
            stride = in(reg) 64_usize,
            options(nostack, preserves_flags),
        );
    }
}
