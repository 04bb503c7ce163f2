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

/// A reading before its probability is worked out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gathered {
    detector: usize,
    position: u32,
    logit: f32,
}

impl Gathered {
    /// None where the policy has no such detector.
    pub(super) fn reading(self, policy: &Policy) -> Option<Reading> {
        let detector = policy.detectors.get(self.detector)?;
        Some(Reading {
            detector: self.detector,
            position: self.position,
            logit: self.logit,
            probability: detector.calibration.probability(self.logit),
            threshold: detector.threshold_logit,
            fired: detector.is_above(self.logit),
        })
    }
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

/// What one detector has seen. Small, since every step brings those of every probe from memory:
/// what is rare lies apart.
#[derive(Clone, Debug)]
pub struct DetectorState {
    gather: GatherState,
    /// Of the last token that was gathered.
    position: Option<u32>,
    /// Nothing that comes can change the reading.
    is_final: bool,
    /// Of a `generated(k)` detector: the newest token up to `k`, 0 being the last prompt token.
    newest: Option<Box<Newest>>,
    /// Of the same, the last prompt token: where a rewind goes back to.
    at_prompt: Option<Box<Newest>>,
    failure: Option<Box<Failure>>,
}

#[derive(Clone, Debug)]
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

/// What a rule may count on for one of its detectors. A logit and no probability: rules are asked
/// at every step, and few of them need one.
#[derive(Clone, Copy)]
enum Conjunct<'a> {
    /// Not yet known, or never to be: anything is possible.
    Open,
    /// Known so far, and may still change.
    Now(&'a Detector, f32),
    Final(&'a Detector, f32),
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

    /// What a step reads, for whoever wants it near before the step comes.
    pub fn detectors(&self) -> &[DetectorState] {
        &self.detectors
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
                Positions::FirstGenerated(last) if k <= last => {
                    state.take(position, output);
                    state.is_final = k == last;
                }
                Positions::EveryGenerated => state.take(position, output),
                _ => {}
            }
        }
    }

    /// The answer ended after `tokens` generated tokens, each of which was observed where
    /// `needs_last_token` asked for it. A `generated(k)` detector with `tokens < k` reads the last
    /// one, or the last prompt token of an empty answer.
    pub fn end_of_answer(&mut self, policy: &Policy, tokens: u32) {
        let needed = self.needs_last_token(policy);
        for (detector, state) in policy.detectors.iter().zip(&mut self.detectors) {
            match detector.positions {
                _ if state.is_final => {}
                Positions::Generated(_) => state.read_newest(tokens, needed),
                // Nothing was written, so nothing harmful was.
                Positions::FirstGenerated(_) | Positions::EveryGenerated => state.is_final = true,
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
            let detector_of = policy.detectors.get(*detector);
            detector_of.is_some_and(|detector| detector.positions.of_answer())
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
    /// takes their place. Verdicts stay, what was read from the prompt stays, and so does a reading
    /// of token `k`, or of the first `k`, of a rule that has fired.
    pub fn rewind(&mut self, policy: &Policy) {
        for (index, detector) in policy.detectors.iter().enumerate() {
            let keeps = match detector.positions {
                Positions::LastPromptToken | Positions::PromptContent => true,
                Positions::Generated(_) | Positions::FirstGenerated(_) => {
                    self.has_fired_over(policy, index)
                }
                Positions::EveryGenerated => false,
            };
            if let (false, Some(state)) = (keeps, self.detectors.get_mut(index)) {
                let at_prompt = state.at_prompt.take();
                *state = DetectorState::new(detector);
                // The last prompt token is fed again; until then its old output stands.
                state.at_prompt.clone_from(&at_prompt);
                state.newest = at_prompt;
            }
        }
    }

    /// One per detector that has a value, in the policy's order.
    pub fn readings(&self, policy: &Policy) -> Vec<Reading> {
        self.gathered()
            .filter_map(|gathered| gathered.reading(policy))
            .collect()
    }

    /// What they are made from.
    pub(super) fn gathered(&self) -> impl Iterator<Item = Gathered> {
        (0..self.detectors.len()).filter_map(|detector| self.gathered_by(detector))
    }

    fn gathered_by(&self, detector: usize) -> Option<Gathered> {
        let (position, logit) = self.detectors.get(detector)?.value()?;
        Some(Gathered {
            detector,
            position,
            logit,
        })
    }

    /// The most severe action of all rules that have fired.
    pub fn action(&self) -> Action {
        self.action
    }

    fn reading(&self, policy: &Policy, detector: usize) -> Option<Reading> {
        self.gathered_by(detector)?.reading(policy)
    }

    fn conjunct<'a>(&self, policy: &'a Policy, index: usize) -> Conjunct<'a> {
        let (Some(detector), Some(state)) =
            (policy.detectors.get(index), self.detectors.get(index))
        else {
            return Conjunct::Open;
        };
        if state.failure.is_some() {
            return Conjunct::Open;
        }
        match (state.value(), state.is_final) {
            (Some((_, logit)), true) => Conjunct::Final(detector, logit),
            (None, true) => Conjunct::Negative,
            // In the middle of a prompt a gather is half done: not yet known.
            (Some((_, logit)), false) if detector.positions == Positions::EveryGenerated => {
                Conjunct::Now(detector, logit)
            }
            (_, false) => Conjunct::Open,
        }
    }

    /// Whether the rule's detectors are all known, and above.
    fn fires(&self, policy: &Policy, rule: &Rule) -> bool {
        let known = |index: &usize| match self.conjunct(policy, *index) {
            Conjunct::Now(detector, logit) | Conjunct::Final(detector, logit) => {
                Some((detector, logit))
            }
            Conjunct::Open | Conjunct::Negative => None,
        };
        let mut conjuncts = rule.when.detectors().iter().map(known);
        match &rule.when {
            When::Detector(_) | When::All(_) => conjuncts
                .all(|known| known.is_some_and(|(detector, logit)| detector.is_above(logit))),
            When::Product { threshold, .. } => conjuncts
                .map(|known| known.map(|(detector, logit)| detector.calibration.probability(logit)))
                .try_fold(1.0, |product, probability| Some(product * probability?))
                .is_some_and(|product: f32| product > *threshold),
        }
    }

    /// Whether the most that the rule can still reach is not above its threshold: what is final
    /// counts as it is, everything else as 1 (or as true).
    fn is_dead(&self, policy: &Policy, rule: &Rule) -> bool {
        let conjuncts = rule.when.detectors().iter();
        let mut conjuncts = conjuncts.map(|detector| self.conjunct(policy, *detector));
        match &rule.when {
            When::Detector(_) | When::All(_) => conjuncts.any(|conjunct| match conjunct {
                Conjunct::Final(detector, logit) => !detector.is_above(logit),
                Conjunct::Negative => true,
                Conjunct::Open | Conjunct::Now(..) => false,
            }),
            When::Product { threshold, .. } => {
                let most = conjuncts.map(|conjunct| match conjunct {
                    Conjunct::Final(detector, logit) => detector.calibration.probability(logit),
                    Conjunct::Negative => 0.0,
                    Conjunct::Open | Conjunct::Now(..) => 1.0,
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
            if !self.has_fired(index) && self.fires(policy, rule) {
                let detectors = rule.when.detectors().iter();
                let evidence = detectors.filter_map(|detector| self.reading(policy, *detector));
                let evidence = evidence.collect();
                fired.push((
                    rule.action.action(),
                    Fired {
                        rule: index,
                        evidence,
                    },
                ));
            }
        }
        if fired.is_empty() {
            return Vec::new();
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
        if self.detectors.iter().all(|state| state.failure.is_none()) {
            return failed;
        }
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
            at_prompt: None,
            failure: None,
        }
    }

    /// Where the last gathered token is, and what was gathered; none while there is nothing, and
    /// for good after a failure.
    fn value(&self) -> Option<(u32, f32)> {
        let value = || Some((self.position?, self.gather.value()?));
        self.failure.is_none().then(value)?
    }

    fn take(&mut self, position: u32, output: Option<&TokenOutput>) {
        let pushed = match output {
            Some(output) => self.gather.push(output).map_err(|e| e.to_string()),
            None => Err("the probe gave no output for a token that it reads".into()),
        };
        match pushed {
            Ok(()) => self.position = Some(position),
            Err(reason) => self.fail(reason),
        }
    }

    fn keep(&mut self, k: u32, position: u32, output: Option<&TokenOutput>) {
        let newest = Newest {
            k,
            position,
            output: output.cloned(),
        };
        if k == 0 {
            self.at_prompt = Some(Box::new(newest.clone()));
        }
        match &mut self.newest {
            Some(place) => **place = newest,
            None => self.newest = Some(Box::new(newest)),
        }
    }

    /// `needed`: the last token had to be observed, since a rule can still fire over it.
    fn read_newest(&mut self, tokens: u32, needed: bool) {
        let newest = self.newest.take().filter(|newest| newest.k == tokens);
        match newest {
            Some(newest) => self.take(newest.position, newest.output.as_ref()),
            None if !needed => {}
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
        self.failure.get_or_insert_with(|| {
            Box::new(Failure {
                reason,
                reported: false,
            })
        });
    }

    /// The failure, once.
    fn report(&mut self) -> Option<String> {
        let failure = self.failure.as_mut().filter(|failure| !failure.reported)?;
        failure.reported = true;
        Some(failure.reason.clone())
    }
}

fn output_of<'a>(
    detector: &Detector,
    outputs: &'a [Option<TokenOutput>],
) -> Option<&'a TokenOutput> {
    outputs.get(detector.probe)?.as_ref()
}

/// Multiplied from the first on; rounding keeps the order, so raising a factor never lowers it.
fn product(factors: impl Iterator<Item = f32>) -> f32 {
    factors.fold(1.0, |product, factor| product * factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use inwit_probes::Gather;

    use super::super::testing::{COMPLIES, CONTENT, HARM, WRITING, policy};
    use super::*;

    /// One call on the state, with the outputs that differ from a clear no.
    enum Step<'a> {
        Content(&'a [(usize, f32)]),
        Last(&'a [(usize, f32)]),
        Generated(u32, &'a [(usize, f32)]),
        End(u32),
        Rewind,
    }
    use Step::{Content, End, Generated, Last, Rewind};

    const NO: f32 = -9.0;
    const YES: f32 = 9.0;
    const PROMPT: u32 = 2;

    fn outputs(given: &[(usize, f32)]) -> Vec<Option<TokenOutput>> {
        let mut outputs = vec![Some(TokenOutput::logit(NO)); 4];
        for (probe, logit) in given {
            outputs[*probe] = Some(TokenOutput::logit(*logit));
        }
        outputs
    }

    fn apply(state: &mut PolicyState, policy: &Policy, step: &Step<'_>) -> Decision {
        match *step {
            Content(given) => state.observe_prompt(policy, 0, true, false, &outputs(given)),
            Last(given) => state.observe_prompt(policy, 1, true, true, &outputs(given)),
            Generated(k, given) => {
                state.observe_generated(policy, k, PROMPT + k - 1, &outputs(given));
            }
            End(tokens) => state.end_of_answer(policy, tokens),
            Rewind => state.rewind(policy),
        }
        state.decide(policy)
    }

    /// `action, hold-back`, then what fired, `!` what failed, `.` when nothing can follow.
    fn shown(policy: &Policy, decision: &Decision) -> String {
        let mut text = format!("{} {}", decision.action, decision.hold_back);
        for fired in &decision.fired {
            text += &format!(" {}", policy.rules[fired.rule].name);
        }
        for failed in &decision.failed {
            let rule = failed.rule.map_or("-", |rule| &policy.rules[rule].name);
            text += &format!(" !{rule}");
        }
        if decision.final_ {
            text += " .";
        }
        text
    }

    /// Each step's decision is as said.
    fn check(rules: &str, steps: &[(Step<'_>, &str)]) {
        let policy = policy(rules);
        let mut state = PolicyState::new(&policy);
        for (index, (step, expected)) in steps.iter().enumerate() {
            let decision = apply(&mut state, &policy, step);
            assert_eq!(shown(&policy, &decision), *expected, "step {index}");
        }
    }

    fn rule(name: &str, when: &str, action: &str, hold_back: u32) -> String {
        format!(
            "[[rule]]\nname = \"{name}\"\nwhen = {{ {when} }}\naction = {action}\n\
             hold_back = {hold_back}\n"
        )
    }

    fn logit(probability: f32) -> f32 {
        (probability / (1.0 - probability)).ln()
    }

    const STAGES: &str = "[\"harm\", \"complies\"]";

    fn product() -> String {
        rule("r", &format!("product = {STAGES}"), "\"refusal_head\"", 3)
    }

    fn all() -> String {
        rule("r", &format!("all = {STAGES}"), "\"refusal_head\"", 3)
    }

    fn writing() -> String {
        rule("w", "detector = \"writing\"", "{ refuse = \"no\" }", 4)
    }

    #[test]
    fn a_detector_fires_once_and_its_verdict_stays() {
        check(
            &writing(),
            &[
                (Last(&[]), "allow 4"),
                (Generated(1, &[(WRITING, -0.1)]), "allow 4"),
                (Generated(2, &[(WRITING, 0.1)]), "refuse 0 w ."),
                (Generated(3, &[]), "refuse 0 ."),
                (End(3), "refuse 0 ."),
            ],
        );
    }

    #[test]
    fn a_logit_at_its_threshold_does_not_fire() {
        let mut policy = policy(&writing());
        policy.detectors[WRITING].threshold_logit = 1.0;
        let mut state = PolicyState::new(&policy);
        let at = apply(&mut state, &policy, &Generated(1, &[(WRITING, 1.0)]));
        assert!(at.fired.is_empty());
        let above = apply(
            &mut state,
            &policy,
            &Generated(2, &[(WRITING, 1.0f32.next_up())]),
        );
        assert_eq!(above.fired.len(), 1);
    }

    #[test]
    fn product_and_all_differ_on_six_tenths_twice() {
        let steps = |end: &'static str| {
            [
                (Last(&[(HARM, 0.405)]), "allow 3"),
                (Generated(1, &[]), "allow 3"),
                (Generated(2, &[]), "allow 3"),
                (Generated(3, &[(COMPLIES, 0.405)]), end),
            ]
        };
        assert!((logit(0.6) - 0.405).abs() < 1e-3);
        check(&product(), &steps("allow 0 ."));
        check(&all(), &steps("refusal_head 0 r ."));
    }

    #[test]
    fn a_negative_stage_one_releases_at_once() {
        for rules in [product(), all()] {
            check(
                &rules,
                &[
                    (Content(&[]), "allow 3"),
                    (Last(&[(HARM, -0.1)]), "allow 0 ."),
                ],
            );
            check(&rules, &[(Last(&[(HARM, 0.1)]), "allow 3")]);
        }
    }

    #[test]
    fn stage_one_is_negative_exactly_when_it_does_not_exceed_the_products_threshold() {
        let stages = format!("product = {STAGES}, threshold = 0.8");
        let rules = rule("r", &stages, "\"abort\"", 3);
        check(&rules, &[(Last(&[(HARM, logit(0.79))]), "allow 0 .")]);
        check(&rules, &[(Last(&[(HARM, logit(0.81))]), "allow 3")]);
        let mut policy = policy(&rules);
        let exactly = policy.detectors[HARM].calibration.probability(1.5);
        policy.rules[0].when = When::Product {
            detectors: vec![HARM, COMPLIES],
            threshold: exactly,
        };
        let decision = apply(
            &mut PolicyState::new(&policy),
            &policy,
            &Last(&[(HARM, 1.5)]),
        );
        assert!(decision.final_);
    }

    #[test]
    fn a_short_answer_has_its_second_stage_read_at_its_end() {
        let positive = "refusal_head 0 r .";
        check(
            &product(),
            &[
                (Last(&[(HARM, YES)]), "allow 3"),
                (Generated(1, &[]), "allow 3"),
                (Generated(2, &[(COMPLIES, YES)]), "allow 3"),
                (End(2), positive),
            ],
        );
        check(
            &product(),
            &[
                (Last(&[(HARM, YES), (COMPLIES, YES)]), "allow 3"),
                (End(0), positive),
            ],
        );
        check(
            &product(),
            &[(Last(&[(HARM, YES)]), "allow 3"), (End(0), "allow 0 .")],
        );
    }

    #[test]
    fn the_first_tokens_are_judged_together_once_the_last_of_them_is_there() {
        let mut policy = policy(&all());
        policy.detectors[COMPLIES].positions = Positions::FirstGenerated(3);
        policy.detectors[COMPLIES].gather = Gather::Max;
        let decided = |steps: &[(Step<'_>, &str)]| {
            let mut state = PolicyState::new(&policy);
            for (index, (step, expected)) in steps.iter().enumerate() {
                let decision = apply(&mut state, &policy, step);
                assert_eq!(shown(&policy, &decision), *expected, "step {index}");
            }
        };
        decided(&[
            (Last(&[(HARM, YES)]), "allow 3"),
            (Generated(1, &[(COMPLIES, YES)]), "allow 3"),
            (Generated(2, &[]), "allow 3"),
            (Generated(3, &[]), "refusal_head 0 r ."),
        ]);
        decided(&[
            (Last(&[(HARM, YES)]), "allow 3"),
            (Generated(1, &[(COMPLIES, YES)]), "allow 3"),
            (Rewind, "allow 3"),
            (Last(&[(HARM, YES)]), "allow 3"),
            (Generated(1, &[]), "allow 3"),
            (Generated(2, &[]), "allow 3"),
            (Generated(3, &[]), "allow 0 ."),
            (Generated(4, &[(COMPLIES, YES)]), "allow 0 ."),
        ]);
        decided(&[
            (Last(&[(HARM, YES)]), "allow 3"),
            (Generated(1, &[(COMPLIES, YES)]), "allow 3"),
            (End(1), "refusal_head 0 r ."),
        ]);
        decided(&[(Last(&[(HARM, YES)]), "allow 3"), (End(0), "allow 0 .")]);
    }

    #[test]
    fn an_end_whose_last_token_was_not_observed_is_a_failure() {
        check(
            &product(),
            &[
                (Last(&[(HARM, YES)]), "allow 3"),
                (Generated(1, &[]), "allow 3"),
                (End(2), "allow 0 !r ."),
            ],
        );
    }

    #[test]
    fn the_last_token_is_needed_while_a_rule_that_reads_answers_can_still_fire() {
        let needs = |rules: &str, steps: &[Step<'_>]| {
            let policy = policy(rules);
            let mut state = PolicyState::new(&policy);
            for step in steps {
                apply(&mut state, &policy, step);
            }
            state.needs_last_token(&policy)
        };
        assert!(needs(&writing(), &[Last(&[])]));
        assert!(needs(&product(), &[Last(&[(HARM, YES)])]));
        assert!(!needs(&product(), &[Last(&[(HARM, NO)])]));
        assert!(!needs(
            &rule("h", "detector = \"harm\"", "\"flag\"", 0),
            &[Last(&[])]
        ));
        assert!(!needs(
            &writing(),
            &[Last(&[]), Generated(1, &[(WRITING, YES)])]
        ));
    }

    #[test]
    fn a_short_answer_that_no_rule_can_fire_over_needs_no_second_stage() {
        check(
            &product(),
            &[
                (Last(&[(HARM, NO)]), "allow 0 ."),
                (Generated(1, &[]), "allow 0 ."),
                (End(2), "allow 0 ."),
            ],
        );
    }

    #[test]
    fn the_most_severe_action_wins_and_order_breaks_ties() {
        let harm = "detector = \"harm\"";
        let rules = [
            rule("a", harm, "\"flag\"", 0),
            rule("b", harm, "\"refusal_head\"", 0),
            rule("c", harm, "{ refuse = \"one\" }", 0),
            rule("d", harm, "{ refuse = \"two\" }", 0),
        ];
        check(
            &rules.concat(),
            &[(Last(&[(HARM, YES)]), "refuse 0 c d b a .")],
        );
        let mut turned = rules;
        turned.reverse();
        check(
            &turned.concat(),
            &[(Last(&[(HARM, YES)]), "refuse 0 d c b a .")],
        );
    }

    #[test]
    fn a_milder_rule_that_fires_later_does_not_lower_the_action() {
        let rules = rule("h", "detector = \"harm\"", "{ refuse = \"no\" }", 0)
            + &rule("w", "detector = \"writing\"", "\"flag\"", 0);
        check(
            &rules,
            &[
                (Last(&[(HARM, YES)]), "refuse 0 h"),
                (Generated(1, &[(WRITING, YES)]), "refuse 0 w ."),
            ],
        );
    }

    #[test]
    fn the_hold_back_is_the_largest_of_the_rules_that_can_still_fire() {
        check(
            &(product() + &writing() + &rule("f", "detector = \"complies\"", "\"flag\"", 9)),
            &[
                (Last(&[(HARM, YES)]), "allow 9"),
                (Generated(1, &[]), "allow 9"),
                (Generated(2, &[]), "allow 9"),
                (Generated(3, &[]), "allow 4"),
                (End(3), "allow 0 ."),
            ],
        );
    }

    #[test]
    fn a_prompt_in_pieces_is_judged_when_it_is_complete() {
        let rules = rule("c", "detector = \"content\"", "\"abort\"", 1);
        check(
            &rules,
            &[
                (Content(&[(CONTENT, YES)]), "allow 1"),
                (Last(&[]), "abort 0 c ."),
            ],
        );
        check(
            &rules,
            &[(Content(&[]), "allow 1"), (Last(&[]), "allow 0 .")],
        );
    }

    #[test]
    fn a_gather_that_saw_too_few_tokens_is_negative() {
        let rules = rule("c", "detector = \"content\"", "\"abort\"", 1);
        let mut policy = policy(&rules);
        policy.detectors[CONTENT].gather = inwit_probes::Gather::KOfN { k: 2, n: 4 };
        let mut state = PolicyState::new(&policy);
        let decision = apply(&mut state, &policy, &Last(&[(CONTENT, YES)]));
        assert_eq!(shown(&policy, &decision), "allow 0 .");
    }

    #[test]
    fn an_empty_answer_is_no_harmful_answer() {
        check(&writing(), &[(Last(&[]), "allow 4"), (End(0), "allow 0 .")]);
    }

    #[test]
    fn a_failed_probe_never_counts_as_negative() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            check(
                &(product() + &writing()),
                &[
                    (Last(&[(HARM, bad)]), "allow 4 !r"),
                    (Generated(1, &[(WRITING, bad)]), "allow 0 !w ."),
                    (Generated(2, &[(WRITING, YES)]), "allow 0 ."),
                ],
            );
        }
    }

    #[test]
    fn a_failure_that_no_rule_needs_is_told_without_a_rule() {
        let steps = [
            (Last(&[(HARM, NO)]), "allow 0 ."),
            (Generated(1, &[]), "allow 0 ."),
            (Generated(2, &[]), "allow 0 ."),
            (Generated(3, &[(COMPLIES, f32::NAN)]), "allow 0 !- ."),
        ];
        check(&product(), &steps);
    }

    #[test]
    fn a_failure_names_every_rule_and_what_it_wants_done() {
        let rules = writing()
            + &rule("o", "detector = \"writing\"", "\"flag\"", 0)
            + "on_failure = \"open\"\n";
        let policy = policy(&rules);
        let mut state = PolicyState::new(&policy);
        let decision = apply(&mut state, &policy, &Generated(1, &[(WRITING, f32::NAN)]));
        let told: Vec<_> = decision
            .failed
            .iter()
            .map(|f| (f.rule, f.on_failure))
            .collect();
        assert_eq!(
            told,
            [(Some(0), OnFailure::Closed), (Some(1), OnFailure::Open)]
        );
        assert!(
            decision
                .failed
                .iter()
                .all(|f| f.probe == WRITING && f.reason.contains("finite"))
        );
    }

    #[test]
    fn an_output_that_is_missing_where_it_is_read_is_a_failure() {
        let policy = policy(&writing());
        for outputs in [vec![], vec![None; 4]] {
            let mut state = PolicyState::new(&policy);
            state.observe_generated(&policy, 1, 2, &outputs);
            let decision = state.decide(&policy);
            assert_eq!(shown(&policy, &decision), "allow 0 !w .");
        }
    }

    #[test]
    fn a_rewind_reads_the_new_answer_and_keeps_the_verdict() {
        check(
            &(product() + &writing()),
            &[
                (Last(&[(HARM, YES)]), "allow 4"),
                (Generated(1, &[(WRITING, -0.1)]), "allow 4"),
                (Generated(2, &[]), "allow 4"),
                (Generated(3, &[(COMPLIES, YES)]), "refusal_head 4 r"),
                (Rewind, "refusal_head 4"),
                (Last(&[(HARM, NO)]), "refusal_head 4"),
                (Generated(1, &[]), "refusal_head 4"),
                (Generated(2, &[(WRITING, YES)]), "refuse 0 w ."),
            ],
        );
    }

    #[test]
    fn after_a_rewind_a_pending_stage_is_read_at_its_own_token_again() {
        let rules = rule("w", "detector = \"writing\"", "\"steer\"", 0).replace(
            "\"steer\"",
            "{ steer = { vector = \"refusal\", strength = 1.0 } }",
        );
        check(
            &(rules + &product()),
            &[
                (Last(&[(HARM, YES)]), "allow 3"),
                (Generated(1, &[(WRITING, YES)]), "steer 3 w"),
                (Rewind, "steer 3"),
                (Generated(1, &[]), "steer 3"),
                (Generated(2, &[]), "steer 3"),
                (Generated(3, &[(COMPLIES, YES)]), "refusal_head 0 r ."),
            ],
        );
    }

    #[test]
    fn a_rewind_keeps_the_reading_of_the_pilot_that_fired() {
        let policy = policy(&(product() + &writing()));
        let mut state = PolicyState::new(&policy);
        for step in [
            Last(&[(HARM, YES)]),
            Generated(1, &[]),
            Generated(2, &[]),
            Generated(3, &[(COMPLIES, YES)]),
            Rewind,
        ] {
            apply(&mut state, &policy, &step);
        }
        let readings = state.readings(&policy);
        let kept: Vec<_> = readings
            .iter()
            .map(|r| (r.detector, r.position, r.fired))
            .collect();
        assert_eq!(
            kept,
            [(HARM, 1, true), (COMPLIES, 4, true), (CONTENT, 1, false)]
        );
    }

    #[test]
    fn what_was_read_from_the_prompt_stands_when_its_last_token_comes_again() {
        let rules = rule("r", "all = [\"harm\", \"writing\"]", "\"abort\"", 1);
        check(
            &rules,
            &[
                (Last(&[(HARM, YES)]), "allow 1"),
                (Rewind, "allow 1"),
                (Last(&[(HARM, NO)]), "allow 1"),
                (Generated(1, &[(WRITING, YES)]), "abort 0 r ."),
            ],
        );
        check(
            &product(),
            &[
                (Last(&[(HARM, YES), (COMPLIES, YES)]), "allow 3"),
                (Generated(1, &[]), "allow 3"),
                (Rewind, "allow 3"),
                (End(0), "refusal_head 0 r ."),
            ],
        );
    }

    #[test]
    fn evidence_is_what_the_rule_read() {
        let policy = policy(&product());
        let mut state = PolicyState::new(&policy);
        apply(&mut state, &policy, &Last(&[(HARM, 3.0)]));
        let decision = apply(&mut state, &policy, &Generated(3, &[(COMPLIES, 4.0)]));
        let evidence = &decision.fired[0].evidence;
        let told: Vec<_> = evidence
            .iter()
            .map(|r| (r.detector, r.position, r.logit))
            .collect();
        assert_eq!(told, [(HARM, 1, 3.0), (COMPLIES, 4, 4.0)]);
        assert_eq!(
            evidence[0].probability,
            policy.detectors[HARM].calibration.probability(3.0)
        );
    }

    #[test]
    fn the_empty_policy_allows_everything_and_holds_nothing() {
        let policy = Policy::empty();
        let mut state = PolicyState::new(&policy);
        let decision = apply(&mut state, &policy, &Last(&[(HARM, YES)]));
        assert_eq!(shown(&policy, &decision), "allow 0 .");
    }

    const WHENS: [&str; 8] = [
        "detector = \"harm\"",
        "detector = \"writing\"",
        "detector = \"content\"",
        "product = [\"harm\", \"complies\"]",
        "product = [\"content\", \"writing\", \"harm\"], threshold = 0.2",
        "all = [\"harm\", \"complies\"]",
        "all = [\"content\", \"writing\"]",
        "product = [\"complies\"], threshold = 0.7",
    ];
    const ACTIONS: [&str; 5] = [
        "\"flag\"",
        "{ steer = { vector = \"refusal\", strength = 1.0 } }",
        "\"refusal_head\"",
        "{ refuse = \"no\" }",
        "\"abort\"",
    ];

    type RuleChoice = (usize, usize, u32);

    fn written(rules: &[RuleChoice]) -> Policy {
        let rules = rules.iter().enumerate();
        let rules = rules.map(|(i, (when, action, hold_back))| {
            rule(&format!("r{i}"), WHENS[*when], ACTIONS[*action], *hold_back)
        });
        policy(&rules.collect::<String>())
    }

    fn any_rules() -> impl Strategy<Value = Vec<RuleChoice>> {
        prop::collection::vec((0..WHENS.len(), 0..ACTIONS.len(), 0u32..9), 0..6)
    }

    /// Per token, every probe's logit.
    fn any_logits() -> impl Strategy<Value = Vec<[f32; 4]>> {
        prop::collection::vec(prop::array::uniform4(-4.0f32..4.0), 2..9)
    }

    /// Two prompt tokens, the rest generated, then the end.
    fn decisions(policy: &Policy, tokens: &[[f32; 4]]) -> Vec<Decision> {
        let mut state = PolicyState::new(policy);
        let mut decisions = Vec::new();
        let mut k = 0;
        for (index, logits) in tokens.iter().enumerate() {
            let given: Vec<_> = logits.iter().copied().enumerate().collect();
            k = (index as u32).saturating_sub(1);
            let step = match index {
                0 => Content(&given),
                1 => Last(&given),
                _ => Generated(k, &given),
            };
            decisions.push(apply(&mut state, policy, &step));
        }
        decisions.push(apply(&mut state, policy, &End(k)));
        decisions
    }

    proptest! {
        #[test]
        fn raising_a_logit_never_restricts_less(
            rules in any_rules(), tokens in any_logits(),
            at in any::<prop::sample::Index>(), probe in 0usize..4, by in 0.0f32..6.0,
        ) {
            let policy = written(&rules);
            let mut raised = tokens.clone();
            raised[at.index(tokens.len())][probe] += by;
            let before = decisions(&policy, &tokens);
            let after = decisions(&policy, &raised);
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(before.action <= after.action);
            }
        }

        #[test]
        fn verdicts_stay_and_each_rule_fires_once(rules in any_rules(), tokens in any_logits()) {
            let policy = written(&rules);
            let mut seen = std::collections::BTreeSet::new();
            let mut action = Action::Allow;
            for decision in decisions(&policy, &tokens) {
                prop_assert!(decision.action >= action);
                action = decision.action;
                for fired in &decision.fired {
                    prop_assert!(seen.insert(fired.rule));
                    prop_assert!(policy.rules[fired.rule].action.action() <= action);
                }
            }
        }

        #[test]
        fn order_of_rules_only_breaks_ties(rules in any_rules(), tokens in any_logits()) {
            let mut turned = rules.clone();
            turned.reverse();
            let (policy, turned) = (written(&rules), written(&turned));
            let there = decisions(&policy, &tokens);
            let back = decisions(&turned, &tokens);
            for (a, b) in there.iter().zip(&back) {
                prop_assert_eq!((a.action, a.hold_back, a.final_), (b.action, b.hold_back, b.final_));
                let mirrored = |fired: &Fired| rules.len() - 1 - fired.rule;
                let mut here: Vec<_> = a.fired.iter().map(|fired| fired.rule).collect();
                let mut other: Vec<_> = b.fired.iter().map(mirrored).collect();
                here.sort_unstable();
                other.sort_unstable();
                prop_assert_eq!(here, other);
            }
        }

        #[test]
        fn what_was_given_up_never_fires_and_is_never_held_for(
            rules in any_rules(), tokens in any_logits(),
        ) {
            let policy = written(&rules);
            let mut hold_back = u32::MAX;
            let mut final_ = false;
            for decision in decisions(&policy, &tokens) {
                prop_assert!(decision.hold_back <= hold_back);
                prop_assert!(!final_ || (decision.final_ && decision.fired.is_empty()));
                (hold_back, final_) = (decision.hold_back, decision.final_);
            }
            prop_assert!(final_ && hold_back == 0, "an ended answer leaves nothing open");
        }
    }
}
