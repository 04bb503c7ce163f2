//! One request in flight: what it has read, what was decided, what left.
//! Knows tokens, scores and decisions; knows no tensors and no other sequence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use inwit_probes::TokenOutput;
use tokio::sync::mpsc;

use super::blocks::{Block, BlockKey};
use super::event::{
    Captured, Completed, Delta, Event, FinishReason, Retract, Score, Started, Timings, Usage,
    Verdict,
};
use super::handle::{Admission, Place};
use super::readout::{self, reads};
use super::record;
use super::release::{Release, Released};
use super::request::{Intervention, InterventionKind, PositionSelection, Request, Work};
use super::sampler::{TokenHistory, pick};
use crate::error::Error;
use crate::hooks::ProbeStack;
use crate::metrics;
use crate::model::Tokenizer;
use crate::model::kernels::prefetch;
use crate::policy::{
    Action, ActionTaken, Decision, DecisionRecord, DecisionSink, DecisionStep, Detector, Failed,
    Mode, OnFailure, Policy, PolicyState, Reading, RuleAction, SteerKind, SteerPositions, StepLog,
};
use crate::registry::{Head, Snapshot};

pub(super) struct Sequence {
    pub(super) request: Request,
    pub(super) place: Place,
    events: mpsc::Sender<Event>,
    /// Prompt, then the answer of this attempt.
    pub(super) tokens: Vec<u32>,
    /// Positions whose K and V are stored.
    pub(super) computed: usize,
    pub(super) cached: usize,
    pub(super) blocks: Vec<Block>,
    /// Keys of the blocks that were made findable, and how many those are.
    pub(super) keys: Vec<BlockKey>,
    pub(super) published: usize,
    /// How many blocks the request may need.
    pub(super) most_blocks: usize,
    pub(super) stack: Option<Arc<ProbeStack>>,
    /// Content hashes of the probes in `stack`; empty without one.
    pub(super) probe_hashes: Arc<Vec<String>>,
    /// Per position, what each probe said. Not a number where it failed.
    pub(super) outputs: Vec<Vec<TokenOutput>>,
    state: PolicyState,
    readout: Arc<Policy>,
    /// Tokens of the answer, once it has ended by itself.
    answered: Option<u32>,
    history: TokenHistory,
    release: Release,
    /// Counted from 0; a rewind starts the next.
    attempt: u32,
    pub(super) effect: Effect,
    /// The most severe action that was acted upon.
    acted: Action,
    /// What the policy decided on the pass that is going on.
    judged: Option<Decision>,
    /// Decoding is over; the verdict on the last token is awaited.
    ending: Option<FinishReason>,
    max_tokens: usize,
    withheld: u32,
    /// Tokens of a fixed refusal text, part of the answer without having been decoded.
    fixed_tokens: u32,
    /// Answer tokens whose scores were sent.
    told_scores: usize,
    /// Whether anything has left in this attempt or an earlier one.
    anything_left: bool,
    /// States of tokens that may yet be withheld, in order of position.
    held_captures: VecDeque<Captured>,
    steps: StepLog,
    actions: Vec<ActionTaken>,
    /// Whether the sink was given the decision.
    recorded: bool,
    pub(super) partially_monitored: bool,
    pub(super) out_of_domain: bool,
    arrived: Instant,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    pub(super) finished: bool,
}

/// How this sequence is computed besides what its caller's interventions do.
#[derive(Default)]
pub(super) struct Effect {
    /// The policy's.
    pub(super) steer: Option<Intervention>,
    /// With its gain: the caller's, until the policy puts its own in its place.
    pub(super) head: Option<(Arc<Head>, f32)>,
}

/// By what a sequence is scored.
pub(super) struct Scored {
    pub(super) stack: Option<Arc<ProbeStack>>,
    pub(super) probe_hashes: Arc<Vec<String>>,
    pub(super) readout: Arc<Policy>,
}

/// What outlives a sequence and serves it.
pub(super) struct Surroundings {
    pub(super) tokenizer: Tokenizer,
    pub(super) sink: Arc<dyn DecisionSink>,
    pub(super) journal_key: [u8; 32],
    pub(super) kernel_identity: String,
}

/// What a policy has to know of a token besides its scores.
#[derive(Clone, Copy)]
enum Token {
    Prompt {
        in_content: bool,
        is_last: bool,
    },
    /// Counted from 1.
    Generated {
        k: u32,
    },
}

/// Asks for what a policy's step reads, ahead of it.
pub(crate) fn fetch_policy(policy: &Policy, state: &PolicyState) {
    prefetch(state.detectors());
    prefetch(&policy.detectors);
    prefetch(&policy.rules);
}

fn show(
    state: &mut PolicyState,
    policy: &Policy,
    token: Token,
    position: u32,
    outputs: &[Option<TokenOutput>],
) {
    match token {
        Token::Prompt {
            in_content,
            is_last,
        } => state.observe_prompt(policy, position, in_content, is_last, outputs),
        Token::Generated { k } => state.observe_generated(policy, k, position, outputs),
    }
}

/// Whether a sequence goes on as it was.
#[derive(PartialEq)]
enum Flow {
    On,
    Rewound,
    Done,
}

impl Sequence {
    pub(super) fn new(
        admission: Admission,
        scored: Scored,
        max_tokens: usize,
        most_blocks: usize,
    ) -> Self {
        let Admission {
            request,
            events,
            place,
            arrived,
        } = admission;
        let mut tokens = request.prompt.tokens.clone();
        if let Work::Score { answer } = &request.work {
            tokens.extend(answer);
        }
        let monitored = request.monitor.mode != Mode::Off;
        let policy = &request.monitor.policy;
        let snapshot = &request.monitor.snapshot;
        let out_of_domain = monitored
            && snapshot
                .probes
                .iter()
                .any(|probe| probe.out_of_domain(&request.prompt.form));
        let effect = Effect {
            steer: None,
            head: request.refusal_head.clone().map(|head| (head, 1.0)),
        };
        let now = Instant::now();
        Self {
            state: PolicyState::new(policy),
            history: TokenHistory::new(&request.prompt.tokens),
            release: Release::new(&request.sampling.stop),
            tokens,
            computed: 0,
            cached: 0,
            blocks: Vec::new(),
            keys: Vec::new(),
            published: 0,
            most_blocks,
            stack: scored.stack,
            probe_hashes: scored.probe_hashes,
            outputs: Vec::new(),
            readout: scored.readout,
            answered: None,
            attempt: 0,
            effect,
            acted: Action::Allow,
            judged: None,
            ending: None,
            max_tokens,
            withheld: 0,
            fixed_tokens: 0,
            told_scores: 0,
            anything_left: false,
            held_captures: VecDeque::new(),
            steps: StepLog::default(),
            actions: Vec::new(),
            recorded: false,
            partially_monitored: false,
            out_of_domain,
            arrived,
            started: now,
            first_token: None,
            last_token: now,
            finished: false,
            place,
            events,
            request,
        }
    }

    pub(super) fn prompt_len(&self) -> usize {
        self.request.prompt.tokens.len()
    }

    pub(super) fn in_prefill(&self) -> bool {
        self.computed < self.prompt_len() || matches!(self.request.work, Work::Score { .. })
    }

    /// Tokens that are known and not yet computed.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the pass that ends at the last known token is followed by a choice.
    pub(super) fn wants_logits(&self) -> bool {
        self.ending.is_none() && self.request.work == Work::Generate
    }

    pub(super) fn is_steered_by_caller(&self) -> bool {
        !self.request.interventions.is_empty()
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
            || self
                .place
                .aborted
                .load(std::sync::atomic::Ordering::Acquire)
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.request
            .deadline
            .is_some_and(|deadline| now >= deadline)
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.request.monitor.policy)
    }

    fn monitored(&self) -> bool {
        self.request.monitor.mode != Mode::Off
    }

    fn enforces(&self) -> bool {
        self.request.monitor.mode == Mode::Enforce && self.request.work == Work::Generate
    }

    pub(super) fn tell(&self, event: Event) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            tracing::error!(request = %self.request.id, "a queue bounded by max_tokens is full");
        }
    }

    /// Announces the sequence. Its cached positions are observed here, as if they had just run.
    pub(super) fn start(&mut self, around: &Surroundings) {
        self.tell(Event::Started(Started {
            policy_revision: self.request.monitor.policy.revision,
            cached_tokens: self.cached as u32,
        }));
        metrics::prompt_consumed(self.prompt_len() as u32, self.cached as u32);
        if self.out_of_domain && self.monitored() {
            metrics::out_of_domain_served();
        }
        if self.out_of_domain && self.judge_domain(around) == Flow::Done {
            return;
        }
        for position in 0..self.cached {
            self.observe(position);
            if matches!(self.request.work, Work::Score { .. }) {
                self.tell_prompt_score(position);
            }
        }
    }

    /// A policy may refuse what a probe that it reads was not trained on.
    fn judge_domain(&mut self, around: &Surroundings) -> Flow {
        let snapshot = Arc::clone(&self.request.monitor.snapshot);
        let form = &self.request.prompt.form;
        let all = snapshot.probes.iter().enumerate();
        let strange: Vec<(usize, &str)> = all
            .filter(|(_, probe)| probe.out_of_domain(form))
            .map(|(index, probe)| (index, &*probe.name))
            .collect();
        let (probes, names): (Vec<usize>, Vec<&str>) = strange.into_iter().unzip();
        self.steps.push(DecisionStep::OutOfDomain { probes });
        let policy = self.policy();
        let Some(text) = policy.refuses_out_of_domain(&names) else {
            return Flow::On;
        };
        self.verdict("out_of_domain", Action::Refuse, Vec::new());
        self.acted = Action::Refuse;
        if !self.enforces() {
            return Flow::On;
        }
        self.refuse(text, around);
        Flow::Done
    }

    /// Asks for what `observe_pass` will read: it was last used a whole pass of weights ago.
    pub(super) fn fetch(&self) {
        fetch_policy(&self.request.monitor.policy, &self.state);
    }

    /// Takes in what the probes said in one pass over `rows` of its tokens, and lets the policy
    /// judge. `outputs`: per row, what each probe said.
    pub(super) fn observe_pass(&mut self, rows: usize, outputs: Vec<Vec<TokenOutput>>) {
        self.outputs.truncate(self.computed);
        self.outputs.extend(outputs);
        let scoring = matches!(self.request.work, Work::Score { .. });
        for position in self.computed..self.computed + rows {
            self.computed = position + 1;
            self.observe(position);
            if scoring {
                self.tell_prompt_score(position);
                if self.computed >= self.prompt_len() {
                    self.judge();
                }
            }
        }
        if self.is_caught_up() && !scoring && self.ending.is_none() {
            self.judged = Some(self.judge());
        }
    }

    /// Whether every known token was computed, the prompt among them.
    fn is_caught_up(&self) -> bool {
        self.computed >= self.tokens.len() && self.computed >= self.prompt_len()
    }

    /// Goes on from a pass that was observed. `logits`: of its last row, where `wants_logits`.
    pub(super) fn after_pass(&mut self, logits: Option<&[f32]>, around: &Surroundings) {
        if !self.is_caught_up() {
            return;
        }
        if matches!(self.request.work, Work::Score { .. }) {
            return self.conclude_score(around);
        }
        if let Some(reason) = self.ending {
            return self.conclude(reason, around);
        }
        let Some(decision) = self.judged.take() else {
            return self.finish_failed(Error::internal("a pass that nobody judged"), around);
        };
        let passes = self.computed - self.prompt_len();
        if self.follow(decision.clone(), around) != Flow::On {
            return;
        }
        match self.choose(logits, around) {
            Choice::Failed => {}
            Choice::Ends(reason) => self.conclude(reason, around),
            Choice::Goes => self.let_go(passes + 1, &decision),
        }
    }

    /// Shows one position to the policy.
    fn observe(&mut self, position: usize) {
        if !self.monitored() {
            return;
        }
        let outputs = self.outputs_at(position);
        let policy = self.policy();
        let at = position as u32;
        let token = self.token_at(position);
        show(&mut self.state, &policy, token, at, &outputs);
        self.steps.push(match token {
            Token::Prompt {
                in_content,
                is_last,
            } => DecisionStep::Prompt {
                position: at,
                in_content,
                is_last,
                outputs,
            },
            Token::Generated { k } => DecisionStep::Generated {
                k,
                position: at,
                outputs,
            },
        });
    }

    fn token_at(&self, position: usize) -> Token {
        let prompt_len = self.prompt_len();
        match (position + 1).checked_sub(prompt_len) {
            None | Some(0) => Token::Prompt {
                in_content: self.request.prompt.content.contains(&position),
                is_last: position + 1 == prompt_len,
            },
            Some(k) => Token::Generated { k: k as u32 },
        }
    }

    fn outputs_at(&self, position: usize) -> Vec<Option<TokenOutput>> {
        let outputs = self.outputs.get(position).into_iter().flatten();
        outputs.map(|output| Some(output.clone())).collect()
    }

    /// Lets the policy decide and tells what fired.
    fn judge(&mut self) -> Decision {
        if !self.monitored() {
            return Decision {
                final_: true,
                ..Decision::default()
            };
        }
        let policy = self.policy();
        let decision = self.state.decide(&policy);
        self.steps.decided(decision.clone(), &self.state);
        for fired in &decision.fired {
            let rule = &policy.rules[fired.rule];
            let evidence = self.scores_of(&policy, &fired.evidence, true);
            self.verdict(&rule.name, rule.action.action(), evidence);
        }
        for failed in &decision.failed {
            self.note_failure(&policy, failed);
        }
        decision
    }

    fn verdict(&mut self, rule: &str, action: Action, evidence: Vec<Score>) {
        let shadow = !self.enforces();
        metrics::verdict_made(action.as_str(), self.request.monitor.mode.as_str());
        let at_token = self.computed.saturating_sub(self.prompt_len()) as u32;
        self.actions.push(ActionTaken {
            rule: rule.to_owned(),
            action,
            shadow,
            at_token,
            attempt: self.attempt,
        });
        self.tell(Event::Verdict(Verdict {
            action,
            rule: rule.to_owned(),
            shadow,
            evidence,
        }));
    }

    fn note_failure(&mut self, policy: &Policy, failed: &Failed) {
        let probe = &self.request.monitor.snapshot.probes[failed.probe].name;
        tracing::warn!(request = %self.request.id, probe = %probe, "a probe failed");
        if self.enforces() && closes(failed) {
            metrics::monitor_failed(probe);
        } else {
            let open = failed.rule.is_some() && self.enforces();
            metrics::monitor_skipped(probe, if open { "fail_open" } else { "not_enforced" });
        }
        self.partially_monitored |= !policy.rules.is_empty();
    }

    /// Carries a decision out.
    fn follow(&mut self, decision: Decision, around: &Surroundings) -> Flow {
        if !self.enforces() {
            return Flow::On;
        }
        if let Some(failed) = decision.failed.iter().find(|failed| closes(failed)) {
            let probe = self.request.monitor.snapshot.probes[failed.probe]
                .name
                .to_string();
            self.fail_monitor(&probe, &failed.reason, around);
            return Flow::Done;
        }
        let policy = self.policy();
        let Some(fired) = decision.fired.first() else {
            return Flow::On;
        };
        let rule = &policy.rules[fired.rule];
        if rule.action.action() <= self.acted {
            return Flow::On;
        }
        self.acted = rule.action.action();
        match &rule.action {
            RuleAction::Flag => Flow::On,
            RuleAction::Steer {
                vector,
                site,
                kind,
                positions,
            } => match steering(
                &self.request.monitor.snapshot,
                vector,
                *site,
                *kind,
                *positions,
            ) {
                Some(intervention) => {
                    self.effect.steer = Some(intervention);
                    self.rewind()
                }
                None => self.missing(&rule.name, around),
            },
            RuleAction::RefusalHead { head, strength } => {
                match self.request.monitor.snapshot.heads.get(head) {
                    Some(head) => {
                        self.effect = Effect {
                            steer: None,
                            head: Some((Arc::clone(head), *strength)),
                        };
                        self.rewind()
                    }
                    None => self.missing(&rule.name, around),
                }
            }
            RuleAction::Refuse { text } => {
                let text = text.clone();
                self.refuse(&text, around);
                Flow::Done
            }
            RuleAction::Abort => {
                self.abort(around);
                Flow::Done
            }
        }
    }

    /// A compiled policy names only what its snapshot holds.
    fn missing(&mut self, rule: &str, around: &Surroundings) -> Flow {
        let reason = format!("rule `{rule}` names what the snapshot does not hold");
        self.fail_monitor("policy", &reason, around);
        Flow::Done
    }

    /// Withdraws the answer so far; the last prompt token runs again under the new effect.
    fn rewind(&mut self) -> Flow {
        let retract = self.withdraw("", Vec::new());
        if let Some(retract) = retract {
            self.tell(Event::Retract(retract));
        }
        let policy = self.policy();
        self.state.rewind(&policy);
        self.steps.push(DecisionStep::Rewind);
        self.history.rewind();
        self.attempt += 1;
        self.ending = None;
        let prompt_len = self.prompt_len();
        self.tokens.truncate(prompt_len);
        self.computed = prompt_len - 1;
        self.outputs.truncate(self.computed);
        self.blocks
            .truncate(prompt_len.div_ceil(crate::model::kernels::KV_BLOCK));
        Flow::Rewound
    }

    /// Takes back what was decided. A retract where some of it had left.
    fn withdraw(&mut self, text: &str, token_ids: Vec<u32>) -> Option<Retract> {
        let decided = self.release.decided() as u32;
        let withdrawn = self.release.rewind();
        self.withheld += decided;
        metrics::tokens_withheld(decided);
        self.told_scores = 0;
        self.held_captures.clear();
        let left = withdrawn.released_tokens > 0 || withdrawn.released_text_bytes > 0;
        left.then(|| {
            metrics::retracted();
            Retract {
                keep_token_count: 0,
                keep_text_bytes: 0,
                replacement_text: text.to_owned(),
                replacement_token_ids: token_ids,
            }
        })
    }

    /// Answers with a fixed text instead.
    fn refuse(&mut self, text: &str, around: &Surroundings) {
        let encoded = around
            .tokenizer
            .encode(text, crate::model::SpecialText::AsText);
        let token_ids = match encoded {
            Ok(token_ids) => token_ids,
            Err(error) => return self.finish_failed(error, around),
        };
        self.fixed_tokens = token_ids.len() as u32;
        match self.withdraw(text, token_ids.clone()) {
            Some(retract) => self.tell(Event::Retract(retract)),
            None => self.tell(Event::Delta(Delta {
                text: text.to_owned(),
                token_ids,
                ..Delta::default()
            })),
        }
        self.finish(FinishReason::RefusedByPolicy, around);
    }

    fn abort(&mut self, around: &Surroundings) {
        if !self.anything_left {
            return self.finish_failed(Error::AbortedByPolicy, around);
        }
        if let Some(retract) = self.withdraw("", Vec::new()) {
            self.tell(Event::Retract(retract));
        }
        self.finish(FinishReason::RefusedByPolicy, around);
    }

    /// Fails closed: what is held is dropped, what left stays.
    fn fail_monitor(&mut self, probe: &str, reason: &str, around: &Surroundings) {
        if !self.anything_left {
            return self.finish_failed(
                Error::MonitorFailed {
                    probe: probe.to_owned(),
                    reason: reason.to_owned(),
                },
                around,
            );
        }
        self.withheld += (self.release.decided() - self.release.released()) as u32;
        self.finish(FinishReason::MonitorFailed, around);
    }

    fn choose(&mut self, logits: Option<&[f32]>, around: &Surroundings) -> Choice {
        let index = self.release.decided() as u32;
        let Some(logits) = logits else {
            self.finish_failed(Error::internal("a step without logits"), around);
            return Choice::Failed;
        };
        let sampling = &self.request.sampling;
        let pick = match pick(sampling, &self.history, self.attempt, index, logits) {
            Ok(pick) => pick,
            Err(error) => {
                self.fail_choice(error, around);
                return Choice::Failed;
            }
        };
        let now = Instant::now();
        if self.release.decided() > 0 {
            metrics::token_decoded(now - self.last_token);
        }
        self.last_token = now;
        if around.tokenizer.stop_ids().contains(&pick.token) {
            return Choice::Ends(FinishReason::Stop);
        }
        if sampling.stop_token_ids.contains(&pick.token) {
            return Choice::Ends(FinishReason::Stop);
        }
        metrics::tokens_generated(1);
        let bytes = around.tokenizer.token_bytes(pick.token);
        let stopped = self.release.decide(pick.token, bytes, pick.logprobs);
        self.history.push(pick.token);
        self.tokens.push(pick.token);
        let reason = if stopped {
            Some(FinishReason::StopSequence)
        } else if self.release.decided() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        match reason {
            // One more pass, over the last token, for its scores alone.
            Some(reason) if self.last_token_matters() => {
                self.ending = Some(reason);
                Choice::Goes
            }
            Some(reason) => Choice::Ends(reason),
            None => Choice::Goes,
        }
    }

    /// A steered state that leaves no finite logits is a failure of who steered.
    fn fail_choice(&mut self, error: Error, around: &Surroundings) {
        if self.effect.steer.is_some() {
            return self.fail_monitor(
                "steering",
                "the steered state gave no finite logits",
                around,
            );
        }
        if !self.request.interventions.is_empty() {
            let message = "left no finite logits; use a smaller strength";
            return self.finish_failed(Error::invalid("input.interventions", message), around);
        }
        self.finish_failed(error, around);
    }

    fn last_token_matters(&self) -> bool {
        let captured = self.request.capture.as_ref().is_some_and(|wish| {
            matches!(
                wish.positions,
                PositionSelection::Generated
                    | PositionSelection::All
                    | PositionSelection::FromLastPromptToken
            )
        });
        let scored = self.monitored()
            && (self.request.monitor.return_scores || self.state.needs_last_token(&self.policy()));
        captured || scored
    }

    /// The answer is over: what still waits for its end is read, decided, released.
    fn conclude(&mut self, reason: FinishReason, around: &Surroundings) {
        self.ending = None;
        let tokens = self.release.decided() as u32;
        if self.monitored() {
            let policy = self.policy();
            self.state.end_of_answer(&policy, tokens);
            self.answered = Some(tokens);
            self.steps.push(DecisionStep::EndOfAnswer { tokens });
        }
        let decision = self.judge();
        if self.follow(decision, around) != Flow::On {
            return;
        }
        self.release.end();
        let released = self.release.release(usize::MAX);
        // What a stop string cut off.
        self.withheld += (self.release.decided() - self.release.released()) as u32;
        self.pass_on(released);
        self.finish(reason, around);
    }

    fn conclude_score(&mut self, around: &Surroundings) {
        let answer = (self.tokens.len() - self.prompt_len()) as u32;
        if self.monitored() && answer > 0 {
            let policy = self.policy();
            self.state.end_of_answer(&policy, answer);
            self.answered = Some(answer);
            self.steps
                .push(DecisionStep::EndOfAnswer { tokens: answer });
            self.judge();
        }
        self.finish(FinishReason::Stop, around);
    }

    /// Releases what the verdict of the last pass allows: with `hold_back = h`, token `t` waits for
    /// the verdict of pass `t + h - 1`. `sampled` tokens were sampled from passes with a verdict.
    fn let_go(&mut self, sampled: usize, decision: &Decision) {
        let by_policy = if self.enforces() && !decision.final_ {
            decision.hold_back
        } else {
            0
        };
        let hold_back = by_policy.max(self.request.monitor.hold_back) as usize;
        let released = self.release.release(sampled.saturating_sub(hold_back));
        self.pass_on(released);
    }

    fn pass_on(&mut self, released: Option<Released>) {
        self.tell_captures();
        let scores = self.new_scores();
        let released = released.unwrap_or_default();
        if released.text.is_empty() && released.token_ids.is_empty() && scores.is_empty() {
            return;
        }
        if !released.token_ids.is_empty() {
            self.anything_left = true;
            if self.first_token.is_none() {
                let now = Instant::now();
                self.first_token = Some(now);
                metrics::first_token_released(now - self.arrived);
            }
        }
        self.tell(Event::Delta(Delta {
            text: released.text,
            token_ids: released.token_ids,
            scores,
            logprobs: released.logprobs,
        }));
    }

    /// Scores of answer tokens that have left and were scored since the last call.
    fn new_scores(&mut self) -> Vec<Score> {
        if !self.request.monitor.return_scores || !self.monitored() {
            return Vec::new();
        }
        let prompt_len = self.prompt_len();
        let scored = self.outputs.len().saturating_sub(prompt_len);
        let until = self.release.released().min(scored);
        let from = self.told_scores.min(until);
        self.told_scores = until;
        (from..until)
            .flat_map(|index| self.token_scores(prompt_len + index))
            .collect()
    }

    fn token_scores(&self, position: usize) -> Vec<Score> {
        let prompt_len = self.prompt_len();
        let in_content = self.request.prompt.content.contains(&position);
        let is_last = position + 1 == prompt_len;
        let k = (position + 1).saturating_sub(prompt_len) as u32;
        let probes = &self.request.monitor.snapshot.probes;
        let outputs = self.outputs.get(position).into_iter().flatten();
        outputs
            .zip(probes)
            .enumerate()
            .filter(|(_, (output, loaded))| {
                let positions = loaded.probe.manifest().positions;
                output.is_finite() && reads(positions, in_content, is_last, k)
            })
            .map(|(probe, (output, _))| {
                readout::token_score(&self.request, probe, position as u32, output.logit)
            })
            .collect()
    }

    /// Takes in states of the last pass. Those of the prompt go at once; a generated token's, which
    /// names the token, no sooner than the token itself.
    pub(super) fn captured(&mut self, captured: Captured) {
        let own = captured.first_position as usize >= self.prompt_len();
        if own && self.request.work == Work::Generate {
            self.held_captures.push_back(captured);
        } else {
            self.tell(Event::Captured(captured));
        }
    }

    fn tell_captures(&mut self) {
        let released = self.prompt_len() + self.release.released();
        while let Some(next) = self.held_captures.front()
            && (next.first_position as usize) < released
            && let Some(next) = self.held_captures.pop_front()
        {
            self.tell(Event::Captured(next));
        }
    }

    fn tell_prompt_score(&mut self, position: usize) {
        if !self.request.monitor.return_scores || !self.monitored() {
            return;
        }
        let scores = self.token_scores(position);
        if !scores.is_empty() {
            self.tell(Event::Delta(Delta {
                scores,
                ..Delta::default()
            }));
        }
    }

    fn scores_of(&self, policy: &Policy, readings: &[Reading], of_rule: bool) -> Vec<Score> {
        readings
            .iter()
            .map(|reading| readout::score(&self.request, policy, reading, of_rule))
            .collect()
    }

    /// Every detector of the policy, then every probe that none of them reads.
    fn gathered(&self) -> Vec<Score> {
        if !self.monitored() {
            return Vec::new();
        }
        let policy = &self.request.monitor.policy;
        let mut scores = self.scores_of(policy, &self.state.readings(policy), true);
        let unread =
            |detector: &Detector| policy.detectors.iter().all(|d| d.probe != detector.probe);
        if self.readout.detectors.iter().any(unread) {
            let mut rest = self.read_out();
            rest.retain(|reading| unread(&self.readout.detectors[reading.detector]));
            scores.extend(self.scores_of(&self.readout, &rest, false));
        }
        scores
    }

    /// What the readout says of everything that was computed. Worked out when it is asked for, not
    /// token by token: a step brings what the policy needs from memory, and no more.
    fn read_out(&self) -> Vec<Reading> {
        let mut state = PolicyState::new(&self.readout);
        for position in 0..self.computed.min(self.outputs.len()) {
            let outputs = self.outputs_at(position);
            let token = self.token_at(position);
            show(&mut state, &self.readout, token, position as u32, &outputs);
        }
        if let Some(tokens) = self.answered {
            state.end_of_answer(&self.readout, tokens);
        }
        state.readings(&self.readout)
    }

    fn usage(&self) -> Usage {
        let released = match &self.request.work {
            Work::Generate => self.release.released() as u32,
            Work::Score { answer } => answer.len() as u32,
        };
        Usage {
            prompt_tokens: self.prompt_len() as u32,
            completion_tokens: released + self.fixed_tokens,
            cached_tokens: self.cached as u32,
            withheld_tokens: self.withheld,
        }
    }

    fn timings(&self) -> Timings {
        Timings {
            queued: self.started - self.arrived,
            to_first_token: self.first_token.map(|first| first - self.arrived),
            total: self.arrived.elapsed(),
        }
    }

    fn finish(&mut self, reason: FinishReason, around: &Surroundings) {
        let refused = self.acted == Action::RefusalHead;
        let reason = match reason {
            FinishReason::Stop | FinishReason::StopSequence | FinishReason::Length if refused => {
                FinishReason::RefusedByPolicy
            }
            reason => reason,
        };
        self.hand_over(reason.as_str(), around);
        let completed = Completed {
            finish_reason: reason,
            action: self.state.action().max(self.acted),
            usage: self.usage(),
            scores: self.gathered(),
            out_of_domain: self.out_of_domain,
            partially_monitored: self.partially_monitored,
            timings: self.timings(),
        };
        self.place.leave();
        self.tell(Event::Completed(Box::new(completed)));
        self.finished = true;
    }

    pub(super) fn finish_failed(&mut self, error: Error, around: &Surroundings) {
        self.hand_over(error.name(), around);
        self.place.leave();
        self.tell(Event::Failed(error));
        self.finished = true;
    }

    pub(super) fn finish_late(&mut self, around: &Surroundings) {
        let error = Error::DeadlineExceeded {
            queue_ms: (self.started - self.arrived).as_millis() as u64,
            tokens_done: self.release.decided() as u32,
        };
        self.finish_failed(error, around);
    }

    /// Whether its answer's blocks hold what any other request would have computed.
    pub(super) fn answer_is_plain(&self) -> bool {
        self.effect.steer.is_none()
    }

    /// Gives the finished decision to the sink, before anybody is told of the end.
    fn hand_over(&mut self, finish_reason: &str, around: &Surroundings) {
        if self.recorded {
            return;
        }
        let timings = self.timings();
        let usage = self.usage();
        // Before the call: a sink that panics is not called again.
        self.recorded = true;
        around.sink.record(DecisionRecord {
            request_id: self.request.id.clone(),
            snapshot_hash: self.request.monitor.snapshot.hash.clone(),
            policy: record::policy_identity(&self.request.monitor.policy),
            mode: self.request.monitor.mode,
            probes: record::probe_identities(&self.request.monitor.snapshot),
            prompt: record::prompt(&self.request.prompt, &around.journal_key),
            interventions: record::interventions(&self.request),
            steps: std::mem::take(&mut self.steps).finish(&self.request.monitor.policy),
            actions: std::mem::take(&mut self.actions),
            action: self.state.action().max(self.acted),
            finish_reason: finish_reason.to_owned(),
            out_of_domain: self.out_of_domain,
            partially_monitored: self.partially_monitored,
            timings: record::timings(&timings, SystemTime::now()),
            tokens: record::token_counts(&usage),
            sampling: record::sampling(&self.request.sampling, self.max_tokens),
            kernel_identity: around.kernel_identity.clone(),
        });
    }
}

enum Choice {
    Goes,
    Ends(FinishReason),
    Failed,
}

fn closes(failed: &Failed) -> bool {
    failed.rule.is_some() && failed.on_failure == OnFailure::Closed
}

/// A steer rule as an intervention; none where the snapshot lacks the vector.
fn steering(
    snapshot: &Snapshot,
    vector: &str,
    site: inwit_probes::Site,
    kind: SteerKind,
    positions: SteerPositions,
) -> Option<Intervention> {
    let vector = snapshot.vectors.get(vector)?;
    let kind = match kind {
        SteerKind::Add { strength } => InterventionKind::Add { strength },
        SteerKind::ProjectOut => InterventionKind::ProjectOut,
        SteerKind::ClampAbove { bound } => InterventionKind::ClampAbove { bound },
        SteerKind::ClampBelow { bound } => InterventionKind::ClampBelow { bound },
    };
    Some(Intervention {
        name: vector.name.clone(),
        site,
        kind,
        vector: kind.prepare(&vector.values)?,
        positions: match positions {
            SteerPositions::LastPromptToken => PositionSelection::LastPromptToken,
            SteerPositions::Generated => PositionSelection::Generated,
            SteerPositions::LastPromptTokenAndGenerated => PositionSelection::FromLastPromptToken,
        },
        condition: None,
    })
}
