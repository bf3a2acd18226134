//! Bookkeeping of the bank: which expert is in which slot, and which one has to go.
//!
//! One global pool of equal slots with decayed LFU: a use at step `t` makes the score `f·2^(−(t−last)/16) + 1`. Kept as
//! `log2(f) + last/16`, scores of different ages compare directly, so nothing has to be decayed.

use crate::source::Key;

/// Steps after which a use counts half.
const HALF_LIFE: f32 = 16.0;
/// Candidates looked at per eviction.
const SAMPLE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Being read.
    Loading,
    Ready,
    /// Given back to the system.
    Retired,
    /// Out of the books for a while: it holds what a prefill or a read ahead puts there.
    Lent,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The slot of memory that it stands for. Lent memory may be exchanged, the books do not notice: who has to go never
    /// depends on what was read ahead.
    memory: usize,
    state: State,
    key: Key,
    pins: u32,
    /// `log2(frequency) + last use / HALF_LIFE`.
    score: f32,
}

const NO_KEY: Key = Key { layer: usize::MAX, expert: usize::MAX };

/// Slots and the table from expert to slot.
pub(crate) struct Bank {
    slots: Vec<Slot>,
    /// Which entry of `slots` stands for a slot of memory.
    book: Vec<usize>,
    /// Entries whose memory is lent.
    lent: Vec<usize>,
    free: Vec<usize>,
    table: Vec<u32>,
    experts: usize,
    per_layer: Vec<usize>,
    /// Slots of a layer that evictions for other layers leave alone.
    layer_floor: usize,
    rng: u64,
    pub step: u64,
    pub evictions: u64,
}

const ABSENT: u32 = u32::MAX;

impl Bank {
    /// A bank over slots `0..slots` for `layers × experts` experts.
    pub fn new(slots: usize, layers: usize, experts: usize, top_k: usize) -> Self {
        Self {
            slots: (0..slots).map(|memory| Slot { memory, state: State::Free, key: NO_KEY, pins: 0, score: 0.0 }).collect(),
            book: (0..slots).collect(),
            lent: Vec::new(),
            free: (0..slots).rev().collect(),
            table: vec![ABSENT; layers * experts],
            experts,
            per_layer: vec![0; layers],
            layer_floor: (top_k + 2).min(slots / layers.max(1)),
            rng: 0x9E37_79B9_7F4A_7C15,
            step: 0,
            evictions: 0,
        }
    }

    /// All slots, retired ones too.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn set_state(&mut self, slot: usize, state: State) {
        self.at(slot).state = state;
    }

    fn at(&mut self, memory: usize) -> &mut Slot {
        &mut self.slots[self.book[memory]]
    }

    pub fn lookup(&self, key: Key) -> Option<usize> {
        let at = self.table[key.layer * self.experts + key.expert];
        (at != ABSENT).then(|| self.slots[at as usize].memory)
    }

    pub fn pin(&mut self, slot: usize) {
        self.at(slot).pins += 1;
    }

    pub fn unpin(&mut self, slot: usize) {
        let s = self.at(slot);
        debug_assert!(s.pins > 0, "slot {slot} is not pinned");
        s.pins -= 1;
    }

    /// Counts a use at the current step.
    pub fn touch(&mut self, slot: usize) {
        let now = self.step as f32 / HALF_LIFE;
        let s = self.at(slot);
        s.score = ((s.score - now).exp2() + 1.0).log2() + now;
    }

    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// A slot for `key`, evicting the least valuable unpinned expert if none is free. It comes back `Loading`, pinned
    /// once. `None` when every slot is pinned.
    pub fn admit(&mut self, key: Key) -> Option<usize> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.victim(Some(key.layer))?;
                self.evict(slot);
                self.evictions += 1;
                slot
            }
        };
        self.slots[slot] = Slot { memory: self.slots[slot].memory, state: State::Loading, key, pins: 1, score: self.step as f32 / HALF_LIFE };
        self.table[key.layer * self.experts + key.expert] = slot as u32;
        self.per_layer[key.layer] += 1;
        Some(self.slots[slot].memory)
    }

    /// Forgets what a slot holds (a failed read) and makes it free.
    pub fn discard(&mut self, slot: usize) {
        let slot = self.book[slot];
        self.evict(slot);
        self.slots[slot].pins = 0;
        self.slots[slot].state = State::Free;
        self.free.push(slot);
    }

    /// Takes a slot out of service; `None` when all are pinned.
    pub fn retire(&mut self) -> Option<usize> {
        self.take_out(State::Retired).map(|slot| self.slots[slot].memory)
    }

    /// Takes memory out of the books until [`Bank::give_back`]; `None` when all is pinned.
    pub fn lend(&mut self) -> Option<usize> {
        let slot = self.take_out(State::Lent)?;
        self.lent.push(slot);
        Some(self.slots[slot].memory)
    }

    /// Lent memory is free again.
    pub fn give_back(&mut self, memory: usize) {
        let Some(slot) = self.lent.pop() else { return };
        self.slots[slot].memory = memory;
        self.book[memory] = slot;
        self.slots[slot].state = State::Free;
        self.free.push(slot);
    }

    /// Exchanges memory of the books for lent memory, which then holds the record.
    pub fn exchange(&mut self, memory: usize, lent: usize) {
        let slot = self.book[memory];
        self.slots[slot].memory = lent;
        self.book[lent] = slot;
    }

    fn take_out(&mut self, state: State) -> Option<usize> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.victim(None)?;
                self.evict(slot);
                slot
            }
        };
        self.slots[slot].state = state;
        Some(slot)
    }

    /// Slots in service.
    pub fn in_service(&self) -> usize {
        self.slots.iter().filter(|s| s.state != State::Retired).count()
    }

    /// Slots that hold experts by the books, or could.
    pub fn keeping(&self) -> usize {
        self.slots.iter().filter(|s| !matches!(s.state, State::Retired | State::Lent)).count()
    }

    fn evict(&mut self, slot: usize) {
        let key = self.slots[slot].key;
        if key != NO_KEY {
            self.table[key.layer * self.experts + key.expert] = ABSENT;
            self.per_layer[key.layer] -= 1;
            self.slots[slot].key = NO_KEY;
        }
    }

    /// The least valuable unpinned expert, to make room for one of layer `newcomer`. Other layers keep their floor as long
    /// as there is another way.
    fn victim(&mut self, newcomer: Option<usize>) -> Option<usize> {
        let n = self.slots.len();
        // A random sample of a large bank; all slots of a small one, or should the whole sample be pinned.
        let sampled = if n > SAMPLE {
            let sample: [usize; SAMPLE] = std::array::from_fn(|_| (self.random() % n as u64) as usize);
            self.least_of(sample.into_iter(), newcomer, true)
        } else {
            None
        };
        sampled.or_else(|| self.least_of(0..n, newcomer, true)).or_else(|| self.least_of(0..n, newcomer, false))
    }

    /// xorshift64: the choice only moves time, never results.
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng
    }

    fn least_of(&self, candidates: impl Iterator<Item = usize>, newcomer: Option<usize>, keep_layer_floor: bool) -> Option<usize> {
        candidates
            .filter(|&i| {
                let s = &self.slots[i];
                let spare = || Some(s.key.layer) == newcomer || self.per_layer[s.key.layer] > self.layer_floor;
                s.state == State::Ready && s.pins == 0 && (!keep_layer_floor || spare())
            })
            .min_by(|&a, &b| self.slots[a].score.total_cmp(&self.slots[b].score))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(layer: usize, expert: usize) -> Key {
        Key { layer, expert }
    }

    fn ready(bank: &mut Bank, k: Key) -> usize {
        let slot = bank.admit(k).expect("a slot");
        bank.set_state(slot, State::Ready);
        bank.touch(slot);
        bank.unpin(slot);
        slot
    }

    /// Protects the policy: frequent experts outlive recent ones until their uses have decayed.
    #[test]
    fn least_frequently_used_goes_first_and_uses_decay() {
        let mut bank = Bank::new(2, 1, 8, 0);
        bank.layer_floor = 0;
        let often = ready(&mut bank, key(0, 0));
        for _ in 0..5 {
            bank.touch(often);
        }
        bank.step = 1;
        ready(&mut bank, key(0, 1));
        ready(&mut bank, key(0, 2));
        assert!(bank.lookup(key(0, 0)).is_some() && bank.lookup(key(0, 1)).is_none());
        bank.step = 200;
        bank.touch(bank.lookup(key(0, 2)).unwrap());
        ready(&mut bank, key(0, 3));
        assert!(bank.lookup(key(0, 0)).is_none(), "old uses must fade");
    }

    /// Protects leases: a pinned expert is never evicted, and a full bank says so.
    #[test]
    fn pinned_slots_stay() {
        let mut bank = Bank::new(2, 1, 8, 0);
        bank.admit(key(0, 0)).unwrap();
        bank.admit(key(0, 1)).unwrap();
        assert_eq!(bank.admit(key(0, 2)), None);
        let slot = bank.lookup(key(0, 1)).unwrap();
        bank.set_state(slot, State::Ready);
        bank.unpin(slot);
        assert_eq!(bank.admit(key(0, 2)), Some(slot));
        assert_eq!(bank.lookup(key(0, 1)), None);
    }

    /// Protects small layers: one busy layer cannot empty the others while it has slots of its own to give.
    #[test]
    fn a_layer_keeps_its_floor() {
        let mut bank = Bank::new(8, 2, 16, 2);
        for e in 0..4 {
            ready(&mut bank, key(1, e));
        }
        (0..20).for_each(|e| {
            bank.step += 100;
            ready(&mut bank, key(0, e % 16));
        });
        assert_eq!(bank.per_layer[1], 4);
    }

    /// Protects the books: retiring and discarding keep table and counts true.
    #[test]
    fn retire_and_discard_forget_the_expert() {
        let mut bank = Bank::new(3, 1, 8, 0);
        let slot = bank.admit(key(0, 5)).unwrap();
        bank.discard(slot);
        assert_eq!(bank.lookup(key(0, 5)), None);
        for e in 0..3 {
            ready(&mut bank, key(0, e));
        }
        bank.retire().unwrap();
        assert_eq!((bank.in_service(), bank.per_layer[0]), (2, 2));
    }

    /// Protects the books of lent memory: an exchanged record is found where it is, and memory that comes back is free.
    #[test]
    fn lent_memory_is_out_of_the_books_until_it_comes_back() {
        let mut bank = Bank::new(3, 1, 8, 0);
        bank.layer_floor = 0;
        let lent = bank.lend().unwrap();
        let old = [ready(&mut bank, key(0, 0)), ready(&mut bank, key(0, 1))];
        let other = bank.admit(key(0, 5)).unwrap();
        bank.exchange(other, lent);
        assert!(old.contains(&other) && bank.lookup(key(0, 5)) == Some(lent));
        assert_eq!((bank.in_service(), bank.keeping(), bank.per_layer[0], bank.evictions), (3, 2, 2, 1));
        bank.set_state(lent, State::Ready);
        bank.unpin(lent);
        bank.give_back(other);
        assert_eq!(bank.admit(key(0, 6)), Some(other));
    }
}
