//! Lends out KV blocks and remembers which hold what: the prefix cache.
//! Knows block numbers, token ids and scores; knows no tensors and no requests.
//!
//! A block is freed when its last holder drops it. A published block stays findable after that
//! until its room is needed, oldest first.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use inwit_probes::TokenOutput;
use sha2::{Digest, Sha256};

use crate::model::kernels::KV_BLOCK;

/// Names the contents of a block: everything that its K and V depend on, chained from the start.
pub(super) type BlockKey = [u8; 32];

/// What the probes said of a block's tokens, under each probe's content hash.
pub(super) type BlockScores = HashMap<String, [TokenOutput; KV_BLOCK]>;

/// The key of a block whose predecessor has the key `parent`. `interventions` is the content of
/// every intervention that touches the block's positions; empty when none does.
pub(super) fn block_key(
    parent: Option<&BlockKey>,
    tokens: &[u32],
    interventions: &[u8],
) -> BlockKey {
    let mut hasher = Sha256::new();
    hasher.update([u8::from(parent.is_some())]);
    hasher.update(parent.unwrap_or(&[0; 32]));
    hasher.update((tokens.len() as u64).to_le_bytes());
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    hasher.update(interventions);
    hasher.finalize().into()
}

#[derive(Clone)]
pub(super) struct BlockPool(Arc<Mutex<Pool>>);

struct Pool {
    holders: Vec<u32>,
    free: Vec<u32>,
    published: Vec<Option<Published>>,
    by_key: HashMap<BlockKey, u32>,
    /// Published blocks without a holder, by when they were last held.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

struct Published {
    key: BlockKey,
    scores: BlockScores,
    /// Its place in `idle`, when it is there.
    idle_since: Option<u64>,
}

/// One holder's share of a block.
pub(super) struct Block {
    number: u32,
    pool: BlockPool,
}

impl Block {
    pub(super) fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.lock().give_back(self.number);
    }
}

impl BlockPool {
    pub(super) fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self(Arc::new(Mutex::new(Pool {
            holders: vec![0; blocks],
            free: (0..count).rev().collect(),
            published: (0..blocks).map(|_| None).collect(),
            by_key: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks that nobody holds.
    pub(super) fn available(&self) -> usize {
        let pool = self.lock();
        pool.free.len() + pool.idle.len()
    }

    /// An empty block: a free one, else the one that has been idle longest.
    pub(super) fn take(&self) -> Option<Block> {
        let mut pool = self.lock();
        let number = match pool.free.pop() {
            Some(number) => number,
            None => pool.evict_oldest()?,
        };
        pool.holders[number as usize] = 1;
        Some(Block {
            number,
            pool: self.clone(),
        })
    }

    /// The block published under `key`, and what its scores are for `probes` (content hashes).
    pub(super) fn find(&self, key: &BlockKey, probes: &[String]) -> Found {
        let mut pool = self.lock();
        let Some(number) = pool.by_key.get(key).copied() else {
            return Found::Nothing;
        };
        let scores = pool.published[number as usize].as_ref().map(|published| {
            let scores = probes
                .iter()
                .map(|probe| published.scores.get(probe).cloned());
            scores.collect::<Option<Vec<_>>>()
        });
        let Some(Some(scores)) = scores else {
            return Found::Unscored;
        };
        pool.hold(number);
        Found::Block(
            Block {
                number,
                pool: self.clone(),
            },
            scores,
        )
    }

    /// Makes a full block findable. Where its contents are already published, only scores that
    /// were missing are added.
    pub(super) fn publish(&self, block: &Block, key: BlockKey, scores: BlockScores) {
        let mut pool = self.lock();
        let number = pool.by_key.get(&key).copied().unwrap_or(block.number);
        pool.by_key.insert(key, number);
        match &mut pool.published[number as usize] {
            Some(published) => published.scores.extend(scores),
            empty => {
                *empty = Some(Published {
                    key,
                    scores,
                    idle_since: None,
                });
            }
        }
    }
}

pub(super) enum Found {
    Nothing,
    /// It is there, but a probe that the request needs never saw it.
    Unscored,
    /// For each probe asked for, its outputs for the block's tokens.
    Block(Block, Vec<[TokenOutput; KV_BLOCK]>),
}

impl Pool {
    fn hold(&mut self, number: u32) {
        self.holders[number as usize] += 1;
        if let Some(published) = &mut self.published[number as usize]
            && let Some(since) = published.idle_since.take()
        {
            self.idle.remove(&since);
        }
    }

    fn give_back(&mut self, number: u32) {
        let holders = &mut self.holders[number as usize];
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        self.clock += 1;
        match &mut self.published[number as usize] {
            Some(published) => {
                published.idle_since = Some(self.clock);
                self.idle.insert(self.clock, number);
            }
            None => self.free.push(number),
        }
    }

    fn evict_oldest(&mut self) -> Option<u32> {
        let (_, number) = self.idle.pop_first()?;
        if let Some(published) = self.published[number as usize].take() {
            self.by_key.remove(&published.key);
        }
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(probe: &str) -> BlockScores {
        HashMap::from([(
            probe.to_owned(),
            [const { TokenOutput::logit(1.0) }; KV_BLOCK],
        )])
    }

    fn key(n: u32) -> BlockKey {
        block_key(None, &[n], &[])
    }

    #[test]
    fn a_dropped_block_is_free_again() {
        let pool = BlockPool::new(2);
        let (a, b) = (pool.take(), pool.take());
        assert!(a.is_some() && b.is_some() && pool.take().is_none());
        drop(a);
        assert_eq!(pool.available(), 1);
        assert!(pool.take().is_some());
    }

    #[test]
    fn a_published_block_is_found_after_its_holder_left() {
        let pool = BlockPool::new(2);
        let block = pool.take().unwrap();
        let number = block.number();
        pool.publish(&block, key(1), scores("p"));
        drop(block);
        assert_eq!(pool.available(), 2);
        let Found::Block(found, found_scores) = pool.find(&key(1), &["p".into()]) else {
            panic!("not found");
        };
        assert_eq!((found.number(), found_scores.len()), (number, 1));
        assert_eq!(pool.available(), 1);
    }

    #[test]
    fn a_block_without_the_scores_of_a_probe_is_a_miss_until_they_are_added() {
        let pool = BlockPool::new(3);
        let block = pool.take().unwrap();
        pool.publish(&block, key(1), scores("p"));
        assert!(matches!(pool.find(&key(1), &["q".into()]), Found::Unscored));
        let again = pool.take().unwrap();
        pool.publish(&again, key(1), scores("q"));
        let Found::Block(found, _) = pool.find(&key(1), &["p".into(), "q".into()]) else {
            panic!("not found");
        };
        assert_eq!(found.number(), block.number());
    }

    #[test]
    fn the_block_that_was_idle_longest_makes_room() {
        let pool = BlockPool::new(2);
        for n in [1, 2] {
            let block = pool.take().unwrap();
            pool.publish(&block, key(n), scores("p"));
        }
        // Looking at the first makes the second the oldest.
        drop(pool.find(&key(1), &[]));
        let _taken = pool.take().unwrap();
        assert!(matches!(pool.find(&key(2), &[]), Found::Nothing));
        assert!(matches!(pool.find(&key(1), &[]), Found::Block(..)));
    }

    #[test]
    fn keys_depend_on_parent_tokens_and_interventions() {
        let plain = block_key(None, &[1, 2], &[]);
        assert_ne!(plain, block_key(Some(&plain), &[1, 2], &[]));
        assert_ne!(plain, block_key(None, &[2, 1], &[]));
        assert_ne!(plain, block_key(None, &[1, 2], &[7]));
        assert_eq!(plain, block_key(None, &[1, 2], &[]));
    }
}
