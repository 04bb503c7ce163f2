//! What a decision was made from, and the same decision made again from it.
//! Plain data for the journal; the engine fills it in, times included. Knows no clock and no disk.

use serde::{Deserialize, Serialize};

use inwit_probes::gather::MAX_ATTENTION_HEADS;
use inwit_probes::{AttentionHeads, TokenOutput};

use super::state::Gathered;
use super::{Action, Decision, Mode, Policy, PolicyState, Reading};
use crate::error::{Error, Result};

/// One finished request: enough to decide it again, under this policy or another.
/// Holds no prompt text and no answer text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecisionRecord {
    pub request_id: String,
    /// Content hash of the snapshot that the request was pinned to.
    pub snapshot_hash: String,
    pub policy: PolicyIdentity,
    pub mode: Mode,
    /// In the order of `outputs` in the steps.
    pub probes: Vec<ProbeIdentity>,
    pub prompt: PromptRecord,
    /// What the caller had changed in the pass, in order.
    pub interventions: Vec<InterventionRecord>,
    /// Every pass and every decision, in order, over all attempts of generation.
    pub steps: Vec<DecisionStep>,
    /// What the engine did, or would have done, in order.
    pub actions: Vec<ActionTaken>,
    /// The most severe action decided.
    pub action: Action,
    /// As in the reply, e.g. `stop` or `refused_by_policy`; the error's name where there is none.
    pub finish_reason: String,
    pub out_of_domain: bool,
    pub partially_monitored: bool,
    pub timings: TimingsRecord,
    pub tokens: TokenCounts,
    pub sampling: SamplingRecord,
    /// Which kernels ran: across different ones, logits agree within a tolerance only.
    pub kernel_identity: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyIdentity {
    pub name: String,
    pub revision: u64,
    pub hash: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeIdentity {
    pub name: String,
    pub revision: u64,
    pub content_hash: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptRecord {
    /// Keyed, so that nobody without the key can test a guess.
    pub keyed_hash: String,
    /// Position of the first content token.
    pub content_start: u32,
}

/// A caller's intervention, or refusal head, without its numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterventionRecord {
    /// Of the vector or head; `inline` where it came by value.
    pub name: String,
    /// Empty for a refusal head.
    pub site: String,
    pub content_hash: String,
}

/// What went into the policy and what came out, in the order of the calls on `PolicyState`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", deny_unknown_fields)]
pub enum DecisionStep {
    Prompt {
        position: u32,
        in_content: bool,
        is_last: bool,
        #[serde(with = "written")]
        outputs: Vec<Option<TokenOutput>>,
    },
    Generated {
        /// Counted from 1.
        k: u32,
        position: u32,
        #[serde(with = "written")]
        outputs: Vec<Option<TokenOutput>>,
    },
    EndOfAnswer {
        tokens: u32,
    },
    /// The request is of a kind that these of the record's probes were not trained on.
    OutOfDomain {
        probes: Vec<usize>,
    },
    Decided {
        decision: Decision,
        /// The gathered scores that it was made on.
        readings: Vec<Reading>,
    },
    Rewind,
}

/// The steps of a request under way. Probabilities are worked out at its end: no rule
/// waits for most of them, and each pass would have to bring their code and tables from memory.
#[derive(Debug, Default)]
pub struct StepLog {
    /// Those of decisions without their readings.
    steps: Vec<DecisionStep>,
    /// Of all decisions.
    gathered: Vec<Gathered>,
    /// Up to where in `gathered` each decision's reach.
    ends: Vec<usize>,
}

impl StepLog {
    /// Anything but a decision.
    pub fn push(&mut self, step: DecisionStep) {
        debug_assert!(
            !matches!(step, DecisionStep::Decided { .. }),
            "not a decision"
        );
        self.steps.push(step);
    }

    /// A decision, made in this state.
    pub fn decided(&mut self, decision: Decision, state: &PolicyState) {
        self.gathered.extend(state.gathered());
        self.ends.push(self.gathered.len());
        let readings = Vec::new();
        self.steps
            .push(DecisionStep::Decided { decision, readings });
    }

    /// All of it, under the policy that decided.
    pub fn finish(mut self, policy: &Policy) -> Vec<DecisionStep> {
        let decisions = self.steps.iter_mut().filter_map(|step| match step {
            DecisionStep::Decided { readings, .. } => Some(readings),
            _ => None,
        });
        let mut start = 0;
        for (readings, end) in decisions.zip(self.ends) {
            let gathered = self.gathered[start..end].iter();
            *readings = gathered
                .filter_map(|gathered| gathered.reading(policy))
                .collect();
            start = end;
        }
        self.steps
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionTaken {
    pub rule: String,
    pub action: Action,
    /// Decided and recorded, not acted upon.
    pub shadow: bool,
    /// Generated tokens consumed when it was decided, in its attempt; 0 at the prompt.
    pub at_token: u32,
    /// Counted from 0.
    pub attempt: u32,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimingsRecord {
    /// Since the Unix epoch.
    pub finished_at_ms: u64,
    pub queued_ms: f64,
    pub to_first_token_ms: Option<f64>,
    pub total_ms: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenCounts {
    pub prompt: u32,
    pub completion: u32,
    pub cached: u32,
    /// Decoded and never part of the answer.
    pub withheld: u32,
}

/// How tokens were chosen. Stop strings are the caller's text, so only their number is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplingRecord {
    pub seed: u64,
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub stop_strings: u32,
    pub stop_tokens: Vec<u32>,
}

/// Takes finished decisions. Called by the engine before a request's end is told, so it must not
/// block; a sink that cannot keep up counts what it drops.
pub trait DecisionSink: Send + Sync {
    fn record(&self, record: DecisionRecord);
}

/// What a policy makes of recorded outputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The most severe action.
    pub action: Action,
    /// One per recorded decision.
    pub decisions: Vec<Decision>,
    /// After the last step.
    pub readings: Vec<Reading>,
}

impl DecisionRecord {
    /// The decisions as they were recorded.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.steps.iter().filter_map(|step| match step {
            DecisionStep::Decided { decision, .. } => Some(decision),
            _ => None,
        })
    }
}

/// Runs a policy over a record's outputs: under the same policy it gives the recorded decisions;
/// under another, what that one would have decided on the tokens that were generated, its rewinds
/// being those of the record. Probes are found by name.
///
/// Fails when the policy reads a probe that the record does not hold.
pub fn replay(policy: &Policy, record: &DecisionRecord) -> Result<Outcome> {
    let order = probe_order(policy, record)?;
    let arranged = |outputs: &[Option<TokenOutput>]| -> Vec<Option<TokenOutput>> {
        let output = |place: &Option<usize>| outputs.get((*place)?)?.clone();
        order.iter().map(output).collect()
    };
    let mut state = PolicyState::new(policy);
    let mut decisions = Vec::new();
    let mut before_the_pass = Action::Allow;
    for step in &record.steps {
        match step {
            DecisionStep::Prompt {
                position,
                in_content,
                is_last,
                outputs,
            } => state.observe_prompt(policy, *position, *in_content, *is_last, &arranged(outputs)),
            DecisionStep::Generated {
                k,
                position,
                outputs,
            } => state.observe_generated(policy, *k, *position, &arranged(outputs)),
            DecisionStep::EndOfAnswer { tokens } => state.end_of_answer(policy, *tokens),
            DecisionStep::OutOfDomain { probes } => {
                let recorded = probes.iter().filter_map(|index| record.probes.get(*index));
                let names: Vec<&str> = recorded.map(|probe| probe.name.as_str()).collect();
                if policy.refuses_out_of_domain(&names).is_some() {
                    before_the_pass = Action::Refuse;
                }
            }
            DecisionStep::Decided { .. } => decisions.push(state.decide(policy)),
            DecisionStep::Rewind => state.rewind(policy),
        }
    }
    Ok(Outcome {
        action: state.action().max(before_the_pass),
        decisions,
        readings: state.readings(policy),
    })
}

/// For each of the policy's probe indices, the place of that probe in the record.
fn probe_order(policy: &Policy, record: &DecisionRecord) -> Result<Vec<Option<usize>>> {
    let mut order = Vec::new();
    for detector in &policy.detectors {
        let place = record
            .probes
            .iter()
            .position(|probe| probe.name == *detector.probe_name);
        let place = place.ok_or_else(|| Error::FailedPrecondition {
            subject: format!("policy `{}`, detector `{}`", policy.name, detector.name),
            message: format!(
                "the record of `{}` holds no scores of probe `{}`; replay a policy over the \
                 probes that were loaded then",
                record.request_id, detector.probe_name
            ),
        })?;
        if order.len() <= detector.probe {
            order.resize(detector.probe + 1, None);
        }
        order[detector.probe] = Some(place);
    }
    Ok(order)
}

/// Each probe's output for one token, exactly: a failure must fail again.
mod written {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    use super::{TokenOutput, WrittenOutput};

    pub(super) fn serialize<S: Serializer>(
        outputs: &[Option<TokenOutput>],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(
            outputs
                .iter()
                .map(|output| output.as_ref().map(WrittenOutput::from)),
        )
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<Option<TokenOutput>>, D::Error> {
        let written = Vec::<Option<WrittenOutput>>::deserialize(from)?.into_iter();
        let outputs = written.map(|output| output.map(TokenOutput::try_from).transpose());
        outputs.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

/// The logit alone; with the key of the one attention head, whose value it is; or with the value
/// and the key of each of several.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenOutput {
    logit: Exact,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<Exact>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    heads: Vec<[Exact; 2]>,
}

impl From<&TokenOutput> for WrittenOutput {
    fn from(TokenOutput { logit, attention }: &TokenOutput) -> Self {
        let written = |heads: &[(f32, f32)]| {
            let pairs = heads.iter();
            pairs
                .map(|(value, key)| [(*value).into(), (*key).into()])
                .collect()
        };
        let (key, heads) = match attention.pairs() {
            [(_, key)] => (Some((*key).into()), Vec::new()),
            heads => (None, written(heads)),
        };
        Self {
            logit: (*logit).into(),
            key,
            heads,
        }
    }
}

impl TryFrom<WrittenOutput> for TokenOutput {
    type Error = String;

    fn try_from(written: WrittenOutput) -> Result<Self, String> {
        let logit = f32::from(written.logit);
        let pairs = written.heads.into_iter();
        let pairs = pairs.map(|[value, key]| (f32::from(value), f32::from(key)));
        let attention = AttentionHeads::new(pairs)
            .ok_or_else(|| format!("an output has at most {MAX_ATTENTION_HEADS} `heads`"))?;
        match written.key {
            None => Ok(Self { logit, attention }),
            Some(key) if attention.is_empty() => Ok(Self::keyed(logit, key.into())),
            Some(_) => Err("an output has `key` or `heads`, not both".into()),
        }
    }
}

/// Numbers as numbers; those that JSON has none for as `"nan"`, `"inf"` and `"-inf"`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Exact {
    Number(f32),
    Named(Named),
}

#[derive(Serialize, Deserialize)]
enum Named {
    #[serde(rename = "nan")]
    Nan,
    #[serde(rename = "inf")]
    Infinity,
    #[serde(rename = "-inf")]
    NegativeInfinity,
}

impl From<f32> for Exact {
    fn from(x: f32) -> Self {
        match x {
            x if x.is_nan() => Self::Named(Named::Nan),
            f32::INFINITY => Self::Named(Named::Infinity),
            f32::NEG_INFINITY => Self::Named(Named::NegativeInfinity),
            x => Self::Number(x),
        }
    }
}

impl From<Exact> for f32 {
    fn from(exact: Exact) -> Self {
        match exact {
            Exact::Number(x) => x,
            Exact::Named(Named::Nan) => f32::NAN,
            Exact::Named(Named::Infinity) => f32::INFINITY,
            Exact::Named(Named::NegativeInfinity) => f32::NEG_INFINITY,
        }
    }
}

#[cfg(test)]
mod tests {
    use inwit_probes::Gather;
    use proptest::prelude::*;

    use super::super::OutOfDomain;
    use super::super::testing::{COMPLIES, CONTENT, HARM, WRITING, policy};
    use super::*;

    /// What a step holds of one token.
    #[derive(Serialize, Deserialize)]
    struct Outputs(#[serde(with = "written")] Vec<Option<TokenOutput>>);

    const RULES: &str = r#"
        [[rule]]
        name = "two-stage"
        when = { product = ["harm", "complies"] }
        action = "refusal_head"
        hold_back = 3
        [[rule]]
        name = "writing"
        when = { detector = "writing" }
        action = { refuse = "no" }
        hold_back = 2
    "#;

    fn record(policy: &Policy, steps: Vec<DecisionStep>) -> DecisionRecord {
        let probe = |name: &str| ProbeIdentity {
            name: name.into(),
            revision: 1,
            content_hash: "c".into(),
        };
        DecisionRecord {
            request_id: "r1".into(),
            snapshot_hash: "s".into(),
            policy: PolicyIdentity {
                name: policy.name.clone(),
                revision: policy.revision,
                hash: policy.hash.clone(),
            },
            mode: Mode::Enforce,
            probes: ["prompt_harm", "compliance", "response_harm", "content_harm"]
                .map(probe)
                .to_vec(),
            prompt: PromptRecord::default(),
            interventions: vec![],
            steps,
            actions: vec![],
            action: Action::Allow,
            finish_reason: "stop".into(),
            out_of_domain: false,
            partially_monitored: false,
            timings: TimingsRecord::default(),
            tokens: TokenCounts::default(),
            sampling: SamplingRecord::default(),
            kernel_identity: "k".into(),
        }
    }

    fn outputs(given: &[(usize, f32)]) -> Vec<Option<TokenOutput>> {
        let mut outputs = vec![Some(TokenOutput::logit(-9.0)); 4];
        for (probe, logit) in given {
            outputs[*probe] = Some(TokenOutput::logit(*logit));
        }
        outputs
    }

    fn prompt(given: &[(usize, f32)]) -> DecisionStep {
        DecisionStep::Prompt {
            position: 0,
            in_content: true,
            is_last: true,
            outputs: outputs(given),
        }
    }

    fn generated(k: u32, given: &[(usize, f32)]) -> DecisionStep {
        DecisionStep::Generated {
            k,
            position: k,
            outputs: outputs(given),
        }
    }

    /// Runs the calls live, deciding after each, and records them as the engine does. Beside the
    /// record what was read right after each decision.
    fn recorded_beside_readings(
        policy: &Policy,
        calls: Vec<DecisionStep>,
    ) -> (DecisionRecord, Vec<Vec<Reading>>) {
        let mut state = PolicyState::new(policy);
        let (mut log, mut readings) = (StepLog::default(), Vec::new());
        for call in calls {
            match &call {
                DecisionStep::Prompt {
                    position,
                    in_content,
                    is_last,
                    outputs,
                } => {
                    state.observe_prompt(policy, *position, *in_content, *is_last, outputs);
                }
                DecisionStep::Generated { k, outputs, .. } => {
                    state.observe_generated(policy, *k, *k, outputs);
                }
                DecisionStep::EndOfAnswer { tokens } => state.end_of_answer(policy, *tokens),
                DecisionStep::Rewind => state.rewind(policy),
                DecisionStep::Decided { .. } | DecisionStep::OutOfDomain { .. } => {}
            }
            log.push(call);
            let decision = state.decide(policy);
            log.decided(decision, &state);
            readings.push(state.readings(policy));
        }
        let mut record = record(policy, log.finish(policy));
        record.action = state.action();
        (record, readings)
    }

    fn recorded(policy: &Policy, calls: Vec<DecisionStep>) -> DecisionRecord {
        recorded_beside_readings(policy, calls).0
    }

    fn a_rewound_request() -> Vec<DecisionStep> {
        vec![
            prompt(&[(HARM, 5.0)]),
            generated(1, &[]),
            generated(2, &[]),
            generated(3, &[(COMPLIES, 5.0)]),
            DecisionStep::Rewind,
            generated(1, &[]),
            generated(2, &[(WRITING, f32::NAN)]),
            DecisionStep::EndOfAnswer { tokens: 2 },
        ]
    }

    /// `NaN` is not equal to itself, so records are compared as they are written.
    fn json(record: &DecisionRecord) -> String {
        serde_json::to_string(record).unwrap()
    }

    #[test]
    fn every_decision_is_recorded_with_the_readings_of_its_time() {
        let (record, live) = recorded_beside_readings(&policy(RULES), a_rewound_request());
        let recorded = record.steps.into_iter().filter_map(|step| match step {
            DecisionStep::Decided { readings, .. } => Some(readings),
            _ => None,
        });
        assert_eq!(recorded.collect::<Vec<_>>(), live);
        let sizes: Vec<usize> = live.iter().map(Vec::len).collect();
        assert!(sizes.iter().any(|size| *size != sizes[0]), "{sizes:?}");
    }

    #[test]
    fn a_replay_decides_the_same_over_all_attempts() {
        let policy = policy(RULES);
        let record = recorded(&policy, a_rewound_request());
        assert_eq!(record.action, Action::RefusalHead);
        let read_back: DecisionRecord = serde_json::from_str(&json(&record)).unwrap();
        assert_eq!(json(&read_back), json(&record));
        let outcome = replay(&policy, &read_back).unwrap();
        assert_eq!(outcome.action, record.action);
        assert!(outcome.decisions.iter().eq(record.decisions()));
        assert!(
            outcome
                .decisions
                .iter()
                .any(|decision| !decision.failed.is_empty())
        );
    }

    /// A prompt whose content one probe reads with three attention heads.
    fn an_attended_prompt() -> Vec<DecisionStep> {
        let pair = |seed: u32| {
            let seed = seed as f32;
            ((seed * 1.3).sin() + 0.5, 4.0 * (seed * 0.7).cos())
        };
        let step = |position: u32| {
            let heads = AttentionHeads::new((0..3).map(|head| pair(3 * position + head)));
            let attention = heads.unwrap();
            let logit = attention.pairs().iter().map(|(value, _)| value).sum();
            let mut outputs = outputs(&[]);
            outputs[CONTENT] = Some(TokenOutput { logit, attention });
            DecisionStep::Prompt {
                position,
                in_content: true,
                is_last: position == 9,
                outputs,
            }
        };
        (0..10).map(step).collect()
    }

    #[test]
    fn a_replay_gathers_several_attention_heads_to_the_same_bits() {
        let rule = "[[rule]]\nname = \"c\"\nwhen = { detector = \"content\" }\naction = \"flag\"";
        let mut policy = policy(rule);
        policy.detectors[CONTENT].gather = Gather::Attention;
        let record = recorded(&policy, an_attended_prompt());
        assert_eq!(record.action, Action::Flag);
        let read_back: DecisionRecord = serde_json::from_str(&json(&record)).unwrap();
        let outcome = replay(&policy, &read_back).unwrap();
        assert!(outcome.decisions.iter().eq(record.decisions()));
        let Some(DecisionStep::Decided { readings, .. }) = record.steps.last() else {
            panic!("the last step of a record is a decision");
        };
        assert_eq!(&outcome.readings, readings);
        assert!(readings.iter().all(|reading| reading.logit.is_finite()));
    }

    #[test]
    fn another_policy_is_replayed_over_the_same_outputs() {
        let record = recorded(&policy(RULES), a_rewound_request());
        let flagging = "[[rule]]\nname = \"f\"\nwhen = { detector = \"harm\" }\naction = \"flag\"";
        assert_eq!(
            replay(&policy(flagging), &record).unwrap().action,
            Action::Flag
        );
    }

    #[test]
    fn a_refusal_out_of_domain_is_replayed_for_the_probes_that_a_policy_reads() {
        let mut refusing = policy(RULES);
        refusing.detectors.retain(|detector| detector.probe != 3);
        refusing.out_of_domain = OutOfDomain::Refuse { text: "no".into() };
        let action = |policy: &Policy, probes: Vec<usize>| {
            let steps = vec![DecisionStep::OutOfDomain { probes }];
            replay(policy, &record(policy, steps)).unwrap().action
        };
        assert_eq!(action(&refusing, vec![HARM]), Action::Refuse);
        assert_eq!(action(&refusing, vec![3]), Action::Allow);
        assert_eq!(action(&policy(RULES), vec![HARM]), Action::Allow);
    }

    #[test]
    fn probes_are_found_by_name_wherever_the_record_has_them() {
        let policy = policy(RULES);
        let mut record = recorded(&policy, a_rewound_request());
        record.probes.reverse();
        for step in &mut record.steps {
            if let DecisionStep::Prompt { outputs, .. } | DecisionStep::Generated { outputs, .. } =
                step
            {
                outputs.reverse();
            }
        }
        let outcome = replay(&policy, &record).unwrap();
        assert!(outcome.decisions.iter().eq(record.decisions()));
    }

    #[test]
    fn a_record_without_a_needed_probe_cannot_be_replayed() {
        let policy = policy(RULES);
        let mut record = recorded(&policy, a_rewound_request());
        record.probes.truncate(1);
        let message = replay(&policy, &record).unwrap_err().to_string();
        assert!(
            message.contains("compliance") && message.contains("r1"),
            "{message}"
        );
    }

    /// Equal bit for bit, any `NaN` being any other.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    proptest! {
        #[test]
        fn an_output_is_written_exactly(
            logit in any::<f32>(),
            key in any::<f32>(),
            pairs in proptest::collection::vec(any::<(f32, f32)>(), 2..=MAX_ATTENTION_HEADS),
        ) {
            let attention = AttentionHeads::new(pairs).unwrap();
            for output in [
                TokenOutput::logit(logit),
                TokenOutput::keyed(logit, key),
                TokenOutput { logit, attention },
            ] {
                let text = serde_json::to_string(&Outputs(vec![Some(output.clone())])).unwrap();
                let Outputs(back) = serde_json::from_str(&text).unwrap();
                let back = back.into_iter().next().flatten().unwrap();
                prop_assert!(same(back.logit, logit), "{} became {}", logit, back.logit);
                let (back, pairs) = (back.attention.pairs(), output.attention.pairs());
                prop_assert_eq!(back.len(), pairs.len());
                for (back, pair) in back.iter().zip(pairs) {
                    prop_assert!(same(back.0, pair.0) && same(back.1, pair.1));
                }
            }
        }
    }

    #[test]
    fn an_output_with_one_key_is_read_and_written_as_it_always_was() {
        let text = r#"[{"logit":1.5,"key":-0.25},null]"#;
        let outputs: Outputs = serde_json::from_str(text).unwrap();
        assert_eq!(outputs.0, [Some(TokenOutput::keyed(1.5, -0.25)), None]);
        assert_eq!(serde_json::to_string(&outputs).unwrap(), text);
    }

    #[test]
    fn an_output_with_too_many_heads_or_two_forms_is_refused() {
        let refused = |text: &str, reason: &str| {
            let error = serde_json::from_str::<Outputs>(&format!("[{text}]"));
            let error = error.map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        };
        let many = format!(
            r#"{{"logit":0.0,"heads":[{}[1,1]]}}"#,
            "[1,1],".repeat(MAX_ATTENTION_HEADS)
        );
        refused(&many, &format!("at most {MAX_ATTENTION_HEADS}"));
        refused(
            r#"{"logit":0.0,"key":1.0,"heads":[[1,1],[1,1]]}"#,
            "not both",
        );
    }
}
