//! In which order the shards of a checkpoint are fetched to be packed, and how many must be on the disk at a time.

use std::collections::BTreeSet;

/// Where a shard is before anything is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On the server alone.
    Absent,
    /// On the disk, whole or in part, to be removed when it is used up.
    Here,
    /// A snapshot shows it: it is read where it is and stays.
    Shown,
}

/// Shards in the order in which they are fetched.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    pub(super) order: Vec<usize>,
    /// For each of them, how many are on the disk when it comes, itself included, though everything is packed by then that can be.
    pub(super) need: Vec<usize>,
}

/// Plans for pieces (by the shards that each is made of) that are still to be packed. Whatever is on the disk comes first; then shards
/// that complete what waits for the fewest, so that others can go soon.
pub(super) fn schedule(pieces: &[&[usize]], places: &[Place]) -> Schedule {
    let mut uses = vec![0; places.len()];
    pieces.iter().flat_map(|shards| shards.iter()).for_each(|&s| uses[s] += 1);
    let mut have: Vec<bool> = places.iter().zip(&uses).map(|(place, uses)| *place == Place::Shown || (*place == Place::Here && *uses > 0)).collect();
    let mut held: BTreeSet<usize> = (0..places.len()).filter(|&s| have[s] && places[s] == Place::Here).collect();
    let mut waiting: Vec<&[usize]> = pieces.to_vec();
    let mut order: Vec<usize> = held.iter().copied().collect();
    let mut need = vec![held.len(); order.len()];
    loop {
        // What is there is packed, and what is used up goes.
        waiting.retain(|shards| {
            let complete = shards.iter().all(|&s| have[s]);
            if complete {
                shards.iter().for_each(|&s| uses[s] -= 1);
            }
            !complete
        });
        held.retain(|&s| uses[s] > 0);
        let rank = |shards: &&&[usize]| {
            let missing = shards.iter().filter(|&&s| !have[s]);
            let waits = shards.iter().any(|s| held.contains(s));
            (!waits, missing.clone().count(), missing.min().copied())
        };
        let Some(next) = waiting.iter().min_by_key(rank).and_then(|shards| shards.iter().copied().filter(|&s| !have[s]).min()) else { break };
        have[next] = true;
        held.insert(next);
        order.push(next);
        need.push(held.len());
    }
    Schedule { order, need }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Place::{Absent, Here, Shown};

    fn of(pieces: &[&[usize]], places: &[Place]) -> (Vec<usize>, Vec<usize>) {
        let Schedule { order, need } = schedule(pieces, places);
        (order, need)
    }

    /// Layers that cross the border of two shards need two at a time, one that spans three needs three; shards of which nothing is
    /// needed do not come at all.
    #[test]
    fn as_few_as_possible() {
        assert_eq!(of(&[&[0], &[0, 1], &[1, 2], &[2]], &[Absent; 4]), (vec![0, 1, 2], vec![1, 2, 2]));
        assert_eq!(of(&[&[0, 1, 2], &[2, 3]], &[Absent; 4]).1.into_iter().max(), Some(3));
        assert_eq!(of(&[], &[Absent, Here]), (vec![], vec![]));
    }

    /// A layer whose other half is far away brings that half next, before others begin to wait.
    #[test]
    fn what_waits_comes_first() {
        let (order, need) = of(&[&[0, 3], &[0], &[1, 4], &[1], &[2, 5], &[3], &[4], &[5]], &[Absent; 6]);
        assert_eq!(order[..4], [0, 3, 1, 4]);
        assert_eq!(need.into_iter().max(), Some(2));
    }

    /// What an interrupted run left on the disk is used first; what a snapshot shows counts for nothing.
    #[test]
    fn what_is_there_comes_first() {
        let places = [Absent, Shown, Absent, Here];
        assert_eq!(of(&[&[0, 1], &[1, 2], &[2, 3]], &places), (vec![3, 2, 0], vec![1, 2, 1]));
        assert_eq!(of(&[&[1], &[0]], &[Here, Here]), (vec![0, 1], vec![2, 2]));
    }
}
