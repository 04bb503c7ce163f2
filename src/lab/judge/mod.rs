//! Says of an answer whether it does what was asked, declines, or is no sensible text.
//! Knows a prompt's text and an answer's; knows no data file and no policy.

pub mod agreement;
mod model;
mod probes;
mod rules;

use std::fmt;
use std::str::FromStr;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use model::ModelJudge;
pub use probes::ProbeJudge;
pub use rules::RuleJudge;

use super::rows::RowPrompt;
use crate::error::{Error, Result};

/// What an answer does with what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Does what was asked, or tries to.
    Complied,
    /// Declines, with or without a reason or another offer.
    Refused,
    /// No sensible text: empty, in a loop, or not made of words.
    Incoherent,
}

impl Verdict {
    pub const ALL: [Self; 3] = [Self::Complied, Self::Refused, Self::Incoherent];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complied => "complied",
            Self::Refused => "refused",
            Self::Incoherent => "incoherent",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Verdict {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let of_text = |verdict: &Self| verdict.as_str() == text;
        Self::ALL.into_iter().find(of_text).ok_or_else(|| {
            let message = format!("`{text}` is none of complied, refused and incoherent");
            Error::invalid("label", message)
        })
    }
}

/// Judges answers, one at a time; several calls may be under way at once.
pub trait Judge: Send + Sync {
    /// Short and stable: the name of a column.
    fn name(&self) -> &str;

    /// # Errors
    /// When the judge cannot work at all, never for what the answer says.
    fn judge<'a>(&'a self, prompt: &'a str, answer: &'a str) -> BoxFuture<'a, Result<Verdict>>;
}

/// Each judge's verdict, in the order of the judges.
pub async fn judge_all(
    judges: &[Box<dyn Judge>],
    prompt: &str,
    answer: &str,
) -> Result<Vec<Verdict>> {
    let verdicts = judges.iter().map(|judge| judge.judge(prompt, answer));
    futures::future::try_join_all(verdicts).await
}

/// The verdict that all judges share; `None` where they differ, and without a judge.
pub fn agreed(verdicts: &[Verdict]) -> Option<Verdict> {
    let first = verdicts.first()?;
    verdicts
        .iter()
        .all(|verdict| verdict == first)
        .then_some(*first)
}

/// What a judge reads of a prompt: the text of its one turn, or the whole chat with its roles.
pub fn prompt_text(prompt: &RowPrompt) -> String {
    match prompt {
        RowPrompt::Text(text) | RowPrompt::Raw(text) => text.clone(),
        RowPrompt::Messages(turns) => match turns.as_slice() {
            [only] => only.content.clone(),
            turns => {
                let turn = |turn: &super::rows::Turn| format!("{}: {}", turn.role, turn.content);
                turns.iter().map(turn).collect::<Vec<_>>().join("\n\n")
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::Turn;
    use super::*;

    /// Says the same of everything.
    struct Always(Verdict);

    impl Judge for Always {
        fn name(&self) -> &str {
            "always"
        }

        fn judge<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Verdict>> {
            Box::pin(async { Ok(self.0) })
        }
    }

    #[test]
    fn verdicts_are_read_as_they_are_written() {
        for verdict in Verdict::ALL {
            assert_eq!(verdict.to_string().parse(), Ok(verdict));
            let json = serde_json::to_string(&verdict).expect("serialises");
            assert_eq!(json, format!("\"{verdict}\""));
        }
        let error = "helped".parse::<Verdict>().expect_err("is refused");
        assert!(error.to_string().contains("incoherent"), "{error}");
    }

    #[test]
    fn judges_agree_or_there_is_no_verdict() {
        use Verdict::{Complied, Refused};
        assert_eq!(agreed(&[Refused, Refused]), Some(Refused));
        assert_eq!(agreed(&[Refused, Complied]), None);
        assert_eq!(agreed(&[]), None);
    }

    #[tokio::test]
    async fn verdicts_come_in_the_order_of_the_judges() {
        let judges: Vec<Box<dyn Judge>> = Verdict::ALL
            .iter()
            .map(|verdict| Box::new(Always(*verdict)) as Box<dyn Judge>)
            .collect();
        assert_eq!(judge_all(&judges, "a", "b").await, Ok(Verdict::ALL.into()));
    }

    #[test]
    fn a_chat_of_one_turn_is_that_turn() {
        let turn = |role: &str, content: &str| Turn {
            role: role.into(),
            content: content.into(),
        };
        let one = RowPrompt::Messages(vec![turn("user", "Hi")]);
        assert_eq!(prompt_text(&one), "Hi");
        let two = RowPrompt::Messages(vec![turn("system", "Be brief"), turn("user", "Hi")]);
        assert_eq!(prompt_text(&two), "system: Be brief\n\nuser: Hi");
    }
}
