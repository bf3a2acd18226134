//! FP8 numbers of four exponent bits and three of mantissa (E4M3), and exponents that are scales (E8M0).

/// E4M3 → f32, exact. `0x7f` and `0xff` are no numbers.
pub fn e4m3(code: u8) -> f32 {
    let magnitude = match code & 127 {
        127 => f32::NAN,
        // The exponent field begins at 7 below f32's bias, so that numbers without a leading one come out as f32's own.
        bits => f32::from_bits(u32::from(bits) << 20) * f32::from_bits((127 + 120) << 23),
    };
    if code > 127 { -magnitude } else { magnitude }
}

/// `2^(e − 127)` as bfloat16, exact; 255 is no number.
pub(crate) fn e8m0_bf16(e: u8) -> [u8; 2] {
    match e {
        0 => 0x0040_u16,
        255 => 0x7fc0,
        _ => u16::from(e) << 7,
    }
    .to_le_bytes()
}

/// Scales of every `from` columns → of every `to`, which divides them; exponents become bfloat16.
pub(crate) fn spread(scales: &[u8], row_bytes: usize, width: usize, exponents: bool, [cols, from, to]: [usize; 3]) -> Vec<u8> {
    let mut out = Vec::with_capacity(scales.len() / row_bytes * (cols / to) * if exponents { 2 } else { width });
    for row in scales.chunks_exact(row_bytes) {
        for g in 0..cols / to {
            let scale = &row[g * to / from * width..][..width];
            if exponents { out.extend(e8m0_bf16(scale[0])) } else { out.extend(scale) }
        }
    }
    out
}
