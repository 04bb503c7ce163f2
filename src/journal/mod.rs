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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Action;

    fn record(id: &str) -> DecisionRecord {
        DecisionRecord {
            request_id: id.into(),
            snapshot_hash: String::new(),
            policy: Default::default(),
            mode: Default::default(),
            probes: vec![],
            prompt: Default::default(),
            interventions: vec![],
            steps: vec![],
            actions: vec![],
            action: Action::Allow,
            finish_reason: "stop".into(),
            out_of_domain: false,
            partially_monitored: false,
            timings: Default::default(),
            tokens: Default::default(),
            sampling: Default::default(),
            kernel_identity: String::new(),
        }
    }

    fn check(capacity: usize, kept: &[&str], dropped: u64) {
        let memory = Memory::new(capacity);
        for id in ["a", "b", "c"] {
            memory.record(record(id));
        }
        let ids: Vec<_> = memory.records().into_iter().map(|r| r.request_id).collect();
        assert_eq!(
            (&ids[..], memory.dropped()),
            (
                &kept.iter().map(|k| k.to_string()).collect::<Vec<_>>()[..],
                dropped
            )
        );
    }

    #[test]
    fn the_newest_decisions_stay_and_the_others_are_counted() {
        check(3, &["a", "b", "c"], 0);
        check(2, &["b", "c"], 1);
        check(0, &[], 3);
    }
}
