//! The memory plan: what goes where inside the budget, and whether it can work at all. Pure arithmetic.

use mach_backend::{CompressSpec, EntrySpec, KV_BLOCK, KvSpec, KvType, LatentSpec, StateSpec};
use mach_experts::{Residency, floor_slots};

use crate::ModelError;
use crate::spec::{AttentionBlock, MixerSpec, ModelSpec};
use crate::workspace::{Chunks, scratch_bytes};

/// Warm sequences that the engine keeps.
pub const WARM_SEQUENCES: u64 = 2;
/// Recurrent states per warm sequence: its own, one to roll back to, two snapshots.
pub const STATES_PER_SEQUENCE: u64 = 4;
/// Tokens before its end to which a sequence can be cut without a snapshot: windows are kept that much longer.
pub const UNDO_TOKENS: usize = 2 * KV_BLOCK;
/// Largest context that is chosen without being asked for.
pub const DEFAULT_CONTEXT: usize = 32_768;
/// Program, stacks and small allocations.
const BASE_BYTES: u64 = 48 << 20;

/// What the user wants of the bank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BankSize {
    /// Bytes.
    Bytes(u64),
    /// Share of all routed experts, 0 to 1.
    Share(f64),
}

/// Streaming or resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResidencyChoice {
    /// By fit.
    Auto,
    /// `--streaming`.
    Streaming,
    /// `--no-streaming`.
    Resident,
}

/// Inputs of a plan that do not come from the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanOptions {
    /// `--memory-budget`.
    pub budget: Option<u64>,
    /// `--bank`.
    pub bank: Option<BankSize>,
    /// Mode.
    pub residency: ResidencyChoice,
    /// `--ctx-size`.
    pub context: Option<usize>,
    /// KV element type; `None` follows the checkpoint.
    pub kv: Option<KvType>,
    /// `--prefill-chunk`.
    pub chunk: Option<usize>,
    /// What the tokenizer takes.
    pub tokenizer_bytes: u64,
    /// Memory that the system (and the cgroup) can give.
    pub available: u64,
}

/// Facts of the model that a plan needs.
#[derive(Clone, Copy, Debug)]
pub struct Sizes<'a> {
    /// Shapes.
    pub spec: &'a ModelSpec,
    /// Always-active weights in memory.
    pub resident_bytes: u64,
    /// Bytes of one slot of the bank.
    pub slot_bytes: u64,
    /// Whether the weights are quantised (decides the KV type).
    pub quantised: bool,
}

/// Where the memory goes. All sizes in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// What must not be exceeded.
    pub budget: u64,
    /// Where the budget came from.
    pub budget_source: &'static str,
    /// Program and small things.
    pub base: u64,
    /// Tokenizer.
    pub tokenizer: u64,
    /// Always-active weights.
    pub resident: u64,
    /// Scratch of the forward pass.
    pub scratch: u64,
    /// Recurrent states of all warm sequences.
    pub states: u64,
    /// KV of a full context.
    pub kv: u64,
    /// Its blocks.
    pub kv_pools: Vec<KvPool>,
    /// KV that fits before the bank has to give up slots.
    pub kv_free: u64,
    /// KV element type.
    pub kv_type: KvType,
    /// Context in tokens.
    pub context: usize,
    /// Mode.
    pub residency: Residency,
    /// Slots of the bank at start.
    pub slots: usize,
    /// One slot.
    pub slot_bytes: u64,
    /// Routed experts of the model.
    pub experts: usize,
    /// Least slots: top-k of two layers.
    pub floor_slots: usize,
    /// Experts that one token uses: top-k × layers.
    pub working_set: usize,
    /// Row counts of the scratch.
    pub chunks: Chunks,
    /// Things to tell the user.
    pub warnings: Vec<String>,
}

/// Blocks of the layers that keep equally many tokens of a sequence: all of them, or those of one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPool {
    /// Tokens that a row sees, itself included; `None` for all.
    pub window: Option<usize>,
    /// Bytes of one block of [`KV_BLOCK`] positions over these layers.
    pub block_bytes: u64,
    /// Blocks of all sequences together.
    pub blocks: usize,
}

/// Blocks that `tokens` tokens touch which start anywhere.
const fn touched(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK) + 1
}

impl KvPool {
    /// Blocks for one sequence of `context` tokens in passes of at most `rows`, and `spare` windows of others and of snapshots.
    fn blocks(window: Option<usize>, context: usize, rows: usize, spare: usize) -> usize {
        let whole = context.div_ceil(KV_BLOCK);
        window.map_or(whole, |w| whole.min(touched(w + UNDO_TOKENS + rows) + spare * touched(w + UNDO_TOKENS)))
    }
}

/// How a model relates to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything, or at least one token's working set of experts.
    Fits,
    /// Streams, but every token reads nearly all of its experts.
    Tight,
    /// Cannot run.
    WontFit,
}

impl Verdict {
    /// `fits`, `tight`, `wont_fit`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fits => "fits",
            Self::Tight => "tight",
            Self::WontFit => "wont_fit",
        }
    }
}

/// The KV store of every attention layer, with its window.
pub(crate) fn kv_specs(spec: &ModelSpec, ty: KvType) -> Vec<(Option<usize>, KvSpec)> {
    let of = |m: &MixerSpec| match m {
        MixerSpec::Attention(AttentionBlock { attention: a, .. }) => Some((a.window, KvSpec { kv_heads: a.kv_heads, head_dim: a.head_dim, ty })),
        MixerSpec::Gdn(_) | MixerSpec::Latent(_) => None,
    };
    spec.layers.iter().filter_map(|l| of(&l.mixer)).collect()
}

/// The pools of a model: window and bytes of a block. Compressed entries stand for the whole context.
fn kv_pools(spec: &ModelSpec, ty: KvType) -> Vec<(Option<usize>, u64)> {
    let keys = kv_specs(spec, ty).into_iter().map(|(window, k)| (window, k.block_bytes() as u64));
    let entries = entry_specs(spec, ty).into_iter().map(|e| (None, e.block_bytes() as u64));
    let mut pools: Vec<(Option<usize>, u64)> = Vec::new();
    for (window, bytes) in keys.chain(entries) {
        match pools.iter_mut().find(|p| p.0 == window) {
            Some(pool) => pool.1 += bytes,
            None => pools.push((window, bytes)),
        }
    }
    pools
}

/// The stores of every layer with compressed entries: entries, then index keys where there are any.
pub(crate) fn entry_specs(spec: &ModelSpec, ty: KvType) -> Vec<EntrySpec> {
    let of = |m: &MixerSpec| match m {
        MixerSpec::Latent(l) => l.attention.compress.map(|c| (c, l.attention.dim)),
        MixerSpec::Attention(_) | MixerSpec::Gdn(_) => None,
    };
    let stores =
        |(c, dim): (CompressSpec, usize)| [Some(dim), c.index.map(|i| i.dim)].into_iter().flatten().map(move |width| EntrySpec { ratio: c.ratio, width, ty });
    spec.layers.iter().filter_map(|l| of(&l.mixer)).flat_map(stores).collect()
}

/// What each layer carries from token to token besides paged keys.
pub(crate) fn state_specs(spec: &ModelSpec, ty: KvType) -> Vec<Option<StateSpec>> {
    let of = |m: &MixerSpec| match m {
        MixerSpec::Gdn(g) => Some(StateSpec::Gdn(*g)),
        MixerSpec::Latent(l) => Some(StateSpec::Latent(LatentSpec { ty, ..l.attention })),
        MixerSpec::Attention(_) => None,
    };
    spec.layers.iter().map(|l| of(&l.mixer)).collect()
}

/// The budget when none was given: what is available less a reserve of an eighth, or of 2 GiB where that is at most a
/// quarter (going over physical memory costs far more than a smaller bank).
pub fn default_budget(available: u64) -> u64 {
    available - (available / 8).max((2 << 30).min(available / 4))
}

impl MemoryPlan {
    /// Plans a model.
    ///
    /// # Errors
    /// [`ModelError::Budget`] when it cannot run as asked, with the arithmetic.
    pub fn new(sizes: &Sizes<'_>, options: &PlanOptions) -> Result<Self, ModelError> {
        let spec = sizes.spec;
        let (budget, budget_source) = match options.budget {
            Some(b) => (b, "--memory-budget"),
            None => (default_budget(options.available), "available memory"),
        };
        let kv_type = options.kv.unwrap_or(if sizes.quantised { KvType::F16 } else { KvType::F32 });
        let pools = kv_pools(spec, kv_type);
        let experts = spec.routed_experts();
        let all_experts = experts as u64 * sizes.slot_bytes;
        let top_k = spec.top_k();
        let floor = floor_slots(top_k).min(experts);
        let state: u64 = state_specs(spec, kv_type).iter().flatten().map(|s| s.bytes() as u64).sum();
        let states = state * WARM_SEQUENCES * STATES_PER_SEQUENCE;
        // Windows beside that of the running sequence: as many as recurrent states (undoing needs no copy), if an eighth holds them.
        let one_window: u64 = pools.iter().filter_map(|&(window, bytes)| window.map(|w| touched(w + UNDO_TOKENS) as u64 * bytes)).sum();
        let spare = (budget / 8).checked_div(one_window).unwrap_or(0).min(WARM_SEQUENCES * (STATES_PER_SEQUENCE - 1) - 1) as usize;
        let kv_of = |context: usize, rows: usize| pools.iter().map(|&(window, bytes)| KvPool::blocks(window, context, rows, spare) as u64 * bytes).sum::<u64>();
        let limit = spec.max_positions.clamp(1, DEFAULT_CONTEXT);
        let max_context = options.context.unwrap_or(limit);
        // What a pass needs while it runs: scratch, and keys and values of windows that move on with it.
        let windowed: u64 = pools.iter().filter(|p| p.0.is_some()).map(|p| p.1).sum();
        let affordable = |chunks: Chunks| scratch_bytes(spec, chunks) + (chunks.moe as u64 * windowed).div_ceil(KV_BLOCK as u64) <= budget / 8;
        // As much as a small budget can afford: one chunk of 512 rows, less when it would take more than an eighth.
        let chunk = options.chunk.unwrap_or_else(|| [512, 256, 128, 64, 32].into_iter().find(|&c| affordable(Chunks { mixer: c, moe: c })).unwrap_or(16));
        let fixed = |chunks: Chunks| BASE_BYTES + options.tokenizer_bytes + sizes.resident_bytes + states + scratch_bytes(spec, chunks);
        let short =
            |what: &str, needed: u64, available: u64, hint: &str| ModelError::Budget { what: what.to_owned(), needed, available, hint: hint.to_owned() };

        let one = Chunks { mixer: chunk, moe: chunk };
        let resident_needs = fixed(one) + all_experts + kv_of(options.context.unwrap_or(limit.min(4096)), one.moe);
        let residency = match options.residency {
            _ if experts == 0 => Residency::Resident,
            ResidencyChoice::Resident if options.bank.is_some() => {
                return Err(short("--bank with --no-streaming", all_experts, all_experts, "a resident model has no bank; leave one of the two out"));
            }
            ResidencyChoice::Resident if resident_needs > budget => {
                return Err(short("the resident model", resident_needs, budget, "use --streaming, or a larger --memory-budget"));
            }
            ResidencyChoice::Resident => Residency::Resident,
            ResidencyChoice::Auto if options.bank.is_none() && resident_needs <= budget => Residency::Resident,
            ResidencyChoice::Auto | ResidencyChoice::Streaming => Residency::Streaming,
        };
        // When streaming, several chunks of a long prompt go through a layer before its experts are read again.
        let super_chunk = Chunks { mixer: chunk, moe: chunk * 4 };
        let chunks = if residency == Residency::Streaming && options.chunk.is_none() && affordable(super_chunk) { super_chunk } else { one };
        let kv_of = |context: usize| kv_of(context, chunks.moe);
        let fixed = fixed(chunks);
        let least_bank = match (residency, options.bank) {
            (Residency::Resident, _) => all_experts,
            (Residency::Streaming, None) => floor as u64 * sizes.slot_bytes,
            (Residency::Streaming, Some(bank)) => {
                let slots = bank_slots(bank, experts, sizes.slot_bytes);
                if slots < floor {
                    let hint = format!("the floor is {floor} experts (top-{top_k} of two layers); give a larger --bank");
                    return Err(short("the floor of the bank", floor as u64 * sizes.slot_bytes, slots as u64 * sizes.slot_bytes, &hint));
                }
                slots as u64 * sizes.slot_bytes
            }
        };
        let least = fixed + least_bank + kv_of(1);
        if least > budget {
            let hint = format!(
                "always-active weights {} + scratch and states {} + bank {} + one KV block {}; give a larger --memory-budget",
                sizes.resident_bytes,
                fixed - sizes.resident_bytes,
                least_bank,
                kv_of(1)
            );
            return Err(short("the smallest working set", least, budget, &hint));
        }
        let room = budget - fixed - least_bank;
        let context = match options.context {
            Some(context) if kv_of(context) > room => {
                return Err(short(
                    &format!("the KV cache of --ctx-size {context}"),
                    kv_of(context),
                    room,
                    "use a smaller --ctx-size or a larger --memory-budget",
                ));
            }
            Some(context) => context,
            // At least the one block that was counted above.
            None => (1..=max_context.div_ceil(KV_BLOCK)).rev().map(|b| max_context.min(b * KV_BLOCK)).find(|&c| kv_of(c) <= room).unwrap_or(1),
        };
        let slots = match (residency, options.bank) {
            (Residency::Resident, _) => experts,
            (Residency::Streaming, Some(bank)) => bank_slots(bank, experts, sizes.slot_bytes),
            // The bank takes what the KV cache does not use yet and gives slots up as it grows.
            (Residency::Streaming, None) => (((budget - fixed - kv_of(1)) / sizes.slot_bytes.max(1)) as usize).min(experts),
        };
        let working_set = spec.moe_layers().map(|(_, m)| m.router.top_k).sum();
        let mut warnings = Vec::new();
        if residency == Residency::Streaming && slots < working_set {
            warnings.push(format!(
                "the bank holds {slots} experts, fewer than the {working_set} that one token uses: nearly every token reads all of its experts from disk"
            ));
        }
        if context > spec.max_positions {
            warnings.push(format!("--ctx-size {context} exceeds the {} positions that the model was made for", spec.max_positions));
        }
        Ok(Self {
            budget,
            budget_source,
            base: BASE_BYTES,
            tokenizer: options.tokenizer_bytes,
            resident: sizes.resident_bytes,
            scratch: scratch_bytes(spec, chunks),
            states,
            kv: kv_of(context),
            kv_pools: pools
                .iter()
                .map(|&(window, block_bytes)| KvPool { window, block_bytes, blocks: KvPool::blocks(window, context, chunks.moe, spare) })
                .collect(),
            kv_free: budget - fixed - slots as u64 * sizes.slot_bytes,
            kv_type,
            context,
            residency,
            slots,
            slot_bytes: sizes.slot_bytes,
            experts,
            floor_slots: floor,
            working_set,
            chunks,
            warnings,
        })
    }

    /// Bytes of everything but the bank, with the first block of keys and values.
    pub fn beside_bank(&self) -> u64 {
        self.base + self.tokenizer + self.resident + self.scratch + self.states + self.kv_bytes(1)
    }

    /// Bytes of keys and values that a sequence of `tokens` tokens can make the model hold.
    pub fn kv_bytes(&self, tokens: usize) -> u64 {
        self.kv_pools.iter().map(|p| p.blocks.min(tokens.div_ceil(KV_BLOCK)) as u64 * p.block_bytes).sum()
    }

    /// Bytes of keys and values that the row after `tokens` tokens reads.
    pub fn kv_read(&self, tokens: f64) -> f64 {
        self.kv_pools.iter().map(|p| tokens.min(p.window.map_or(f64::INFINITY, |w| w as f64)) * p.block_bytes as f64 / KV_BLOCK as f64).sum()
    }

    /// `fits` or `tight`.
    pub fn verdict(&self) -> Verdict {
        if self.residency == Residency::Resident || self.slots >= self.working_set { Verdict::Fits } else { Verdict::Tight }
    }
}

fn bank_slots(bank: BankSize, experts: usize, slot_bytes: u64) -> usize {
    match bank {
        BankSize::Bytes(b) => ((b / slot_bytes.max(1)) as usize).min(experts),
        BankSize::Share(s) => ((s * experts as f64 + 1e-9) as usize).min(experts),
    }
}
