//! What an instruction set must offer: 16 f32 lanes, and exact integer products of packed weights.
//!
//! Kernels are written once over these two traits. Every operation is exactly rounded or exact, so all
//! implementations give the same bytes; nothing here may use an approximation (`rcp`, `rsqrt`) or reassociate.

/// Virtual lanes of every vector, whatever the registers hold.
pub(crate) const LANES: usize = 16;

/// 16 lanes of f32 and i32.
///
/// # Safety
/// Every function needs the instruction set of the implementation, and pointers that are valid for what it says to read
/// or write (16 elements unless stated). No alignment is needed.
pub(crate) trait Simd: Copy + 'static {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;

    /// Whether 32 vectors fit in registers.
    const MANY_REGISTERS: bool = false;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`, so that a NaN in `b` stays.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// `a > b ? 0 : x`.
    unsafe fn zero_where_gt(a: Self::F, b: Self::F, x: Self::F) -> Self::F;
    /// Bit `i` is `a[i] > b[i]`.
    unsafe fn gt_bits(a: Self::F, b: Self::F) -> u32;
    /// Lanes `i + 8`, `i + 4`, `i + 2`, `i + 1` are added to lane `i`, in this order of halving.
    unsafe fn sum(a: Self::F) -> f32;

    /// f16 → f32.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// bf16 → f32.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// 16 pairs of f16, one per output row, in whatever lane order suits; see the next two.
    unsafe fn f16_pairs(p: *const u8) -> [Self::F; 2];
    /// Two activations spread to match [`Simd::f16_pairs`].
    unsafe fn f16_pair_x(even: f32, odd: f32) -> [Self::F; 2];
    /// Even chain + odd chain of each output row.
    unsafe fn f16_pair_sum(acc: [Self::F; 2]) -> Self::F;

    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn load_i(p: *const i32) -> Self::I;
    /// Writes all 64 bytes.
    unsafe fn store_i(p: *mut u8, a: Self::I);
    /// Every byte, below 16, replaced by what the table has there.
    unsafe fn lookup(table: &[u8; 16], a: Self::I) -> Self::I;
    unsafe fn xor_i(a: Self::I, b: Self::I) -> Self::I;
    /// Sums of bytes, without carries between them.
    unsafe fn add_bytes(a: Self::I, b: Self::I) -> Self::I;
    /// All bits of the bytes that are equal.
    unsafe fn equal_bytes(a: Self::I, b: Self::I) -> Self::I;
    /// The lowest byte of every lane in all four.
    unsafe fn spread_byte(a: Self::I) -> Self::I;
    /// What the table has at each lane's index.
    ///
    /// # Safety
    /// Every lane is an index of the table.
    #[inline(always)]
    unsafe fn gather4(table: &[u32], index: Self::I) -> Self::I {
        let mut at = [0_u32; LANES];
        Self::store_i(at.as_mut_ptr().cast(), index);
        for lane in &mut at {
            *lane = *table.get_unchecked(*lane as usize);
        }
        Self::load_i(at.as_ptr().cast())
    }
    /// The same with entries of eight bytes: the first four of each, then the others.
    ///
    /// # Safety
    /// As [`Simd::gather4`].
    #[inline(always)]
    unsafe fn gather8(table: &[u64], index: Self::I) -> [Self::I; 2] {
        let (mut low, mut high) = ([0_u32; LANES], [0_u32; LANES]);
        Self::store_i(low.as_mut_ptr().cast(), index);
        for i in 0..LANES {
            let entry = *table.get_unchecked(low[i] as usize);
            (low[i], high[i]) = (entry as u32, (entry >> 32) as u32);
        }
        [Self::load_i(low.as_ptr().cast()), Self::load_i(high.as_ptr().cast())]
    }
    /// 16 bytes, widened.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    unsafe fn load_i8(p: *const i8) -> Self::I;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn max_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shl_i<const N: i32>(a: Self::I) -> Self::I;
    /// All lanes shifted right (logically) by the same `n`.
    unsafe fn shr_i(a: Self::I, n: u32) -> Self::I;
    /// Largest lane.
    unsafe fn largest_i(a: Self::I) -> i32;
    /// Sum of the lanes.
    unsafe fn sum_i(a: Self::I) -> i32;
    /// Integers as numbers.
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// Rounded to the nearest, ties to even; lanes must be within ±2³⁰ or ignored later.
    unsafe fn round(a: Self::F) -> Self::I;
    /// The lanes' bits.
    unsafe fn bits(a: Self::F) -> Self::I;
    /// Numbers with these bits.
    unsafe fn from_bits(a: Self::I) -> Self::F;
    /// Stores the lanes, all from −128 to 127, as bytes.
    unsafe fn store_i8(p: *mut i8, a: Self::I);

    /// Stores the lanes as i16, of every four the first and third before the others.
    ///
    /// # Safety
    /// Only where [`Kernel::I16`].
    #[inline(always)]
    unsafe fn store_i16(_p: *mut i16, _a: Self::I) {}

    /// Asks for the line at `p`, which need not be valid.
    unsafe fn prefetch(p: *const u8);
}

/// A kernel set: vectors and the integer products.
pub(crate) trait Kernel: 'static {
    type V: Simd;

    /// Exact `Σ_k q[row][k] · x[r][k]` over one block of `BLK` columns of a packed tile for 16 rows and `R` activation rows.
    ///
    /// `sums[r]` is `Σ_k x[r][k]`, for sets whose weights must be signed.
    ///
    /// # Safety
    /// Needs the instruction set; `w` is valid for the lines of `BLK` columns, each `x[r]` for `BLK` bytes.
    unsafe fn dot<const BITS: u8, const BLK: usize, const R: usize>(w: *const u8, x: [*const i8; R], sums: [i32; R]) -> [<Self::V as Simd>::I; R];

    /// Whether the set multiplies bytes by integers of 16 bits ([`Kernel::dot_i16`]).
    const I16: bool = false;

    /// Exact `Σ_k q[row][k] · x[r][k]` of byte weights and integers as [`Simd::store_i16`] wrote them.
    ///
    /// # Safety
    /// As [`Kernel::dot`]; only where [`Kernel::I16`].
    #[inline(always)]
    unsafe fn dot_i16<const BLK: usize, const R: usize>(_w: *const u8, _x: [*const i16; R]) -> [<Self::V as Simd>::I; R] {
        [Self::V::splat_i(0); R]
    }

    /// `acc` and the exact products of eight columns: numbers of at most 6 bits of 16 rows, four bytes each, and eight activations.
    ///
    /// # Safety
    /// Needs the instruction set; `x` is valid for eight bytes.
    unsafe fn add_eight(acc: <Self::V as Simd>::I, codes: [<Self::V as Simd>::I; 2], x: *const i8) -> <Self::V as Simd>::I;

    /// Whether numbers of 6 bits, and of 4 for [`Kernel::dot_i16`], are taken apart where many rows share them, and [`Kernel::add_eight`]
    /// multiplies those that are apart.
    const UNPACKS: bool = false;
    /// Whether numbers of 4 bits are taken apart for planes of bytes too.
    const UNPACKS_NIBBLES: bool = false;

    /// Activation rows that [`Kernel::dot`] takes at most: fewer leave multipliers idle, more do not fit into registers.
    const TOGETHER: usize = 4;

    /// Whether the set has a matrix unit, for which the functions below are.
    const WIDE: bool = false;

    /// Sets the unit of this thread up for `planes` planes of activations, at most 16, and blocks of `BLK` columns.
    ///
    /// # Safety
    /// Needs the instruction set.
    #[inline(always)]
    unsafe fn begin<const BLK: usize>(_planes: usize) {}

    /// Part `part` of [`LANES`] of a step: begins exact products of a block of byte weights of `TILES` tiles (1 or 2) with planes of
    /// activations, and stores the sums that the step before, of the other `PARITY`, began. All parts follow each other, with other work
    /// between them: a processor that takes such instructions apart has nothing else to do meanwhile.
    ///
    /// # Safety
    /// [`Kernel::begin`] came before, and the operands are valid for what they say.
    #[inline(always)]
    unsafe fn step_part<const TILES: usize, const PARITY: usize>(_part: usize, _at: &StepOperands) {}

    /// Comes after the last product.
    ///
    /// # Safety
    /// Needs the instruction set.
    #[inline(always)]
    unsafe fn end() {}
}

/// What a step of a matrix unit reads and writes.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Only x86-64 has a set with a matrix unit.
pub(crate) struct StepOperands {
    /// Where the sums of before go, `[tile][plane][row]` with room for 16 planes.
    pub stored: *mut i32,
    /// Planes of a block, `stride` bytes apart.
    pub x: *const i8,
    pub stride: usize,
    /// The block's lines in each tile of weights.
    pub w: [*const u8; 2],
}
