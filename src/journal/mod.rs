//! Where finished decisions go. In memory or nowhere; knows no disk yet.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crate::policy::{DecisionRecord, DecisionSink};

/// Keeps the newest decisions, and counts those it dropped for them.
#[derive(Debug)]
pub struct Memory {
    capacity: usize,
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    records: VecDeque<DecisionRecord>,
    dropped: u64,
}

impl Memory {
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ring: Mutex::default(),
        }
    }

    /// The oldest first.
    pub fn records(&self) -> Vec<DecisionRecord> {
        self.ring().records.iter().cloned().collect()
    }

    /// How many decisions had to go for newer ones.
    pub fn dropped(&self) -> u64 {
        self.ring().dropped
    }

    fn ring(&self) -> std::sync::MutexGuard<'_, Ring> {
        // A push or a copy leaves the ring whole wherever it stops.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DecisionSink for Memory {
    fn record(&self, record: DecisionRecord) {
        let mut ring = self.ring();
        ring.records.push_back(record);
        if ring.records.len() > self.capacity {
            ring.records.pop_front();
            ring.dropped += 1;
        }
    }
}

/// Forgets every decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl DecisionSink for Discard {
    fn record(&self, _record: DecisionRecord) {}
}
