//! One sequence under a policy: takes what the probes say, pass by pass, and decides after each.
//! Knows neither mode nor time; whether a decision is acted upon is the engine's business.

use inwit_probes::{GatherState, Positions, TokenOutput};
use serde::{Deserialize, Serialize};

use super::{Action, Detector, OnFailure, Policy, Rule, When};

/// What the policy makes of the request so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The most severe of all rules that have fired; never falls within a request.
    pub action: Action,
    /// What fired in this step: the most severe first, equals in the policy's order.
    pub fired: Vec<Fired>,
    /// The largest of the rules that can still fire, in tokens.
    pub hold_back: u32,
    /// What failed in this step.
    pub failed: Vec<Failed>,
    /// No rule can still fire, unless the answer is rewound.
    #[serde(rename = "final")]
    pub final_: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fired {
    /// Index into the policy's rules.
    pub rule: usize,
    /// One per detector of the rule, in its order.
    pub evidence: Vec<Reading>,
}

/// A probe failed. One entry per rule that needs it; one without a rule where none does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    pub rule: Option<usize>,
    /// Index into the snapshot's probes.
    pub probe: usize,
    pub reason: String,
    /// The rule's; `Open` without a rule.
    pub on_failure: OnFailure,
}

/// A detector over the request so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Index into the policy's detectors.
    pub detector: usize,
    /// Of the last token that was gathered, counted from 0 at the first prompt token.
    pub position: u32,
    /// Gathered.
    pub logit: f32,
    /// P(positive | request so far).
    pub probability: f32,
    /// On the gathered logit.
    pub threshold: f32,
    pub fired: bool,
}

/// The state of one sequence. Belongs to the policy it was made for.
///
/// Per pass: `observe_*` for each of its rows in order, then `decide` once.
#[derive(Clone, Debug)]
pub struct PolicyState {
    detectors: Vec<DetectorState>,
    /// Which rules have fired.
    fired: Vec<bool>,
    action: Action,
}

#[derive(Clone, Debug)]
struct DetectorState {
    gather: GatherState,
    /// Of the last token that was gathered.
    position: Option<u32>,
    /// Nothing that comes can change the reading.
    is_final: bool,
    /// Of a `generated(k)` detector: the newest token up to `k`, 0 being the last prompt token.
    newest: Option<Newest>,
    failure: Option<Failure>,
}

#[derive(Clone, Copy, Debug)]
struct Newest {
    k: u32,
    position: u32,
    output: Option<TokenOutput>,
}

#[derive(Clone, Debug)]
struct Failure {
    reason: String,
    reported: bool,
}

/// What a rule may count on for one of its detectors.
#[derive(Clone, Copy)]
enum Conjunct {
    /// Not yet known, or never to be: anything is possible.
    Open,
    /// Known so far, and may still change.
    Now(Reading),
    Final(Reading),
    /// Final without a value: the gather saw fewer tokens than it needs to be positive.
    Negative,
}

impl PolicyState {
    pub fn new(policy: &Policy) -> Self {
        Self {
            detectors: policy.detectors.iter().map(DetectorState::new).collect(),
            fired: vec![false; policy.rules.len()],
            action: Action::Allow,
        }
    }

    /// Takes a prompt token. `outputs[i]` is what the snapshot's probe `i` gave for it; none where
    /// it was not computed, which is a failure where a detector reads this token.
    pub fn observe_prompt(
        &mut self,
        policy: &Policy,
        position: u32,
        in_content: bool,
        is_last: bool,
        outputs: &[Option<TokenOutput>],
    ) {
        for (detector, state) in policy.detectors.iter().zip(&mut self.detectors) {
            let output = output_of(detector, outputs);
            match detector.positions {
                // After a rewind the last prompt token comes again.
                _ if state.is_final => continue,
                Positions::LastPromptToken if is_last => state.take(position, output),
                Positions::PromptContent if in_content => state.take(position, output),
                Positions::Generated(_) if is_last => state.keep(0, position, output),
                _ => {}
            }
            let reads_prompt = matches!(
                detector.positions,
                Positions::LastPromptToken | Positions::PromptContent
            );
            if is_last && reads_prompt {
                state.finish_prompt();
            }
        }
    }

    /// Takes the pass that consumed generated token `k`, counted from 1.
    pub fn observe_generated(
        &mut self,
        policy: &Policy,
        k: u32,
        position: u32,
        outputs: &[Option<TokenOutput>],
    ) {
        for (detector, state) in policy.detectors.iter().zip(&mut self.detectors) {
            let output = output_of(detector, outputs);
            match detector.positions {
                _ if state.is_final => {}
                Positions::Generated(wanted) if k == wanted => {
                    state.take(position, output);
                    state.is_final = true;
                }
                Positions::Generated(wanted) if k < wanted => state.keep(k, position, output),
                Positions::EveryGenerated => state.take(position, output),
                _ => {}
            }
        }
    }

    /// The answer ended after `tokens` generated tokens, each of which was observed where
    /// `needs_last_token` asked for it. A `generated(k)` detector with `tokens < k` reads the last
    /// one, or the last prompt token of an empty answer.
    pub fn end_of_answer(&mut self, policy: &Policy, tokens: u32) {
        for (detector, state) in policy.detectors.iter().zip(&mut self.detectors) {
            match detector.positions {
                _ if state.is_final => {}
                Positions::Generated(_) => state.read_newest(tokens),
                // Nothing was written, so nothing harmful was.
                Positions::EveryGenerated => state.is_final = true,
                Positions::LastPromptToken | Positions::PromptContent => {
                    state.fail("the answer ended before the last prompt token was observed".into());
                    state.is_final = true;
                }
            }
        }
    }

    /// Whether an answer that ends now needs a pass over its last token: some rule that can still
    /// fire reads generated tokens.
    pub fn needs_last_token(&self, policy: &Policy) -> bool {
        let reads_generated = |detector: &usize| {
            let positions = policy.detectors.get(*detector).map(|d| d.positions);
            let generated = matches!(
                positions,
                Some(Positions::Generated(_) | Positions::EveryGenerated)
            );
            generated
                && self
                    .detectors
                    .get(*detector)
                    .is_some_and(|state| !state.is_final)
        };
        let mut rules = policy.rules.iter().enumerate();
        rules.any(|(index, rule)| {
            self.can_fire(policy, index, rule) && rule.when.detectors().iter().any(reads_generated)
        })
    }

    /// Evaluates every rule on what was observed so far.
    pub fn decide(&mut self, policy: &Policy) -> Decision {
        let failed = self.report_failures(policy);
        let fired = self.fire(policy);
        let mut hold_back = 0;
        let mut final_ = true;
        for (index, rule) in policy.rules.iter().enumerate() {
            if self.can_fire(policy, index, rule) {
                hold_back = hold_back.max(rule.hold_back);
                final_ = false;
            }
        }
        Decision {
            action: self.action,
            fired,
            hold_back,
            failed,
            final_,
        }
    }

    /// Withdraws the generated tokens: what was read from them is read anew from the answer that
    /// takes their place. Verdicts stay, what was read from the prompt stays, and so does a
    /// `generated(k)` reading of a rule that has fired.
    pub fn rewind(&mut self, policy: &Policy) {
        for (index, detector) in policy.detectors.iter().enumerate() {
            let keeps = match detector.positions {
                Positions::LastPromptToken | Positions::PromptContent => true,
                Positions::Generated(_) => self.has_fired_over(policy, index),
                Positions::EveryGenerated => false,
            };
            if let (false, Some(state)) = (keeps, self.detectors.get_mut(index)) {
                let prompt = state.newest.filter(|newest| newest.k == 0);
                *state = DetectorState::new(detector);
                // The last prompt token is fed again; until then its old output stands.
                state.newest = prompt;
            }
        }
    }

    /// One per detector that has a value, in the policy's order.
    pub fn readings(&self, policy: &Policy) -> Vec<Reading> {
        (0..policy.detectors.len())
            .filter_map(|detector| self.reading(policy, detector))
            .collect()
    }

    /// The most severe action of all rules that have fired.
    pub fn action(&self) -> Action {
        self.action
    }

    fn reading(&self, policy: &Policy, index: usize) -> Option<Reading> {
        let detector = policy.detectors.get(index)?;
        let state = self.detectors.get(index)?;
        if state.failure.is_some() {
            return None;
        }
        let logit = state.gather.value()?;
        Some(Reading {
            detector: index,
            position: state.position?,
            logit,
            probability: detector.calibration.probability(logit),
            threshold: detector.threshold_logit,
            fired: logit > detector.threshold_logit,
        })
    }

    fn conjunct(&self, policy: &Policy, index: usize) -> Conjunct {
        let (Some(detector), Some(state)) =
            (policy.detectors.get(index), self.detectors.get(index))
        else {
            return Conjunct::Open;
        };
        if state.failure.is_some() {
            return Conjunct::Open;
        }
        match (self.reading(policy, index), state.is_final) {
            (Some(reading), true) => Conjunct::Final(reading),
            (None, true) => Conjunct::Negative,
            // In the middle of a prompt a gather is half done: not yet known.
            (Some(reading), false) if detector.positions == Positions::EveryGenerated => {
                Conjunct::Now(reading)
            }
            (_, false) => Conjunct::Open,
        }
    }

    /// The rule's readings if it fires: all known, and above.
    fn evidence(&self, policy: &Policy, rule: &Rule) -> Option<Vec<Reading>> {
        let known = |detector: &usize| match self.conjunct(policy, *detector) {
            Conjunct::Now(reading) | Conjunct::Final(reading) => Some(reading),
            Conjunct::Open | Conjunct::Negative => None,
        };
        let readings: Vec<_> = rule
            .when
            .detectors()
            .iter()
            .map(known)
            .collect::<Option<_>>()?;
        let fires = match &rule.when {
            When::Detector(_) | When::All(_) => readings.iter().all(|reading| reading.fired),
            When::Product { threshold, .. } => {
                product(readings.iter().map(|reading| reading.probability)) > *threshold
            }
        };
        fires.then_some(readings)
    }

    /// Whether the most that the rule can still reach is not above its threshold: what is final
    /// counts as it is, everything else as 1 (or as true).
    fn is_dead(&self, policy: &Policy, rule: &Rule) -> bool {
        let conjuncts = rule.when.detectors().iter();
        let mut conjuncts = conjuncts.map(|detector| self.conjunct(policy, *detector));
        match &rule.when {
            When::Detector(_) | When::All(_) => conjuncts.any(|conjunct| match conjunct {
                Conjunct::Final(reading) => !reading.fired,
                Conjunct::Negative => true,
                Conjunct::Open | Conjunct::Now(_) => false,
            }),
            When::Product { threshold, .. } => {
                let most = conjuncts.map(|conjunct| match conjunct {
                    Conjunct::Final(reading) => reading.probability,
                    Conjunct::Negative => 0.0,
                    Conjunct::Open | Conjunct::Now(_) => 1.0,
                });
                product(most) <= *threshold
            }
        }
    }

    fn has_failed_conjunct(&self, rule: &Rule) -> bool {
        let mut states = rule.when.detectors().iter().map(|d| self.detectors.get(*d));
        states.any(|state| state.is_none_or(|state| state.failure.is_some()))
    }

    fn has_fired(&self, rule: usize) -> bool {
        self.fired.get(rule).copied().unwrap_or(false)
    }

    fn can_fire(&self, policy: &Policy, index: usize, rule: &Rule) -> bool {
        !self.has_fired(index) && !self.has_failed_conjunct(rule) && !self.is_dead(policy, rule)
    }

    fn has_fired_over(&self, policy: &Policy, detector: usize) -> bool {
        let mut rules = policy.rules.iter().enumerate();
        rules
            .any(|(index, rule)| self.has_fired(index) && rule.when.detectors().contains(&detector))
    }

    fn fire(&mut self, policy: &Policy) -> Vec<Fired> {
        let mut fired = Vec::new();
        for (index, rule) in policy.rules.iter().enumerate() {
            if self.has_fired(index) {
                continue;
            }
            if let Some(evidence) = self.evidence(policy, rule) {
                fired.push((
                    rule.action.action(),
                    Fired {
                        rule: index,
                        evidence,
                    },
                ));
            }
        }
        for (action, Fired { rule, .. }) in &fired {
            self.action = self.action.max(*action);
            if let Some(flag) = self.fired.get_mut(*rule) {
                *flag = true;
            }
        }
        // Stable: among equals the policy's order stays.
        fired.sort_by_key(|(action, _)| std::cmp::Reverse(*action));
        fired.into_iter().map(|(_, fired)| fired).collect()
    }

    fn report_failures(&mut self, policy: &Policy) -> Vec<Failed> {
        let mut failed: Vec<Failed> = Vec::new();
        for (index, detector) in policy.detectors.iter().enumerate() {
            let Some(reason) = self
                .detectors
                .get_mut(index)
                .and_then(DetectorState::report)
            else {
                continue;
            };
            let entry = |rule: Option<usize>, on_failure| Failed {
                rule,
                probe: detector.probe,
                reason: reason.clone(),
                on_failure,
            };
            let known = |failed: &[Failed], rule| {
                let same = |f: &Failed| f.probe == detector.probe && f.rule == rule;
                failed.iter().any(same)
            };
            let mut needed = false;
            for (index_of_rule, rule) in policy.rules.iter().enumerate() {
                let needs = rule.when.detectors().contains(&index)
                    && !self.has_fired(index_of_rule)
                    && !self.is_dead(policy, rule);
                needed |= needs;
                // Two detectors of one rule may share the probe.
                if needs && !known(&failed, Some(index_of_rule)) {
                    failed.push(entry(Some(index_of_rule), rule.on_failure));
                }
            }
            if !needed && !known(&failed, None) {
                failed.push(entry(None, OnFailure::Open));
            }
        }
        failed
    }
}

impl DetectorState {
    fn new(detector: &Detector) -> Self {
        Self {
            gather: GatherState::new(&detector.gather),
            position: None,
            is_final: false,
            newest: None,
            failure: None,
        }
    }

    fn take(&mut self, position: u32, output: Option<TokenOutput>) {
        let pushed = match output {
            Some(output) => self.gather.push(output).map_err(|e| e.to_string()),
            None => Err("the probe gave no output for a token that it reads".into()),
        };
        match pushed {
            Ok(()) => self.position = Some(position),
            Err(reason) => self.fail(reason),
        }
    }

    fn keep(&mut self, k: u32, position: u32, output: Option<TokenOutput>) {
        self.newest = Some(Newest {
            k,
            position,
            output,
        });
    }

    fn read_newest(&mut self, tokens: u32) {
        match self.newest.filter(|newest| newest.k == tokens) {
            Some(newest) => self.take(newest.position, newest.output),
            // Another token's state is not what the probe was trained on.
            None => self.fail("the last token of the answer was not observed".into()),
        }
        self.is_final = true;
    }

    fn finish_prompt(&mut self) {
        if self.position.is_none() && self.failure.is_none() {
            self.fail("no token of the prompt's content was observed".into());
        }
        self.is_final = true;
    }

    fn fail(&mut self, reason: String) {
        let first = Failure {
            reason,
            reported: false,
        };
        self.failure.get_or_insert(first);
    }

    /// The failure, once.
    fn report(&mut self) -> Option<String> {
        let failure = self.failure.as_mut().filter(|failure| !failure.reported)?;
        failure.reported = true;
        Some(failure.reason.clone())
    }
}

fn output_of(detector: &Detector, outputs: &[Option<TokenOutput>]) -> Option<TokenOutput> {
    outputs.get(detector.probe).copied().flatten()
}

/// Multiplied from the first on; rounding keeps the order, so raising a factor never lowers it.
fn product(factors: impl Iterator<Item = f32>) -> f32 {
    factors.fold(1.0, |product, factor| product * factor)
}
