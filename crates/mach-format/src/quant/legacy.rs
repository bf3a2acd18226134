//! ggml's first formats, 32 values each: a half `d`, in `_1` types a half `m`, in `Q5` types 32 bits for the fifth bit of
//! every number, then 16 bytes of nibbles (byte `j` holds `j` low, `j + 16` high). `x = d·(q − 8)` (16 for 5 bits) in `_0`
//! types, `x = d·q + m` in `_1` types. IQ4_NL is as Q4_0, with a table in place of `q − 8`.

use super::half_at;
use super::units::{Units, halves, put_half};
use crate::format::BlockFormat;
use crate::packed::UNIT;

/// Numbers of 5 bits: nibbles from `at` on, bits in the four bytes before.
fn five(block: &[u8], at: usize) -> [u8; UNIT] {
    let high = u32::from_le_bytes([0, 1, 2, 3].map(|i| block[at - 4 + i]));
    let mut out = halves(&block[at..]);
    for (i, q) in out.iter_mut().enumerate() {
        *q |= ((high >> i & 1) as u8) << 4;
    }
    out
}

macro_rules! legacy {
    ($type:ident, $format:ident, $ggml:literal, $numbers:expr, $min:literal) => {
        pub(super) struct $type;

        impl Units for $type {
            const FORMAT: BlockFormat = BlockFormat::$format;
            const GGML: Option<u32> = Some($ggml);

            fn numbers(block: &[u8], _: usize) -> [u8; UNIT] {
                $numbers(block)
            }

            fn scale(block: &[u8], _: usize) -> (f32, f32) {
                (half_at(block, 0), if $min { -half_at(block, 2) } else { 0.0 })
            }

            fn params(block: &[u8], out: &mut [u8], row: usize) {
                put_half(block, 0, out, 0, row);
                if $min {
                    put_half(block, 2, out, 2, row);
                }
            }
        }
    };
}

legacy!(Q40, Q4_0, 2, |block: &[u8]| halves(&block[2..]), false);
legacy!(Q41, Q4_1, 3, |block: &[u8]| halves(&block[4..]), true);
legacy!(Q50, Q5_0, 6, |block: &[u8]| five(block, 6), false);
legacy!(Q51, Q5_1, 7, |block: &[u8]| five(block, 8), true);
legacy!(Iq4Nl, Iq4Nl, 20, |block: &[u8]| halves(&block[2..]), false);
